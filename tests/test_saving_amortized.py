"""Amortised fits as files: what comes back is the same to the bit and trains on alike."""

import builtins
import copy
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.distributions import constraints, transforms

from posterior_cases import PUBLISHED_FAMILIES
from visbi import VIPosterior
from visbi.core.archive import ArchiveError
from visbi.core.random import seeded
from visbi.estimators import NeuralRatio
from visbi.estimators.ratio import RatioConfig
from visbi.fitting.state import AmortizedFit
from visbi.potentials import RatioPotential
from visbi.priors import BoxUniform, MultipleIndependent

SMALL: dict[str, Any] = dict(
    num_transforms=1, hidden_features=4, n_particles=4, max_num_iters=2, show_progress_bar=False, seed=0
)
ON: dict[str, Any] = dict(learning_rate=5e-3, max_num_iters=10, n_particles=32)


def log_p(theta: Tensor, x: Tensor) -> Tensor:
    return -2 * (theta - x.flatten(1)[:, : theta.shape[1]]).square().sum(-1)


def box(dim: int = 2) -> BoxUniform:
    return BoxUniform(-2 * torch.ones(dim), 3 * torch.ones(dim))


def simulations(prior: td.Distribution, *x_shape: int) -> tuple[Tensor, Tensor]:
    """x (60, ..., even number) is theta, noisy and as often as there is room."""
    with seeded(3):
        theta, x = prior.sample(torch.Size([60])), 0.3 * torch.randn(60, *(x_shape or (2,)))
    return theta, x + theta.view(60, *[1] * (x.ndim - 2), 2).repeat(*[1] * (x.ndim - 1), x.shape[-1] // 2)


def amortised(
    prior: Any = None, x_shape: tuple[int, ...] = (2,), made: dict[str, Any] | None = None, **options: Any
) -> VIPosterior:
    prior = box() if prior is None else prior
    posterior = VIPosterior(log_p, prior, **{"q": "gaussian", **(made or {})})
    return posterior.train_amortized(*simulations(prior, *x_shape), **{**SMALL, **options})


def reload(posterior: VIPosterior, folder: Path, **given: Any) -> VIPosterior:
    posterior.save(folder / "p.visbi")
    return VIPosterior.load(folder / "p.visbi", **{"potential_fn": log_p, **given})


def answers(posterior: VIPosterior, x: Tensor) -> list[Tensor]:
    with seeded(2):
        theta = posterior.sample((20,), x)
    return [theta, posterior.log_prob(theta[0], x), posterior.potential(theta[:, 0], x[0])]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(a, b, strict=True))


def assert_equal(a: VIPosterior, b: VIPosterior, x_shape: tuple[int, ...] = (2,)) -> None:
    """The same answers now and after both have trained on."""
    theta, x = simulations(a.prior, *x_shape)
    before = answers(a, x[:3])
    assert equal(before, answers(b, x[:3]))
    for one in (a, b):
        one.train_amortized(theta, x, **{**SMALL, **ON})
    assert equal(answers(a, x[:3]), answers(b, x[:3]))
    assert not equal(before, answers(b, x[:3]))
    assert a.trace == b.trace


@pytest.mark.parametrize("name", PUBLISHED_FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    posterior = amortised(flow_type=name)
    back = reload(posterior, tmp_path)
    assert isinstance(back._state, AmortizedFit) and back.q.config == posterior.q.config
    assert_equal(posterior, back)


def test_all_state_comes_back(tmp_path: Path) -> None:
    posterior = amortised(z_score_x="structured", flow_type="maf", seed=torch.tensor(4))
    posterior.set_default_x(torch.tensor([0.5, 1.0]))
    posterior.report, posterior.map(num_init_samples=20, num_iter=2)
    posterior._state = replace(posterior._state, share=0.35)
    back = reload(posterior, tmp_path)
    assert back.report == posterior.report and back.trace == posterior.trace
    assert torch.equal(back.default_x, posterior.default_x)
    assert torch.equal(back.map(num_init_samples=1, num_iter=1), posterior.map())
    assert vars(back._state.options).keys() == vars(posterior._state.options).keys()
    assert int(back._state.options.seed) == 4 and back._state.share == 0.35
    assert repr(back) == repr(posterior)
    assert not back.q.training
    assert {p.dtype for p in back.q.parameters()} == {p.dtype for p in posterior.q.parameters()}


@pytest.mark.parametrize("objective", ["forward", "mixed"])
def test_objectives_come_back(objective: str, tmp_path: Path) -> None:
    posterior = amortised(flow_type="coupling", objective=objective)
    back = reload(posterior, tmp_path)
    assert back._state.options.objective == objective and repr(back) == repr(posterior)
    assert back.trace == posterior.trace and (back.trace.before is None) is (objective == "forward")
    assert_equal(posterior, back)


def test_saving_changes_nothing_and_again_makes_the_same_file(tmp_path: Path) -> None:
    posterior, twin = amortised(), amortised()
    state = torch.get_rng_state()
    reload(posterior, tmp_path).save(tmp_path / "again.visbi")
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "p.visbi").read_bytes() == (tmp_path / "again.visbi").read_bytes()
    assert_equal(posterior, twin)


