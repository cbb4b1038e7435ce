r"""Values and expected gradients of every objective against integrals on a grid.

The references know nothing of draws: q is torch's normal with the family's parameters, and an expectation
under q is a sum over a fixed grid, differentiated as it stands. For bounds that are the expectation of a
logarithm of a mean of K weights v, with M(t) = E[exp(-t v)],

    E log (v_1 + ... + v_K) = int_0^inf (exp(-t) - M(t)^K) / t dt.
"""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from visbi.families import family_from, named_family
from visbi.objectives import forward_kl, importance_weighted, renyi, reverse_kl
from visbi.priors import coordinates

LOG_EVIDENCE = 0.7
DIMS = pytest.mark.parametrize("dim", [1, 2])


def normalised_target(dim):
    tril = torch.tensor([[1.0, 0.0], [0.4, 0.9]], dtype=torch.float64)[:dim, :dim]
    return MultivariateNormal(torch.zeros(dim, dtype=torch.float64), scale_tril=tril)


def log_p(theta):
    return normalised_target(theta.shape[-1]).log_prob(theta) + LOG_EVIDENCE


def gaussian_family(dim):
    """q somewhat narrower than the target: its weights are bounded below and have a variance."""
    standard = MultivariateNormal(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    family = named_family("gaussian", coordinates(standard))
    tril = torch.tensor([[0.85, 0.0], [0.2, 0.8]], dtype=torch.float64)[:dim, :dim]
    family.body.set_(torch.tensor([0.3, -0.2], dtype=torch.float64)[:dim], tril)
    return family


def on_grid(family):
    """Nodes' log q, differentiable in the family's parameters, log p, and the volume of a cell."""
    dim, n = family.body.dim, 101
    axis = torch.linspace(-7, 7, n, dtype=torch.float64)
    nodes = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    q = MultivariateNormal(family.body.loc, scale_tril=family.body.scale_tril)
    return q.log_prob(nodes), log_p(nodes), float(axis[1] - axis[0]) ** dim


def exact_reverse_kl(family):
    log_q, log_p, cell = on_grid(family)
    return (log_q.exp() * (log_q - log_p)).sum() * cell


def exact_forward_kl(family):
    log_q, log_p, cell = on_grid(family)
    normalised = log_p - LOG_EVIDENCE
    return (normalised.exp() * (normalised - log_q)).sum() * cell


def mean_log_of_mean(family, k, power):
    log_q, log_p, cell = on_grid(family)
    v = (power * (log_p - log_q)).exp()
    s = torch.linspace(-35, 35, 501, dtype=torch.float64)  # t = exp(s)
    laplace = (log_q.exp() * cell * torch.exp(-s.exp()[:, None] * v)).sum(1)
    integrand = torch.exp(-s.exp()) - laplace**k
    return integrand.sum() * (s[1] - s[0]) - math.log(k)


def exact_importance_weighted(family, k):
    return -mean_log_of_mean(family, k, 1.0)


def exact_renyi(family, n, alpha):
    if alpha == 1.0:
        return exact_reverse_kl(family)
    return -mean_log_of_mean(family, n, 1.0 - alpha) / (1.0 - alpha)


def exact_renyi_of_many(family, alpha):
    log_q, log_p, cell = on_grid(family)
    moment = (log_q + (1.0 - alpha) * (log_p - log_q)).exp().sum() * cell
    return -moment.log() / (1.0 - alpha)


def gradient(value, family):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, family.trainable())])


def estimates(objective, family, repeats):
    """Values (R,) and gradients (R, P) of independent calls."""
    losses, gradients = [], []
    for _ in range(repeats):
        loss = objective(family, log_p)
        assert loss.excluded == 0
        losses.append(loss.value)
        gradients.append(gradient(loss.surrogate, family))
    return torch.tensor(losses, dtype=torch.float64)[:, None], torch.stack(gradients)


def assert_unbiased(objective, exact, family, repeats=20, resolution=0.1):
    values, gradients = estimates(objective, family, repeats)
    value = exact(family)
    want = gradient(value, family)
    for got, wanted, size in ((values, value.detach(), 1.0), (gradients, want, float(want.norm()))):
        error = got.std(0) / math.sqrt(repeats)
        assert bool((error < resolution * size).all())  # sharp enough to tell estimators apart
        assert bool(((got.mean(0) - wanted).abs() < 5 * error + 1e-4 * size).all())


