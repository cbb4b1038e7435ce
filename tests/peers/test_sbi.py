"""Objects of the sbi package, used as they are: priors, transforms, potentials given and learned."""

import warnings

import pytest
import torch
from torch import Tensor

from visbi import VIPosterior

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),
]  # the peer's own warnings are not ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sbi")
    from sbi.inference import NLE, NRE, likelihood_estimator_based_potential, ratio_estimator_based_potential
    from sbi.inference.potentials.base_potential import CustomPotentialWrapper
    from sbi.utils import BoxUniform, MultipleIndependent, mcmc_transform

NOISE = 0.3
X_O = torch.tensor([[0.4, -0.2]])


def gaussian(theta: Tensor, x_o: Tensor) -> Tensor:
    """The potential of x ~ N(theta, NOISE^2) under a flat prior, (N, D) -> (N,)."""
    return -0.5 * ((theta - x_o) / NOISE).square().sum(-1)


def fitted(potential, prior, **options) -> VIPosterior:
    torch.manual_seed(0)
    posterior = VIPosterior(potential, prior, q="gaussian", **options)
    return posterior.train(X_O, learning_rate=0.02, max_num_iters=300, show_progress_bar=False)


def assert_is_the_gaussian(posterior: VIPosterior, tolerance: float) -> None:
    theta = posterior.sample((4000,))
    assert (theta.mean(0) - X_O[0]).abs().max() < tolerance
    assert (theta.std(0) - NOISE).abs().max() < tolerance


@pytest.fixture(scope="module")
def simulations() -> tuple[BoxUniform, Tensor, Tensor]:
    torch.manual_seed(1)
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    theta = prior.sample((2000,))
    return prior, theta, theta + NOISE * torch.randn_like(theta)


def test_box_prior_and_callable() -> None:
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    posterior = fitted(gaussian, prior)
    assert_is_the_gaussian(posterior, 0.05)
    assert bool(prior.support.check(posterior.sample((1000,))).all())


def test_box_prior_and_its_transform() -> None:
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    assert_is_the_gaussian(fitted(gaussian, prior, theta_transform=mcmc_transform(prior)), 0.05)


def test_product_prior() -> None:
    factors = [torch.distributions.Normal(torch.zeros(1), 2 * torch.ones(1))]
    factors += [torch.distributions.Uniform(-2 * torch.ones(1), 2 * torch.ones(1))]
    prior = MultipleIndependent(factors, validate_args=False)

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return gaussian(theta, x_o) + 0.125 * theta[:, 0].square() + prior.log_prob(theta)  # flat again

    assert_is_the_gaussian(fitted(potential, prior), 0.05)


def test_wrapped_callable() -> None:
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    theirs = CustomPotentialWrapper(potential_fn=gaussian, prior=prior, x_o=X_O)
    assert_is_the_gaussian(fitted(theirs, None), 0.05)


@pytest.mark.parametrize(
    ("trainer", "potential_of"),
    [(NLE, likelihood_estimator_based_potential), (NRE, ratio_estimator_based_potential)],
)
def test_learned_potential(trainer, potential_of, simulations, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # sbi writes its log where it runs
    prior, theta, x = simulations
    estimator = trainer(prior, show_progress_bars=False).append_simulations(theta, x).train(max_num_epochs=40)
    theirs, transform = potential_of(estimator, prior, X_O)
    before = theirs(theta[:20], track_gradients=False)
    posterior = fitted(theirs, None, theta_transform=transform)
    torch.testing.assert_close(posterior.potential(theta[:20], X_O), before, check_dtype=False)
    assert_is_the_gaussian(posterior, 0.2)
    torch.testing.assert_close(theirs.return_x_o(), X_O)  # their object's state is as they left it