PRIORS: dict[str, Callable[[], td.Distribution]] = {
    "normal": lambda: td.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5),
    "mixed": lambda: MultipleIndependent([td.HalfCauchy(torch.ones(1)), box(1)]),
    "simplex": lambda: td.Dirichlet(torch.ones(2)),
    "float64": lambda: BoxUniform(-torch.ones(2).double(), torch.ones(2).double()),
}


@pytest.mark.parametrize("z_score", ["none", "independent", "structured"])
@pytest.mark.parametrize("name", PRIORS)
def test_priors(name: str, z_score: Any, tmp_path: Path) -> None:
    posterior = amortised(PRIORS[name](), z_score_theta=z_score)
    assert_equal(posterior, reload(posterior, tmp_path))


class Doubled(transforms.Transform):
    """A user's own map, from R^2 to R^2."""

    domain, codomain, bijective = constraints.real_vector, constraints.real_vector, True

    def _call(self, x: Tensor) -> Tensor:
        return 2 * x

    def _inverse(self, y: Tensor) -> Tensor:
        return y / 2

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.full(x.shape[:-1], 2 * torch.log(torch.tensor(2.0)))


class Own(td.Distribution):
    """A user's own prior."""

    arg_constraints, support = {}, constraints.real_vector

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * value.square().sum(-1)


@pytest.mark.parametrize("z_score", ["independent", "none"])
def test_a_users_prior_and_transform_are_asked_for(z_score: Any, tmp_path: Path) -> None:
    posterior = amortised(Own(), z_score_theta=z_score)
    with pytest.raises(ValueError, match=r"prior was an object of class Own"):
        reload(posterior, tmp_path)
    assert_equal(posterior, reload(posterior, tmp_path, prior=Own()))
    own = {"theta_transform": Doubled()}
    posterior = amortised(PRIORS["normal"](), made=own, z_score_theta=z_score)
    with pytest.raises(ValueError, match=r"theta_transform was an object of class Doubled"):
        reload(posterior, tmp_path)
    assert_equal(posterior, reload(posterior, tmp_path, **own))