def test_the_laplace_formula_itself():
    family = gaussian_family(1)
    torch.testing.assert_close(mean_log_of_mean(family, 1, 1.0), -exact_reverse_kl(family), rtol=0, atol=1e-6)
    u = torch.randn(200_000, 5, 1, dtype=torch.float64)
    theta = (family.body.loc + family.body.scale_tril * u).detach()
    log_w = log_p(theta) - family.log_prob(theta).detach()
    sampled = (torch.logsumexp(log_w, 1) - math.log(5)).mean()
    torch.testing.assert_close(mean_log_of_mean(family, 5, 1.0).detach(), sampled, rtol=0, atol=3e-3)


@DIMS
@pytest.mark.parametrize("stick_the_landing", [False, True])
def test_reverse_kl(dim, stick_the_landing):
    objective = partial(reverse_kl, n=10_000, stick_the_landing=stick_the_landing)
    assert_unbiased(objective, exact_reverse_kl, gaussian_family(dim))


class Unscored(Normal):
    has_rsample = False


def unscored_family():
    """The one-dimensional family without reparameterisation, its parameters under the same names."""
    loc = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.85], dtype=torch.float64, requires_grad=True)
    standard = MultivariateNormal(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    return family_from(Independent(Unscored(loc, scale), 1), coordinates(standard)), loc, scale


@pytest.mark.parametrize("objective", [reverse_kl, forward_kl])
def test_without_reparameterisation(objective):
    family, loc, scale = unscored_family()
    assert not family.reparameterised
    axis = torch.linspace(-7, 7, 401, dtype=torch.float64)[:, None]
    log_q, target = family.log_prob(axis), log_p(axis)
    cell = float(axis[1] - axis[0])
    if objective is reverse_kl:
        value = (log_q.exp() * (log_q - target)).sum() * cell
    else:
        value = ((target - LOG_EVIDENCE).exp() * (target - LOG_EVIDENCE - log_q)).sum() * cell
    assert_unbiased(partial(objective, n=10_000), lambda _: value, family)
    assert {id(t) for t in family.trainable()} == {id(loc), id(scale)}


@DIMS
def test_forward_kl(dim):
    assert_unbiased(partial(forward_kl, n=20_000), exact_forward_kl, gaussian_family(dim))


@DIMS
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (1, dict(dreg=False)),
        (1, dict(dreg=False, stick_the_landing=True)),
        (1, dict()),
        (5, dict(dreg=False)),
        (5, dict()),
    ],
)
def test_importance_weighted(dim, k, options):
    objective = partial(importance_weighted, n=4000, K=k, **options)
    assert_unbiased(objective, partial(exact_importance_weighted, k=k), gaussian_family(dim))


@pytest.mark.parametrize("options", [dict(dreg=False), dict()])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_renyi_with_few_particles(alpha, options):
    # the bound of groups of three is not that of many: value and gradient are both of the former
    objective = partial(renyi, n=3, alpha=alpha, **options)
    exact = partial(exact_renyi, n=3, alpha=alpha)
    assert_unbiased(objective, exact, gaussian_family(1), repeats=600, resolution=0.2)


@DIMS
@pytest.mark.parametrize("options", [dict(dreg=False), dict(), dict(dreg=False, stick_the_landing=True)])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_renyi_with_many_particles(dim, alpha, options):
    family = gaussian_family(dim)
    values, gradients = estimates(partial(renyi, n=50_000, alpha=alpha, **options), family, 10)
    value = exact_renyi_of_many(family, alpha)
    want = gradient(value, family)
    torch.testing.assert_close(values.mean(), value.detach(), rtol=0, atol=5e-3)
    if "stick_the_landing" not in options:  # which is biased
        assert bool(((gradients.mean(0) - want).abs() < 0.03 * want.norm()).all())
    else:
        assert not torch.allclose(gradients.mean(0), want, rtol=0.1)


@DIMS
def test_sticking_the_landing_alone_is_biased_for_several_draws(dim):
    family = gaussian_family(dim)
    objective = partial(importance_weighted, n=4000, K=5, dreg=False, stick_the_landing=True)
    _, gradients = estimates(objective, family, 10)
    want = gradient(exact_importance_weighted(family, 5), family)
    error = gradients.std(0) / math.sqrt(10)
    assert bool(((gradients.mean(0) - want).abs() > 8 * error).any())


def test_values_at_the_evidence():
    """All bounds are the log-evidence at q = p, and the forward divergence is zero."""
    family = gaussian_family(2)
    family.body.set_(torch.zeros(2), normalised_target(2).scale_tril)
    for objective in (reverse_kl, importance_weighted, renyi):
        assert objective(family, log_p, 32).value == pytest.approx(-LOG_EVIDENCE, abs=1e-9)
    assert forward_kl(family, log_p, 32).value == pytest.approx(0.0, abs=1e-9)
