"""Objects of the sbi package, used as they are: priors, transforms, potentials given and learned."""

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),
]  # the peer's own warnings are not ours
pytest.importorskip("sbi")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sbi.inference import FMPE, vector_field_estimator_based_potential
    from sbi.inference.potentials.base_potential import CustomPotentialWrapper
    from sbi.inference.potentials.posterior_based_potential import PosteriorBasedPotential
    from sbi.utils import MultipleIndependent, mcmc_transform, process_prior

    from sbi_cases import AMORTIZED, GOOD, NOISE, POTENTIALS, PRIOR, X_O, Exact, fitted, gaussian, moments
    from visbi import VIPosterior

LEARNED = pytest.mark.parametrize("name", list(POTENTIALS))


def assert_near(posterior: VIPosterior, mean: Tensor, std: Tensor, tolerance: float = 0.03) -> None:
    theta = posterior.sample((4000,))
    assert (theta.mean(0) - mean).abs().max() < tolerance
    assert (theta.std(0) - std).abs().max() < tolerance


def assert_is_the_gaussian(posterior: VIPosterior) -> None:
    assert_near(posterior, X_O[0], torch.full((2,), NOISE))


def assert_whole(posterior: VIPosterior) -> None:
    """Every question is answered, and a copy by pickle answers alike and trains on."""
    theta = posterior.sample((200,))
    assert bool(torch.isfinite(posterior.log_prob(theta)).all())
    best = posterior.map(num_iter=100)
    assert float(posterior.potential(best)) >= float(posterior.potential(theta).max()) - 1e-4
    assert posterior.evaluate(N=2000).status in ("ok", "corrected", "suspect")
    again = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(again.log_prob(theta), posterior.log_prob(theta))
    torch.testing.assert_close(again.potential(theta), posterior.potential(theta))


# priors


@pytest.mark.parametrize("transform", [False, True])
def test_box_prior(transform: bool) -> None:
    posterior = fitted(gaussian, PRIOR, theta_transform=mcmc_transform(PRIOR) if transform else None)
    assert_is_the_gaussian(posterior)
    assert bool(PRIOR.support.check(posterior.sample((1000,))).all())


class Triangle:
    """A user's own prior in torch, for `process_prior` to wrap."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return 2 * (torch.rand(*sample_shape, 2) + torch.rand(*sample_shape, 2) - 1)

    def log_prob(self, theta: Tensor) -> Tensor:
        return ((2 - theta.abs()).clamp_min(0) / 4).log().sum(-1)


class InNumpy:
    """A user's own prior in NumPy: it has no gradient."""

    def sample(self, sample_shape: Any = ()) -> np.ndarray:
        return np.random.uniform(-2, 2, (*sample_shape, 2))

    def log_prob(self, theta: Any) -> np.ndarray:
        return np.full(np.asarray(theta).shape[:-1], -2 * np.log(4.0))


BOUNDS = dict(lower_bound=-2 * torch.ones(2), upper_bound=2 * torch.ones(2))
PRIORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "box": (PRIOR, {}),
    "factors": (
        [Normal(torch.zeros(1), 2 * torch.ones(1)), Uniform(-2 * torch.ones(1), 2 * torch.ones(1))],
        {},
    ),
    "own": (Triangle(), BOUNDS),
    "numpy": (InNumpy(), BOUNDS),
}


@pytest.mark.parametrize("name", list(PRIORS))
def test_priors_out_of_process_prior(name: str) -> None:
    given, bounds = PRIORS[name]
    prior, _, _ = process_prior(given, custom_prior_wrapper_kwargs=bounds) if bounds else process_prior(given)
    no_gradient = dict(warm_up_rounds=0) if name == "numpy" else {}
    torch.manual_seed(0)
    posterior = VIPosterior(gaussian, prior, q="gaussian").train(X_O, **{**GOOD, **no_gradient})
    assert_near(posterior, X_O[0], torch.full((2,), NOISE), 0.04)
    assert bool(prior.support.check(posterior.sample((1000,))).all())


def test_product_prior() -> None:
    factors = [Normal(torch.zeros(1), 2 * torch.ones(1)), Uniform(-2 * torch.ones(1), 2 * torch.ones(1))]
    prior = MultipleIndependent(factors, validate_args=False)

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return gaussian(theta, x_o) + 0.125 * theta[:, 0].square() + prior.log_prob(theta)  # flat again

    assert_is_the_gaussian(fitted(potential, prior))


# potentials


def test_wrapped_callable() -> None:
    theirs = CustomPotentialWrapper(potential_fn=gaussian, prior=PRIOR, x_o=X_O)
    posterior = fitted(theirs)
    assert_is_the_gaussian(posterior)
    assert_whole(posterior)