def image_net(width: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv2d(1, width, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()
    )


def test_an_embedding_net_is_asked_for(tmp_path: Path) -> None:
    posterior = amortised(x_shape=(4, 4), embedding_net=image_net())
    with pytest.raises(ValueError, match=r"q_embedding_net was an object of class Sequential.*load\(path, "):
        reload(posterior, tmp_path)
    other = image_net()
    weights = copy.deepcopy(other.state_dict())
    back = reload(posterior, tmp_path, q_embedding_net=other)
    assert equal(
        list(posterior.q.embedding.state_dict().values()), list(back.q.embedding.state_dict().values())
    )
    assert_equal(posterior, back, (4, 4))
    assert equal(list(weights.values()), list(other.state_dict().values()))  # copied, not changed
    with pytest.raises(ValueError, match="`q_embedding_net`: expected the network that the posterior was"):
        reload(posterior, tmp_path, q_embedding_net=image_net(2))
    with pytest.raises(ValueError, match="`q_embedding_net`: expected what"):
        reload(posterior, tmp_path, q_embedding_net=None)


def test_a_flatten_that_is_not_the_default_is_a_network_too(tmp_path: Path) -> None:
    posterior = amortised(x_shape=(4, 4), embedding_net=nn.Flatten(2))
    with pytest.raises(ValueError, match="q_embedding_net"):
        reload(posterior, tmp_path)
    assert_equal(posterior, reload(posterior, tmp_path, q_embedding_net=nn.Flatten(2)), (4, 4))


def test_beside_a_ratio_with_a_network_of_its_own(tmp_path: Path) -> None:
    config = RatioConfig(num_blocks=1, hidden_features=8, z_score_theta="independent", z_score_x="none")
    potential = RatioPotential(NeuralRatio(2, (2,), config, nn.Linear(2, 5)), box())
    posterior = VIPosterior(potential, q="gaussian")
    posterior.train_amortized(*simulations(box()), **SMALL, embedding_net=nn.Linear(2, 3))
    posterior.save(tmp_path / "p.visbi")
    nets = dict(embedding_net=nn.Linear(2, 5), q_embedding_net=nn.Linear(2, 3))
    assert_equal(posterior, VIPosterior.load(tmp_path / "p.visbi", **nets))


def test_from_a_file_into_the_other_mode(tmp_path: Path) -> None:
    posterior = amortised()
    back = reload(posterior, tmp_path)
    options = dict(max_num_iters=2, quality_control=False, show_progress_bar=False, seed=0)
    for one in (posterior, back):
        with pytest.warns(UserWarning, match="replaces the amortised fit"):
            one.train(torch.ones(1, 2), **options)
    assert torch.equal(posterior.log_prob(torch.zeros(1, 2)), back.log_prob(torch.zeros(1, 2)))


def test_elsewhere(tmp_path: Path) -> None:
    back = reload(amortised().set_default_x(torch.zeros(2)), tmp_path, device="meta")
    assert back.sample((3,)).device.type == back.default_x.device.type == "meta"


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a saved posterior with another manifest."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(members["manifest.json"])
    change(manifest["content"]["fit"]["fields"])
    members["manifest.json"] = json.dumps(manifest).encode()
    out = path.with_name("changed.visbi")
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda fit: fit.pop("trace"),
        lambda fit: fit.update(conditional=None),
        lambda fit: fit.update(options={"is": "dict", "items": {}}),
        lambda fit: fit.update(report=3),
        lambda fit: fit.update(x="x"),
        lambda fit: fit.update(method=1),
        lambda fit: fit.update(share=1.5),
        lambda fit: fit.update(share="1"),
        lambda fit: fit["conditional"]["fields"]["config"]["fields"].update(flow_type="os.system"),
        lambda fit: fit["conditional"]["fields"]["config"]["fields"].update(hidden_features=5),
        lambda fit: fit["conditional"]["fields"]["weights"]["items"]["tensors"].update(items={}),
        lambda fit: fit["conditional"].update(kind="os.system"),
    ],
)
def test_a_forged_manifest_is_a_clear_error(change: Callable[[Any], Any], tmp_path: Path) -> None:
    amortised().save(tmp_path / "p.visbi")
    with pytest.raises(ArchiveError, match=r"`path`: expected a posterior saved by visbi; got '.*changed"):
        VIPosterior.load(changed(tmp_path / "p.visbi", change), potential_fn=log_p)


def test_loading_neither_unpickles_nor_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = amortised(flow_type="nsf")
    reload(posterior, tmp_path)  # what the loader itself needs is imported now

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loading a file must not run this")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr("importlib.import_module", forbidden)
    x = torch.zeros(2, 2)
    assert equal(
        answers(posterior, x), answers(VIPosterior.load(tmp_path / "p.visbi", potential_fn=log_p), x)
    )


# -- a file of format 2, as users have them ----------------------------------------------------

OLD = Path(__file__).parent / "data" / "format_2"


def from_old() -> VIPosterior:
    return VIPosterior.load(OLD / "amortised.visbi", potential_fn=log_p, q_embedding_net=nn.Linear(2, 3))


def test_a_file_of_format_2_says_what_it_said() -> None:
    posterior, facts = from_old(), json.loads((OLD / "facts.json").read_text())
    log_q = posterior.log_prob(torch.tensor(facts["theta"]), torch.tensor(facts["x"]))
    torch.testing.assert_close(log_q, torch.tensor(facts["log_q"]), rtol=1e-4, atol=1e-4)
    assert repr(posterior) == facts["described"]
    assert posterior.report.n_draws == 50_000 and posterior._map is not None
    before = copy.deepcopy(posterior.q.state_dict())
    on = {**SMALL, **ON, "hidden_features": 3}
    posterior.train_amortized(*simulations(posterior.prior), **on)
    assert any(not torch.equal(value, before[name]) for name, value in posterior.q.state_dict().items())
    with zipfile.ZipFile(OLD / "amortised.visbi") as file:
        assert json.loads(file.read("manifest.json"))["format_version"] == 2
