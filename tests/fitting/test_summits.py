"""Quasi-Newton ascents: where they end, what they learn of the curvature, and what they save."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from ascent_cases import stretched, target_of
from visbi.fitting.budget import Budget, BudgetReached
from visbi.fitting.summits import summits
from visbi.fitting.target import ManyTargets
from visbi.priors import coordinates


@pytest.mark.parametrize("dim", [1, 2, 10, 40])
def test_the_top_of_a_gaussian_and_its_covariance(dim: int) -> None:
    mean, cov = stretched(dim)
    precision = torch.linalg.inv(cov)
    target = target_of(lambda z: -0.5 * ((z - mean) @ precision * (z - mean)).sum(-1), dim)
    found = summits(target, torch.randn(1, 3, dim).double())
    assert float(found.ell.abs().max()) < 0.01
    sd = cov.diagonal().sqrt()
    assert float(((found.z - mean) / sd).abs().max()) < 0.2
    best = found.cov[0, 0]
    torch.testing.assert_close(best, best.T)
    off = torch.linalg.eigvals(torch.linalg.solve(cov, best)).real.log().abs()
    assert float((off < math.log(1.5)).double().mean()) > 0.9  # all but directions that it hardly went


def test_each_goes_to_the_top_of_its_own_slope() -> None:
    centre = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def log_p(z: Tensor) -> Tensor:
        return torch.logaddexp(*(-200 * (z - side * centre).square().sum(-1) for side in (1, -1)))

    found = summits(target_of(log_p, 3), torch.stack([0.8 * centre, -0.7 * centre, 1.4 * centre])[None])
    torch.testing.assert_close(found.z[0], torch.stack([centre, -centre, centre]), atol=1e-3, rtol=0)


def test_along_a_narrow_bend() -> None:
    """Down the valley of Rosenbrock's function, a thousand times as long as it is wide."""

    def log_p(z: Tensor) -> Tensor:
        x, y = (3 * z).unbind(-1)
        return -1e4 * (y - x.square()).square() - (1 - x).square()

    starts = torch.tensor([[[-1.0, 1.0], [-0.5, -0.7], [0.0, 2.0]]], dtype=torch.float64)
    found = summits(target_of(log_p, 2), starts)
    assert float(found.ell.min()) > -1e-2
    torch.testing.assert_close(3 * found.z, torch.ones(1, 3, 2).double(), atol=0.05, rtol=0)


def test_posteriors_side_by_side() -> None:
    prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    centres = torch.tensor([[0.5, 0.0], [0.0, -1.0]], dtype=torch.float64)

    def log_p(theta: Tensor, which: Tensor) -> Tensor:
        return -50 * (theta - centres[which][:, None]).square().sum(-1)

    found = summits(ManyTargets(log_p, coordinates(prior), 2), torch.zeros(2, 4, 2).double())
    torch.testing.assert_close(found.z, centres[:, None].expand(2, 4, 2), atol=1e-3, rtol=0)


def test_starts_of_no_use_stay_and_say_so() -> None:
    def log_p(z: Tensor) -> Tensor:
        return torch.where(z[:, 0] < 0, -torch.inf, -50 * (z - 1).square().sum(-1))

    starts = torch.tensor([[[0.5, 0.0], [-0.5, 0.0]]], dtype=torch.float64)
    found = summits(target_of(log_p, 2), starts)
    torch.testing.assert_close(found.z[0, 0], torch.ones(2).double(), atol=1e-3, rtol=0)
    assert torch.equal(found.z[0, 1], starts[0, 1]) and float(found.ell[0, 1]) < -1e20
    assert bool(found.cov.isfinite().all())


def test_a_budget_ends_it() -> None:
    target = target_of(lambda z: -0.5e6 * z.square().sum(-1), 2, Budget(50, None))
    with pytest.raises(BudgetReached):
        summits(target, torch.ones(1, 4, 2).double())


def raw_regression(dim: int) -> Callable[[Tensor], Tensor]:
    """A logistic regression on predictors of scales from .1 to 1000, coefficients N(0, 1000^2), in z."""
    torch.manual_seed(dim)
    scales = torch.logspace(-1, 3, dim - 1).double()
    x = torch.cat([torch.ones(200, 1).double(), scales * (1 + 0.3 * torch.randn(200, dim - 1).double())], 1)
    logit = (x[:, 1:] / scales - 1) @ torch.linspace(-3, 3, dim - 1).double()
    y = (torch.sigmoid(logit) > torch.rand(200).double()).double()

    def log_p(z: Tensor) -> Tensor:
        eta = 1000 * z @ x.T
        return (y * eta - torch.nn.functional.softplus(eta)).sum(-1) - 0.5 * z.square().sum(-1)

    return log_p


def test_a_regression_on_raw_predictors_takes_few_steps() -> None:
    """From the identity three of six ascents were there after 400 steps, and the best one after 160."""
    log_p = raw_regression(10)
    target = target_of(log_p, 10)
    found = summits(target, 0.3 * torch.randn(1, 6, 10).double())
    assert float(found.ell.amax() - found.ell.amin()) < 0.1
    assert target.n_values < 6 * 8 * 100
    hessian = torch.autograd.functional.hessian(lambda z: -log_p(z[None])[0], found.z[0, 0])
    off = torch.linalg.eigvals(hessian @ found.cov[0, 0]).real.log().abs()
    assert float((off < math.log(2.0)).double().mean()) > 0.7


def test_ascents_that_have_arrived_cost_nothing_more() -> None:
    centre, bend = torch.tensor([0.5, -0.5]).double(), torch.tensor([[[-1.0, 1.0]]]).double()

    def log_p(z: Tensor) -> Tensor:
        x, y = (3 * z).unbind(-1)
        return -1e4 * (y - x.square()).square() - (1 - x).square()

    alone = target_of(log_p, 2)
    summits(alone, bend)
    both = target_of(lambda z: torch.where(z[:, 0] < 5, log_p(z), -50 * (z - 9 - centre).square().sum(-1)), 2)
    found = summits(both, torch.cat([bend, torch.full((1, 7, 2), 9.0).double()], 1))
    torch.testing.assert_close(found.z[0, 1:], (9 + centre).expand(7, 2), atol=0.01, rtol=0)
    assert both.n_values < 2 * alone.n_values + 7 * 8 * 16


def test_kinks_do_not_keep_an_ascent_going() -> None:
    """Every few steps one crosses a kink and gains a little: they went on for hundreds of steps."""
    scales = torch.logspace(-3.5, -0.5, 10).double()
    target = target_of(lambda z: -(z.abs() / scales).sum(-1), 10)
    found = summits(target, torch.randn(1, 8, 10).double())
    assert target.n_values < 8 * 8 * 100
    assert float(found.ell.max()) > -5.0  # draws are ten nats below the top


def test_slopes_that_say_nothing() -> None:
    """Flat where the prior is: the metric is the identity."""
    found = summits(target_of(lambda z: 0.0 * z.sum(-1), 3), torch.zeros(1, 2, 3).double())
    assert bool(found.cov.isfinite().all()) and bool((found.z == 0).all())
