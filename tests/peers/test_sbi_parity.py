"""The names, signatures and numbers that visbi shares with the sbi package."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, HalfNormal, Normal, Uniform

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
pytest.importorskip("sbi")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sbi.inference as their_inference
    import sbi.utils as their_utils
    from sbi.inference.posteriors.posterior_parameters import VIPosteriorParameters as TheirParameters
    from sbi.inference.potentials.base_potential import BasePotential as TheirBasePotential
    from sbi.neural_nets.factory import ZukoFlowType as TheirFlowType

    import visbi
    from sbi_cases import NOISE, POTENTIALS, PRIOR, X_O, Exact, gaussian
    from visbi import VIPosterior


def parameters(function: Any) -> dict[str, tuple[Any, Any]]:
    """Kind and default by name, in order."""
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


# signatures

METHODS = [n for n, _ in inspect.getmembers(their_inference.VIPosterior, callable) if not n.startswith("_")]
OURS_ONLY = {  # keyword-only
    "train_amortized": ["seed", "embedding_net", "objective"],
    "sample": ["correct"],
    "sample_batched": ["correct"],
    "log_prob": ["normalized"],
}


def test_every_public_method_is_there() -> None:
    missing = [name for name in dir(their_inference.VIPosterior) if not name.startswith("_")]
    assert [name for name in missing if not hasattr(VIPosterior, name)] == []
    assert {"train", "train_amortized", "sample", "sample_batched", "log_prob", "map", "evaluate"} <= set(
        METHODS
    )


@pytest.mark.parametrize("name", ["__init__", *METHODS])
def test_methods_have_their_signature(name: str) -> None:
    ours = parameters(getattr(VIPosterior, name))
    theirs = parameters(getattr(their_inference.VIPosterior, name))
    extra = list(ours)[len(theirs) :]
    assert list(ours.items())[: len(theirs)] == list(theirs.items())
    assert extra == OURS_ONLY.get(name, [])
    assert all(ours[n][0] is inspect.Parameter.KEYWORD_ONLY for n in extra)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("likelihood_estimator_based_potential", their_inference),
        ("ratio_estimator_based_potential", their_inference),
        ("BoxUniform", their_utils),
        ("MultipleIndependent", their_utils),
    ],
)
def test_functions_and_priors_have_their_signature(name: str, module: Any) -> None:
    assert parameters(getattr(visbi, name)) == parameters(getattr(module, name))


def test_what_differs_in_the_other_signatures() -> None:
    theirs, ours = parameters(their_utils.mcmc_transform), parameters(visbi.mcmc_transform)
    assert theirs.pop("kwargs")[0] is inspect.Parameter.VAR_KEYWORD  # unknown keywords are errors here
    assert ours == theirs
    theirs, ours = parameters(TheirBasePotential.__init__), parameters(visbi.BasePotential.__init__)
    assert ours.pop("x_is_iid")[1] is True
    assert list(ours) == list(theirs) and ours["prior"][1] is None
    theirs, ours = parameters(TheirParameters), parameters(visbi.VIPosteriorParameters)
    assert {n: d for n, (_, d) in ours.items()} == {n: d for n, (_, d) in theirs.items()}
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind, _ in ours.values())
    assert {f.name for f in TheirFlowType} - {f.name for f in visbi.ZukoFlowType} == {"BPF", "NCSF"}


# priors and transforms

CORNERS = torch.tensor([-2.0, 0.5]), torch.tensor([1.0, 3.0])


def factors() -> list[Any]:
    one = torch.ones(1)
    return [Uniform(-one, 2 * one), Normal(0 * one, 2 * one), Gamma(2 * one, one), HalfNormal(one)]


PAIRS = {
    "box": (visbi.BoxUniform(*CORNERS), their_utils.BoxUniform(*CORNERS)),
    "factors": (visbi.MultipleIndependent(factors()), their_utils.MultipleIndependent(factors())),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_priors_agree(name: str) -> None:
    ours, theirs = PAIRS[name]
    torch.manual_seed(3)
    theta = ours.sample((50,))
    torch.manual_seed(3)
    assert torch.equal(theta, theirs.sample((50,)))
    assert ours.event_shape == theirs.event_shape and ours.batch_shape == theirs.batch_shape
    torch.testing.assert_close(ours.log_prob(theta), theirs.log_prob(theta))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    assert torch.equal(ours.support.check(theta), theirs.support.check(theta))


def test_transform_of_an_unbounded_prior_is_theirs() -> None:
    prior = torch.distributions.MultivariateNormal(torch.ones(2), torch.diag(torch.tensor([0.25, 9.0])))
    theta = prior.sample((20,))
    # theirs maps z to theta or theta to z as torch's `inv` has it; ours maps theta to z
    ours, theirs = visbi.mcmc_transform(prior), their_utils.mcmc_transform(prior)
    torch.testing.assert_close(ours(theta), theirs(theta))
    torch.testing.assert_close(ours.inv(ours(theta)), theta)
    z = theirs(theta)
    torch.testing.assert_close(ours.log_abs_det_jacobian(theta, z), theirs.log_abs_det_jacobian(theta, z))


@pytest.mark.parametrize("name", list(PAIRS))
def test_plain_transform_of_a_bounded_prior_is_theirs(name: str) -> None:
    """Without z-scoring: logits and logarithms. (Where they do not bound, theirs z-scores nothing either.)"""
    ours_prior, theirs_prior = PAIRS[name]
    theta = ours_prior.sample((20,))
    ours = visbi.mcmc_transform(ours_prior, num_prior_samples_for_zscoring=None)
    theirs = their_utils.mcmc_transform(theirs_prior)
    torch.testing.assert_close(ours(theta), theirs(theta), rtol=1e-4, atol=1e-4)
    z = theirs(theta)
    torch.testing.assert_close(
        ours.log_abs_det_jacobian(theta, z), theirs.log_abs_det_jacobian(theta, z), rtol=1e-4, atol=1e-4
    )


def test_default_transform_of_a_box_is_the_normal_cdf() -> None:
    ours, theirs = (m.mcmc_transform(PRIOR) for m in (visbi, their_utils))
    theta = torch.tensor([[1.5, -1.0]])
    torch.testing.assert_close(ours(theta), Normal(0.0, 1.0).icdf((theta + 2) / 4))
    torch.testing.assert_close(theirs(theta), torch.logit((theta + 2) / 4))


# potentials

OURS = {
    "NLE": visbi.likelihood_estimator_based_potential,
    "NRE": visbi.ratio_estimator_based_potential,
}
TRIALS = X_O + NOISE * torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 0.0]])


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("x", [X_O, TRIALS], ids=["one", "trials"])
def test_potentials_agree_for_the_same_estimator(name: str, x: Tensor, nets) -> None:
    (ours, _), (theirs, _) = (make(nets[name], PRIOR, x) for make in (OURS[name], POTENTIALS[name]))
    theta = PRIOR.sample((30,)).requires_grad_()
    value, expected = ours(theta), theirs(theta)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(v.sum(), theta)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients)
    assert not ours(theta, track_gradients=False).requires_grad
    assert torch.equal(ours.x_o, theirs.x_o) and torch.equal(ours.return_x_o(), theirs.return_x_o())


@pytest.mark.parametrize("name", list(OURS))
def test_paired_potentials_agree(name: str, nets) -> None:
    (ours, _), (theirs, _) = (make(nets[name], PRIOR, None) for make in (OURS[name], POTENTIALS[name]))
    theta = PRIOR.sample((3,))
    ours.set_x(TRIALS, x_is_iid=False)
    theirs.set_x(TRIALS, x_is_iid=False)
    torch.testing.assert_close(ours(theta), theirs(theta).reshape(-1))


def test_exact_likelihood() -> None:
    potential, _ = visbi.likelihood_estimator_based_potential(Exact(), PRIOR, TRIALS)
    theta = PRIOR.sample((10,))
    expected = sum(gaussian(theta, x) for x in TRIALS)
    torch.testing.assert_close(potential(theta).diff(), expected.diff())


def test_disabled_transform_is_the_identity(nets) -> None:
    for make in (OURS["NLE"], POTENTIALS["NLE"]):
        _, transform = make(nets["NLE"], PRIOR, X_O, enable_transform=False)
        assert torch.equal(transform(X_O), X_O)


# densities


def test_density_of_a_gaussian_is_theirs() -> None:
    """The same Gaussian through the same link in both packages."""
    transform = their_utils.mcmc_transform(PRIOR)
    ours = VIPosterior(gaussian, PRIOR, q="gaussian", theta_transform=transform, z_score_theta="none")
    theirs = their_inference.VIPosterior(
        gaussian, PRIOR, q="gaussian", theta_transform=transform, z_score_theta="none"
    )
    still = dict(max_num_iters=1, learning_rate=1e-12, show_progress_bar=False, quality_control=False)
    ours.train(X_O, warm_up_rounds=0, **still)
    theirs.train(X_O, warm_up_rounds=0, **still)
    theta = PRIOR.sample((20,))
    for posterior in (ours, theirs):  # both start as N(0, I) in the transformed space
        base = torch.distributions.Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        z = transform(theta)
        expected = base.log_prob(z) + transform.log_abs_det_jacobian(theta, z)
        torch.testing.assert_close(posterior.log_prob(theta, X_O), expected.detach(), rtol=1e-3, atol=1e-3)
