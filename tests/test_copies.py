"""Copies by deepcopy, pickle and torch.save: equal, independent, and as trainable as the original."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.distributions import transforms

from visbi import VIPosterior
from visbi.core.random import seeded
from visbi.estimators import NeuralLikelihood
from visbi.estimators.likelihood import LikelihoodConfig
from visbi.families import FAMILY_NAMES
from visbi.potentials import LikelihoodPotential
from visbi.priors import BoxUniform, MultipleIndependent

X = torch.tensor([[0.3, 0.5]])
SHORT: dict[str, Any] = dict(
    max_num_iters=4, warm_up_rounds=2, n_particles=16, show_progress_bar=False, quality_control=False
)


def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
    return -2 * (theta - x_o).square().sum(-1)


def box() -> BoxUniform:
    return BoxUniform(-2 * torch.ones(2), torch.tensor([2.0, 3.0]))


def normal(loc: Tensor, scale: Any) -> td.Distribution:
    return td.Independent(td.Normal(loc, scale), 1)


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def build(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
    return normal(leaf(*event_shape), leaf(*event_shape))


def build_on_the_support(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
    return td.TransformedDistribution(normal(leaf(*event_shape), leaf(*event_shape)), [link_transform])


class Module(nn.Module):
    event_shape, batch_shape, has_rsample = torch.Size([2]), torch.Size(), True

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def rsample(self, shape: Any = ()) -> Tensor:
        return normal(self.loc, self.log_scale.exp()).rsample(shape)

    sample = rsample

    def log_prob(self, theta: Tensor) -> Tensor:
        return normal(self.loc, self.log_scale.exp()).log_prob(theta)


def warm_start() -> VIPosterior:
    return trained(VIPosterior(log_p, box(), q="gaussian"))


KINDS: dict[str, Callable[[], Any]] = {
    **{name: partial(str, name) for name in FAMILY_NAMES},
    "distribution": lambda: normal(leaf(2), leaf(2)),
    "views": lambda: normal(leaf(2), leaf()),
    "multivariate": lambda: td.MultivariateNormal(leaf(2), scale_tril=torch.eye(2).requires_grad_()),
    "module": Module,
    "callable": lambda: build,
    "callable with link": lambda: build_on_the_support,
    "posterior": warm_start,
}


def through_torch(posterior: VIPosterior, **options: Any) -> VIPosterior:
    buffer = io.BytesIO()
    torch.save(posterior, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False, **options)


WAYS: dict[str, Callable[[VIPosterior], VIPosterior]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda posterior: pickle.loads(pickle.dumps(posterior)),
    "torch": through_torch,
}


def trained(posterior: VIPosterior, **options: Any) -> VIPosterior:
    with seeded(1):
        return posterior.train(X, **{**SHORT, **options})


def made(kind: str, *, fitted: bool = True) -> VIPosterior:
    with seeded(0):
        posterior = VIPosterior(log_p, box(), q=KINDS[kind](), num_transforms=1, hidden_features=4)
    return trained(posterior) if fitted else posterior


def weights(posterior: VIPosterior) -> list[Tensor]:
    return [t.detach().clone() for t in posterior.q.trainable()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def draws(posterior: VIPosterior) -> tuple[Tensor, Tensor]:
    with seeded(2):
        theta = posterior.q.sample((20,))
    return theta, posterior.q.log_prob(theta)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fitted", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_equal_and_independent(kind: str, fitted: bool, way: str) -> None:
    posterior, twin = made(kind, fitted=fitted), made(kind, fitted=fitted)
    duplicate = WAYS[way](posterior)
    assert equal(list(draws(posterior)), list(draws(duplicate)))
    before = weights(posterior)

    trained(duplicate)
    assert equal(weights(posterior), before)  # the copy steps its own weights
    assert not equal(weights(duplicate), before)
    assert not equal(list(draws(duplicate)), list(draws(posterior)))  # and draws by them

    trained(posterior), trained(twin)
    assert equal(weights(posterior), weights(twin))  # being copied left no trace
    assert equal(weights(posterior), weights(duplicate))  # and the copy went on as the original would


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "posterior"])
def test_a_copy_can_start_afresh(kind: str, way: str) -> None:
    posterior = made(kind)
    duplicate = WAYS[way](posterior)
    trained(posterior, retrain_from_scratch=True)
    before = weights(posterior)
    trained(duplicate, retrain_from_scratch=True)
    assert equal(weights(posterior), before)
    assert equal(weights(posterior), weights(duplicate))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["maf", "gaussian", "views", "module"])
def test_a_copys_optimizer_holds_the_copys_weights(kind: str, way: str) -> None:
    posterior = made(kind)
    duplicate = WAYS[way](posterior)

    def stepped(one: VIPosterior) -> set[int]:
        return {id(p) for group in one._state.optimizer.param_groups for p in group["params"]}

    assert stepped(duplicate) == {id(p) for p in duplicate.q.trainable()}
    assert {id(p) for p in duplicate._state.optimizer.state} == stepped(duplicate)
    assert not stepped(duplicate) & stepped(posterior)
    assert duplicate._state.scheduler.optimizer is duplicate._state.optimizer
    assert duplicate._state.family is duplicate.q


@pytest.mark.parametrize("way", WAYS)
def test_all_else_comes_along(way: str) -> None:
    posterior = made("gaussian")
    posterior.report, posterior.map(num_init_samples=20, num_iter=3)
    duplicate = WAYS[way](posterior)
    assert duplicate.report == posterior.report
    assert duplicate.trace == posterior.trace
    assert torch.equal(duplicate.map(num_init_samples=1, num_iter=1), posterior.map())
    assert torch.equal(duplicate.default_x, X)
    assert vars(duplicate).keys() == vars(posterior).keys()
    assert duplicate.potential_fn.prior is duplicate.prior


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_bound_by_a_partial_goes_on(way: str) -> None:
    options = {"optimizer": partial(torch.optim.SGD, momentum=0.9), "learning_rate": 1e-4}
    posterior = trained(made("gaussian", fitted=False), **options)
    duplicate = WAYS[way](posterior)
    again = {**options, "optimizer": partial(torch.optim.SGD, momentum=0.9)}
    trained(posterior, **options), trained(duplicate, **again)
    assert equal(weights(posterior), weights(duplicate))


@pytest.mark.parametrize("way", WAYS)
def test_a_learned_potential_is_copied(way: str) -> None:
    config = LikelihoodConfig(
        flow="maf", num_transforms=1, hidden_features=4, z_score_theta="none", z_score_x="none"
    )
    potential = LikelihoodPotential(NeuralLikelihood(2, (2,), config), box())
    posterior = trained(VIPosterior(potential, q="gaussian"))
    duplicate = WAYS[way](posterior)
    theta = box().sample((5,))
    before = posterior.potential(theta)
    assert torch.equal(duplicate.potential(theta), before)
    for parameter in duplicate.potential_fn.likelihood_estimator.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(posterior.potential(theta), before)


def logistic() -> td.Distribution:
    uniform = td.Uniform(torch.zeros(2), torch.ones(2))
    inverse = [transforms.SigmoidTransform().inv, transforms.AffineTransform(0.5, 2.0)]
    return td.Independent(td.TransformedDistribution(uniform, inverse), 1)


def caching() -> td.Distribution:
    start = td.Normal(torch.zeros(2), torch.ones(2))
    return td.Independent(td.TransformedDistribution(start, transforms.ExpTransform(cache_size=1)), 1)


def mixed() -> td.Distribution:
    return MultipleIndependent([logistic_entry(), td.HalfCauchy(torch.ones(1))])


def logistic_entry() -> td.Distribution:
    uniform = td.Uniform(torch.zeros(1), torch.ones(1))
    return td.TransformedDistribution(uniform, [transforms.SigmoidTransform().inv])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prior", [logistic, caching, mixed])
def test_priors_that_torch_copies_badly(prior: Callable[[], td.Distribution], way: str) -> None:
    posterior = trained(VIPosterior(log_p, prior(), q="gaussian"))
    posterior.map(num_init_samples=20, num_iter=2)  # leaves values with their graphs in caches
    duplicate = WAYS[way](posterior)
    theta, log_q = draws(duplicate)
    assert equal([theta, log_q], list(draws(posterior)))
    assert torch.equal(duplicate.prior.log_prob(theta), posterior.prior.log_prob(theta.clone()))
    assert torch.equal(duplicate.potential_fn.prior.log_prob(theta), posterior.prior.log_prob(theta.clone()))
    trained(posterior), trained(duplicate)
    assert equal(weights(posterior), weights(duplicate))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_both_transforms_survive_alone(way: str) -> None:
    posterior = made("gaussian")
    duplicate: Callable[[Any], Any] = WAYS[way]
    z = torch.tensor([[0.5, -1.0]])
    assert torch.equal(duplicate(posterior.link_transform)(z), posterior.link_transform(z))
    theta = posterior.link_transform(z)
    assert torch.equal(duplicate(posterior.theta_transform).inv(z), theta)
    assert torch.allclose(duplicate(posterior).theta_transform(theta), z, atol=1e-5)


def test_map_location_moves_all_of_it() -> None:
    posterior = made("maf")
    posterior.map(num_init_samples=20, num_iter=2)
    elsewhere = through_torch(posterior, map_location="meta")
    assert elsewhere._device == "meta"
    assert elsewhere.potential_fn.device == "meta"
    assert elsewhere.sample((3,)).device.type == "meta"
    assert elsewhere.default_x.device.type == "meta"


def test_an_unpickled_flow_leaves_torchs_settings_alone(tmp_path: Path) -> None:
    config = LikelihoodConfig(
        flow="maf", num_transforms=1, hidden_features=4, z_score_theta="none", z_score_x="none"
    )
    potential = LikelihoodPotential(NeuralLikelihood(2, (2,), config), box())
    posterior = trained(VIPosterior(potential, q="nsf", num_transforms=1, hidden_features=4))
    (tmp_path / "p.pickle").write_bytes(pickle.dumps(posterior))
    code = """
import pickle, sys, torch
before = torch.distributions.Distribution._validate_args
posterior = pickle.load(open(sys.argv[1], "rb"))
torch.manual_seed(0)
print(torch.distributions.Distribution._validate_args == before, posterior.sample((1,))[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p.pickle")], capture_output=True, text=True, check=True
    )
    with seeded(0):
        assert done.stdout.strip() == f"True {posterior.sample((1,))[0].tolist()}"
