"""Posteriors with q="auto" as files: each kind of q that a fit may end with, its draws and its report."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

from auto_cases import KINDS, auto, found, trained, two_modes
from posterior_cases import GOOD, X, alone_and_seeded, box, fitted, log_p, made
from test_saving import changed
from visbi import VIPosterior
from visbi.core.archive import FORMAT_VERSION, ArchiveError
from visbi.core.random import seeded
from visbi.families.bent import Bend, BentBody, features
from visbi.families.blend import BlendBody
from visbi.families.coupling import CouplingBody
from visbi.families.gaussian import GaussianBody
from visbi.families.mixture import MixtureBody
from visbi.families.widened import WidenedBody
from visbi.priors import MultipleIndependent

__all__ = ["alone_and_seeded"]


def reload(posterior: VIPosterior, path: Path, **given: Any) -> VIPosterior:
    posterior.save(path / "p.visbi")
    return VIPosterior.load(path / "p.visbi", **{"potential_fn": log_p, **given})


def drawn(posterior: VIPosterior, n: int = 300) -> Tensor:
    with seeded(2):
        return posterior.sample((n,))


def assert_equal(a: VIPosterior, b: VIPosterior) -> None:
    """Equal draws, raw and corrected, weights, densities and words."""
    assert torch.equal(drawn(a), drawn(b))
    with seeded(2):
        theta = a.sample((50,), correct=False)
    with seeded(2):
        assert torch.equal(theta, b.sample((50,), correct=False))
    assert torch.equal(a.log_prob(theta), b.log_prob(theta))
    assert all(
        torch.equal(*pair) for pair in zip(a.weighted_sample(200), b.weighted_sample(200), strict=True)
    )
    assert (a.report, a.trace, repr(a)) == (b.report, b.trace, repr(b))


BODIES = {
    "mixture": MixtureBody,
    "bent mixture": BentBody,
    "flow": WidenedBody,
    "patched flow": BlendBody,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_q(kind: str, tmp_path: Path) -> None:
    posterior = found(kind)
    back = reload(posterior, tmp_path)
    assert type(back.q.body) is BODIES[kind]
    assert_equal(posterior, back)
    assert torch.equal(drawn(posterior, 40_000), drawn(back, 40_000))  # with draws beyond the stored ones
    assert back.q is back._state.family and back.q.coords is back._coords
    assert not back.q.trainable() and not posterior.q.trainable()


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dimensions(kind: str, dim: int, tmp_path: Path) -> None:
    posterior = found(kind, auto(prior=box(dim)), x=torch.zeros(1, dim))
    assert_equal(posterior, reload(posterior, tmp_path))


def test_what_a_fit_says_comes_back(tmp_path: Path) -> None:
    posterior = trained(auto(two_modes), init=torch.randn(30, 2), max_seconds=100.0)
    posterior.map(num_iter=3, num_init_samples=20)
    back = reload(posterior, tmp_path, potential_fn=two_modes)
    assert_equal(posterior, back)
    assert len(back.report.modes) == 2 and back.report.modes == posterior.report.modes
    assert back.report.story == posterior.report.story != () and back.report.rung == "a mixture"
    assert back.report.seconds == posterior.report.seconds > 0
    assert back.report.seed == 1 and back.report.n_values > 1000
    assert torch.equal(back._state.options.init, posterior._state.options.init)
    assert back._state.options.max_seconds == 100.0
    assert torch.equal(back.map(num_iter=1), posterior.map()) and torch.equal(back.default_x, X)


def test_it_trains_again_and_stays_automatic(tmp_path: Path) -> None:
    posterior = trained(auto())
    back = reload(posterior, tmp_path)
    for one in (posterior, back):
        trained(one, seed=3)
    assert torch.equal(drawn(posterior), drawn(back))
    assert type(back.q.body) is MixtureBody and back.report.rung == posterior.report.rung


def test_untrained(tmp_path: Path) -> None:
    posterior = auto()
    back = reload(posterior, tmp_path)
    assert type(back.q.body) is GaussianBody
    with pytest.raises(ValueError, match=r"train\(\)"):
        back.sample((1,))
    assert torch.equal(drawn(trained(back)), drawn(trained(posterior)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_start_stays_one(kind: str, tmp_path: Path) -> None:
    lender = found(kind)
    posterior = auto(q=lender)
    back = reload(posterior, tmp_path)
    assert back._warm and back._automatic and type(back.q.body) is BODIES[kind]
    assert torch.equal(drawn(trained(back)), drawn(trained(posterior)))


def test_mixed_and_double_priors(tmp_path: Path) -> None:
    mixed = MultipleIndependent([td.HalfCauchy(torch.ones(1)), box(1)])
    double = td.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double() + 0.5)
    for prior in (mixed, double):
        posterior = trained(auto(prior=prior))
        back = reload(posterior, tmp_path)
        assert_equal(posterior, back)
        assert drawn(back).dtype == prior.sample().dtype


def test_options_without_effect_are_not_asked_for(tmp_path: Path) -> None:
    posterior = auto()
    with pytest.warns(UserWarning, match="`optimizer`"):
        trained(posterior, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr))
    assert_equal(posterior, reload(posterior, tmp_path))


def test_draws_of_a_named_q_come_back_too(tmp_path: Path) -> None:
    posterior = made().train(X, **GOOD)
    posterior.weighted_sample(500)
    back = reload(posterior, tmp_path)
    with seeded(2):
        theta = posterior.sample((100,), correct=True)
    with seeded(2):
        assert torch.equal(back.sample((100,), correct=True), theta)


def test_an_amortised_posterior_goes_back_to_auto(tmp_path: Path) -> None:
    posterior = trained(auto())
    theta = posterior.prior.sample(torch.Size([40]))
    options = dict(flow_type="gaussian", max_num_iters=2, show_progress_bar=False)
    with pytest.warns(UserWarning, match="replaces"):
        posterior.train_amortized(theta, theta, **options)
    back = reload(posterior, tmp_path)
    for one in (posterior, back):
        with pytest.warns(UserWarning, match="replaces"):
            trained(one)
    assert_equal(posterior, back)


def test_saved_again_it_is_the_same_file(tmp_path: Path) -> None:
    reload(found("patched flow"), tmp_path).save(tmp_path / "again.visbi")
    assert (tmp_path / "p.visbi").read_bytes() == (tmp_path / "again.visbi").read_bytes()


def test_saving_and_loading_leave_torchs_generator(tmp_path: Path) -> None:
    posterior = found("patched flow")
    before = torch.get_rng_state()
    reload(posterior, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_elsewhere(tmp_path: Path) -> None:
    back = reload(found("patched flow"), tmp_path, device="meta")
    assert back.sample((3,)).device.type == back.default_x.device.type == "meta"


def test_loading_does_not_unpickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = found("patched flow")
    posterior.save(tmp_path / "p.visbi")

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loading a file must not run this")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    assert_equal(posterior, VIPosterior.load(tmp_path / "p.visbi", potential_fn=log_p))


def a_blend(content: dict[str, Any]) -> dict[str, Any]:
    return content["family"]["fields"]["body"]["fields"]


def the_draws(content: dict[str, Any]) -> dict[str, Any]:
    return content["fit"]["fields"]["draws"]["fields"]


TENSOR = {"is": "tensor", "name": "x"}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["family"]["fields"].update(body=None),
        lambda c: c["family"]["fields"].update(body=c["coords"]),
        lambda c: c["family"]["fields"]["body"].update(kind="os.system"),
        lambda c: a_blend(c).update(bodies=[]),
        lambda c: a_blend(c).update(bodies=[c["prior"]]),
        lambda c: a_blend(c).update(shares=TENSOR),
        lambda c: a_blend(c)["bodies"][0]["fields"].update(inner=None),
        lambda c: a_blend(c)["bodies"][0]["fields"].update(scales=TENSOR),
        lambda c: a_blend(c)["bodies"][0]["fields"]["inner"]["fields"].update(hidden_features=7),
        lambda c: a_blend(c)["bodies"][0]["fields"]["inner"]["fields"].update(dim=0),
        lambda c: a_blend(c)["bodies"][1]["fields"].update(n_components=5),
        lambda c: the_draws(c).update(theta=TENSOR),
        lambda c: the_draws(c).update(log_p=None),
        lambda c: the_draws(c).update(theta=the_draws(c)["log_p"]),
        lambda c: c["fit"]["fields"].update(draws=None),
        lambda c: c["fit"]["fields"].update(report=None),
        lambda c: c["fit"]["fields"].update(trace=c["fit"]["fields"]["report"]),
        lambda c: c["fit"]["fields"].update(x=[1.0]),
        lambda c: c["fit"]["fields"]["options"]["items"].update(seed="now"),
        lambda c: c["fit"]["fields"]["options"]["items"].update(unheard_of=1),
        lambda c: c["options"]["items"].pop("method"),
    ],
)
def test_a_forged_manifest_is_a_clear_error(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    found("patched flow").save(tmp_path / "p.visbi")
    with pytest.raises(
        ArchiveError, match=r"`path`: expected a posterior saved by visbi; got '.*changed.visbi'"
    ):
        VIPosterior.load(changed(tmp_path / "p.visbi", change), potential_fn=log_p)


def test_a_flipped_byte_is_a_clear_error(tmp_path: Path) -> None:
    found("flow").save(tmp_path / "p.visbi")
    data = bytearray((tmp_path / "p.visbi").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "p.visbi").write_bytes(bytes(data))
    with pytest.raises(ArchiveError, match="damaged"):
        VIPosterior.load(tmp_path / "p.visbi", potential_fn=log_p)


def bent_body() -> BentBody:
    one, coefficients = torch.ones(2).double(), torch.zeros(len(features(2, crossed=True)[0]), 2).double()
    bend = Bend(one, one, torch.arange(2), coefficients, coefficients, -one, one, crossed=True)
    return BentBody(MixtureBody(2), bend)


def test_every_part_of_a_body_is_stored() -> None:
    """One that gets another option or tensor must be stored with it."""
    known = {
        MixtureBody(2, 3): {"dim", "n_components"},
        CouplingBody(2): {"dim"},
        WidenedBody(CouplingBody(2), scales=(1.0,), shares=(1.0,)): {"dim"},
        BlendBody([GaussianBody(2)], torch.ones(1)): {"dim"},
        bent_body(): {"dim", "crossed"},
    }
    of_modules = vars(nn.Module()).keys()
    for body, names in known.items():
        assert vars(body).keys() - of_modules == names


# -- files of older versions ---------------------------------------------------------------

OLD = Path(__file__).parent / "data" / "format_3"
FACTS: dict[str, dict[str, Any]] = json.loads((OLD / "facts.json").read_text())


@pytest.mark.parametrize("name", FACTS)
def test_files_of_format_3_say_what_they_said(name: str) -> None:
    posterior, facts = VIPosterior.load(OLD / f"{name}.visbi", potential_fn=two_modes), FACTS[name]
    theta, log_w = posterior.weighted_sample(25)
    said = {"theta": theta, "log_w": log_w, "log_q": posterior.log_prob(theta)}
    for key, value in said.items():
        torch.testing.assert_close(value.double(), torch.tensor(facts[key]).double(), rtol=1e-4, atol=1e-4)
    assert repr(posterior) == facts["described"]
    assert [mode.weight for mode in posterior.report.modes] == facts["modes"]
    with zipfile.ZipFile(OLD / f"{name}.visbi") as file:
        assert json.loads(file.read("manifest.json"))["format_version"] == 3
    assert trained(posterior).report.rung == "a mixture"


def test_older_visbis_say_that_they_cannot_read_it(tmp_path: Path) -> None:
    """What they say is in `test_archive`; here, that the number has risen."""
    fitted(made()).save(tmp_path / "p.visbi")
    with zipfile.ZipFile(tmp_path / "p.visbi") as file:
        assert json.loads(file.read("manifest.json"))["format_version"] == FORMAT_VERSION >= 3