@LEARNED
@pytest.mark.parametrize("observed", [True, False])
def test_learned_potential(name: str, observed: bool, nets) -> None:
    theirs, transform = POTENTIALS[name](nets[name], PRIOR, X_O if observed else None)
    posterior = fitted(theirs, theta_transform=transform, x=None if observed else X_O)
    ours = lambda theta: posterior.potential(theta, X_O)  # noqa: E731
    assert_near(posterior, *moments(ours), tolerance=0.04)
    assert_whole(posterior)
    assert (
        torch.equal(theirs.return_x_o(), X_O) if observed else theirs.return_x_o() is None
    )  # as they left it


@LEARNED
def test_amortised(name: str, nets, simulations) -> None:
    theirs, _ = POTENTIALS[name](nets[name], PRIOR, None)
    posterior = VIPosterior(theirs).train_amortized(*simulations, **AMORTIZED)
    theta, x = simulations[0][:3], simulations[1][:3]
    assert posterior.sample((5,), x).shape == (5, 3, 2) and posterior.log_prob(theta, x).shape == (3,)
    for x_o in (X_O, -2 * X_O):
        posterior.set_default_x(x_o)
        assert_near(posterior, *moments(posterior.potential), tolerance=0.08)
    assert_whole(posterior)
    assert theirs.return_x_o() is None


def test_flow_matching(simulations, tmp_path, monkeypatch) -> None:
    """A potential whose density is an ODE's: slow, but a potential like any other."""
    monkeypatch.chdir(tmp_path)
    trainer = FMPE(PRIOR, show_progress_bars=False).append_simulations(*(t[:500] for t in simulations))
    theirs, _ = vector_field_estimator_based_potential(trainer.train(max_num_epochs=1), PRIOR, X_O)
    posterior = VIPosterior(theirs, q="gaussian")
    theta = PRIOR.sample((3,))
    torch.testing.assert_close(posterior.potential(theta), theirs(theta), rtol=1e-3, atol=1e-3)


@LEARNED
def test_values_are_theirs(name: str, nets) -> None:
    theirs, _ = POTENTIALS[name](nets[name], PRIOR, X_O)
    trials = X_O + NOISE * torch.randn(4, 2)
    for x, is_iid in ((X_O, True), (trials, True), (trials, False)):
        theta = PRIOR.sample((4,))
        theirs.set_x(x, x_is_iid=is_iid)
        expected = theirs(theta, track_gradients=False).reshape(-1)
        posterior = VIPosterior(theirs)
        torch.testing.assert_close(posterior.potential_fn.evaluate(theta, x, is_iid), expected)


def test_saved_and_loaded(nets, tmp_path) -> None:
    theirs, _ = POTENTIALS["NLE"](nets["NLE"], PRIOR, X_O)
    posterior = fitted(theirs, x=None)
    posterior.save(tmp_path / "posterior.visbi")
    with pytest.raises(ValueError, match=r"prior=\.\.\., potential_fn=\.\.\."):
        VIPosterior.load(tmp_path / "posterior.visbi")
    again = VIPosterior.load(tmp_path / "posterior.visbi", potential_fn=theirs, prior=PRIOR)
    theta = posterior.sample((100,))
    torch.testing.assert_close(again.log_prob(theta), posterior.log_prob(theta))
    torch.testing.assert_close(again.potential(theta), posterior.potential(theta))


# what broke there


def test_regression_13_npe_without_prior(nets) -> None:
    theirs = PosteriorBasedPotential(nets["NPE"], prior=None, x_o=X_O)
    with pytest.raises(ValueError, match="`prior`: expected a Distribution"):
        VIPosterior(theirs)
    late = fitted(theirs, PRIOR)
    assert_near(late, *moments(late.potential), tolerance=0.04)
    assert theirs.prior is None


@pytest.mark.parametrize("trials", [2, 10])
def test_regression_14_iid_npe(trials: int) -> None:
    """Independent trials through the potential of a posterior estimator: the product of their posteriors."""
    x = X_O + NOISE * torch.randn(trials, 2)
    theirs = PosteriorBasedPotential(Exact(), PRIOR)
    posterior = VIPosterior(theirs, q="gaussian").train(x, **{**GOOD, "gamma": 0.98})
    std = torch.full((2,), NOISE / trials**0.5)
    assert_near(posterior, x.mean(0), std, tolerance=0.1 * float(std[0]))


@pytest.mark.parametrize("trials", [7, 64])  # not as many as particles, and as many
def test_defect_04_npe_iid(trials: int) -> None:
    x = X_O + NOISE * torch.randn(trials, 2)
    posterior = VIPosterior(PosteriorBasedPotential(Exact(), PRIOR), q="gaussian")
    posterior.train(x, n_particles=64, init="match", **{**GOOD, "learning_rate": 1e-3})
    std = torch.full((2,), NOISE / trials**0.5)
    assert_near(posterior, x.mean(0), std, tolerance=0.1 * float(std[0]))
    theta = posterior.sample((64,))
    product = sum(gaussian(theta, row) for row in x)
    torch.testing.assert_close(posterior.potential(theta).diff(), product.diff(), rtol=1e-3, atol=1e-2)
    assert_whole(posterior)
