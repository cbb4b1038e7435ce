"""Quasi-Newton ascents: where they end, what they learn of the curvature, and what they save."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.fitting.budget import Budget, BudgetReached
from visbi.fitting.summits import summits
from visbi.fitting.target import ManyTargets, Target
from visbi.priors import coordinates


def target_of(log_p: Callable[[Tensor], Tensor], dim: int, budget: Budget | None = None) -> Target:
    """ell(z) of a log-density given in z itself: the prior is N(0, I)."""
    prior = Independent(Normal(torch.zeros(dim).double(), 1.0), 1)
    return Target(log_p, coordinates(prior), *([] if budget is None else [budget]))


def stretched(dim: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a rotated Gaussian whose scales run from 1e-4 to 1."""
    torch.manual_seed(dim)
    turn = torch.linalg.qr(torch.randn(dim, dim).double()).Q
    return 0.3 * torch.randn(dim).double(), turn @ torch.logspace(-8, 0, dim).double().diag() @ turn.T


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
