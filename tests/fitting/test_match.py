"""Batch-and-match on targets whose Gaussian is known."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.fitting.match import match_gaussian
from visbi.fitting.target import Target
from visbi.priors import coordinates


def target_of(log_p, dim):
    standard = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
    return Target(log_p, coordinates(standard))


def ill_conditioned(dim, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
    variances = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
    loc = torch.randn(dim, dtype=torch.float64, generator=generator)
    cov = basis @ variances.diag() @ basis.mT
    return MultivariateNormal(loc, 0.5 * (cov + cov.mT))


def distance(match, exact, index=0):
    """Largest deviation of the mean in standard deviations, and of the covariance in the whitened space."""
    tril = exact.scale_tril
    mean = torch.linalg.solve_triangular(tril, (match.loc[index] - exact.loc)[:, None], upper=False)
    half = torch.linalg.solve_triangular(tril, match.cov[index], upper=False)
    cov = torch.linalg.solve_triangular(tril, half.mT, upper=False)
    return float(mean.abs().max()), float((cov - torch.eye(len(cov))).abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_exact_on_an_ill_conditioned_gaussian(seed):
    torch.manual_seed(seed)
    exact = ill_conditioned(50, 1e3, seed)
    target = target_of(lambda theta: exact.log_prob(theta) + 3.0, 50)
    match = match_gaussian(target)
    mean, cov = distance(match, exact)
    assert match.num_iters <= 6 and mean < 1e-3 and cov < 1e-2
    assert target.n_gradients == match.num_iters * 128
    assert float(match.elbo) == pytest.approx(3.0, abs=0.1)
    assert match.loc.shape == (1, 50) and match.cov.shape == (1, 50, 50)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_exact_in_any_dimension(dim):
    exact = ill_conditioned(dim, 10.0)
    mean, cov = distance(match_gaussian(target_of(exact.log_prob, dim)), exact)
    assert mean < 1e-3 and cov < 1e-2


def test_many_starts_at_once():
    exact = ill_conditioned(3, 30.0)
    loc = 3 * torch.randn(20, 3, dtype=torch.float64)
    cov = 0.09 * torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    match = match_gaussian(target_of(exact.log_prob, 3), loc, cov, batch=64)
    assert match.loc.shape == (20, 3) and match.cov.shape == (20, 3, 3) and match.elbo.shape == (20,)
    assert all(max(distance(match, exact, k)) < 1e-2 for k in range(20))


def test_each_start_finds_the_mode_it_is_near():
    centres = torch.tensor([[-4.0, 0.0], [4.0, 1.0]], dtype=torch.float64)

    def log_p(theta):
        each = -0.5 * ((theta[:, None] - centres) / 0.3).square().sum(-1)
        return torch.logsumexp(each, 1)

    starts = torch.tensor([[-3.7, 0.2], [4.2, 1.0], [-4.1, -0.2], [3.8, 0.9]], dtype=torch.float64)
    cov = 0.04 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2)
    match = match_gaussian(target_of(log_p, 2), starts, cov)
    torch.testing.assert_close(match.loc, centres[[0, 1, 0, 1]], atol=1e-2, rtol=0)
    torch.testing.assert_close(match.cov, (0.09 * torch.eye(2).double()).expand(4, 2, 2), atol=1e-2, rtol=0)
    elbo = torch.full((4,), math.log(2 * math.pi * 0.09), dtype=torch.float64)
    torch.testing.assert_close(match.elbo, elbo, atol=0.1, rtol=0)


def test_a_symmetric_target_that_is_no_gaussian():
    # Student's t with 5 degrees of freedom: the scores' match is between its scale and its variance
    match = match_gaussian(target_of(lambda t: -3.0 * (t[:, 0].square() / 5).log1p(), 1), batch=2000)
    assert abs(float(match.loc)) < 0.1 and 0.8 < float(match.cov) < 5 / 3


def test_updates_that_are_not_finite_keep_the_state():
    target = target_of(lambda theta: torch.where(theta[:, 0] > -50, torch.nan, 0.0) + 0 * theta[:, 0], 2)
    match = match_gaussian(target, max_iters=3)
    assert bool(match.loc.isfinite().all() and match.cov.isfinite().all())
    assert 0 < target.n_nonfinite <= target.n_gradients == 3 * 128


def test_scores_too_large_for_an_update():
    target = target_of(lambda theta: -1e200 * theta.square().sum(-1), 2)
    match = match_gaussian(target, max_iters=4)
    torch.testing.assert_close(match.cov[0], torch.eye(2).double())
    assert match.loc.tolist() == [[0.0, 0.0]] and match.num_iters == 4


def test_one_bad_start_does_not_spoil_the_others():
    exact = ill_conditioned(2, 3.0)

    def log_p(theta):
        return torch.where(theta[:, 0] > 30, -1e200 * theta.square().sum(-1), exact.log_prob(theta))

    loc = torch.tensor([[0.0, 0.0], [60.0, 0.0]], dtype=torch.float64)
    match = match_gaussian(target_of(log_p, 2), loc, torch.eye(2).double().expand(2, 2, 2))
    assert max(distance(match, exact, 0)) < 1e-2
    assert bool(match.loc.isfinite().all() and match.cov.isfinite().all())


def test_one_step_solves_its_equation():
    scale = torch.tensor([1.0, 2.0, 0.5]).double()
    target = target_of(lambda theta: -(theta / scale).square().square().sum(-1) + theta[:, 0], 3)
    mu = torch.tensor([0.3, -0.5, 0.1]).double()
    root = torch.tensor([[0.8, 0.0, 0.0], [0.3, 1.1, 0.0], [0.0, -0.2, 0.6]]).double()
    torch.manual_seed(1)
    match = match_gaussian(target, mu[None], (root @ root.mT)[None], batch=40, max_iters=1)
    torch.manual_seed(1)
    z = mu + torch.randn(1, 40, 3, dtype=torch.float64)[0] @ root.mT
    g = target.value_and_gradient(z)[1]
    lam = 40 * 3.0
    share = lam / (1 + lam)
    zbar, gbar = z.mean(0), g.mean(0)
    u = lam * torch.cov(g.mT, correction=0) + share * torch.outer(gbar, gbar)
    v = root @ root.mT + lam * torch.cov(z.mT, correction=0) + share * torch.outer(mu - zbar, mu - zbar)
    new = match.cov[0]
    torch.testing.assert_close(new @ u @ new + new, v, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(match.loc[0], mu / (1 + lam) + share * (new @ gbar + zbar))


def test_iterations_and_batch_are_as_asked():
    target = target_of(lambda theta: -theta.square().square().sum(-1), 3)
    match = match_gaussian(target, batch=17, max_iters=2)
    assert match.num_iters == 2 and target.n_gradients == 34


def test_scales_that_differ_by_1e10() -> None:
    """From the right covariance, or one twice as wide, to the right one: no eigh resolves their squares."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-10, 0, 40).double()
    turn = torch.eye(40).double() + 0.1 * torch.randn(40, 40, generator=generator).double().tril(-1)
    root = scales[torch.randperm(40, generator=generator), None] * turn

    def log_p(z: torch.Tensor) -> torch.Tensor:
        return -0.5 * torch.linalg.solve_triangular(root, z.T, upper=False).square().sum(0)

    start = torch.stack([root @ root.T, 4 * root @ root.T])
    match = match_gaussian(target_of(log_p, 40), torch.zeros(2, 40).double(), start)
    known = scales.log().sum() + 20 * math.log(2 * math.pi)
    torch.testing.assert_close(match.elbo, known.expand(2), rtol=0, atol=1e-3)
