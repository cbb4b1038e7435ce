"""Chains that walk outwards from where q ends."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.families.gaussians import Mixture
from visbi.fitting.budget import Budget, BudgetReached
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.frontier import outermost, walk
from visbi.fitting.mixture import defended
from visbi.fitting.pool import Pool
from visbi.fitting.target import Target
from visbi.fitting.uphill import too_low
from visbi.fitting.weighing import LOW
from visbi.fitting.witnesses import missing_at_ends
from visbi.priors import coordinates

PRIOR = Independent(Normal(torch.zeros(2).double(), 3.0), 1)


def thin_tail(theta: Tensor) -> Tensor:
    """x exponential, y normal with a standard deviation that falls with x, from .5: a horn; evidence 1."""
    x, y = theta[:, 0], theta[:, 1]
    sd = 0.5 * (-x).exp()
    return torch.where(x > 0, -x, -torch.inf) + Normal(0.0, sd, validate_args=False).log_prob(y)


def group_of(budget: Budget | None = None) -> Group:
    target = Target(thin_tail, coordinates(PRIOR), budget)
    return Group(target, [Record()], ALONE, Pool(target))


def short_q(ends: float) -> Mixture:
    """All of the horn up to x = ends, as narrow Gaussians in a row."""
    x = torch.linspace(0.03, ends, 60).double()
    sd = 0.5 * (-x).exp()
    loc = torch.stack([x, torch.zeros_like(x)], -1)[None] / 3
    width = torch.stack([torch.full_like(x, float(x[1] - x[0])), sd], -1)[None] / 3
    return Mixture.of(-x[None], loc, torch.diag_embed(width.square()))


def test_starts_are_the_outermost_along_axes_and_across() -> None:
    """Of a line that runs aslant, its ends; each is there with the scales next to it."""
    torch.manual_seed(0)
    z = torch.linspace(-1, 1, 1001).double()[:, None] * torch.ones(2).double() + 0.001 * torch.randn(1001, 2)
    weights = torch.full((1, 1001), 1 / 1001).double()
    starts, cov = outermost(z[None], weights, 32)
    assert starts.shape == (1, 32, 2) and cov.shape == (1, 32, 2, 2)
    ends = starts[0].mean(-1).abs()
    assert float((ends > 0.98).double().mean()) >= 0.7  # the other axis is across the line
    size = torch.linalg.eigvalsh(cov[0])
    assert bool((size[:, 0] < 0.2 * size[:, 1]).all()) and float(size.max()) < 0.01
    weights[0, 900:] = 0.0
    assert float(outermost(z[None], weights, 32)[0].max()) < 0.82  # what does not count is not there


def test_walks_leave_the_posterior_as_it_is() -> None:
    torch.manual_seed(1)
    prior = Independent(Normal(torch.zeros(3).double(), 1.0), 1)
    z = torch.randn(1, 2000, 3).double()
    cov = (0.2 + torch.rand(1, 2000, 3).double()).diag_embed()  # of each chain's own, whatever they are
    seen, ell = walk(Target(prior.log_prob, coordinates(prior)), z, cov, 6)
    assert seen.shape == (1, 12_000, 3) and ell.shape == (1, 12_000)
    torch.testing.assert_close(ell[0], prior.log_prob(seen[0]))
    last = seen[0, -2000:]
    assert float((last - z[0]).square().mean().sqrt()) > 0.5
    assert float(last.mean(0).abs().max()) < 0.08 and float((last.std(0) - 1).abs().max()) < 0.06


@pytest.mark.parametrize(("ends", "lacks"), [(1.0, True), (8.0, False)])
def test_a_tail_that_goes_on_is_found(ends: float, lacks: bool) -> None:
    """exp(-1) of the mass is beyond 1, and none is beyond 8."""
    torch.manual_seed(2)
    now = group_of()
    trial = now.pool.draw(defended(short_q(ends)), ALONE.draws)
    share = float(missing_at_ends(now, defended(short_q(ends)), trial))
    assert (share > 0.02) == lacks


def test_it_is_not_asked_without_a_tail_or_a_budget() -> None:
    torch.manual_seed(3)
    now = group_of()
    q = defended(short_q(1.0))
    trial = now.pool.draw(q, ALONE.draws)
    before = now.target.n_gradients
    even = type(trial)(trial.z, trial.ell, trial.log_q, trial.share, torch.zeros(1).double())
    assert float(missing_at_ends(now, q, even)) == 0.0 and now.target.n_gradients == before
    now.target.budget = Budget(1000)
    assert float(missing_at_ends(now, q, trial)) == 0.0
    with pytest.raises(BudgetReached):
        walk(group_of(Budget(100)).target, trial.z[:, :64], torch.eye(2).double().expand(1, 64, 2, 2), 8)


def test_chains_from_the_end_walk_where_q_has_nothing() -> None:
    torch.manual_seed(4)
    now = group_of()
    q = defended(short_q(1.0))
    trial = now.pool.draw(q, 4096)
    even = torch.softmax(trial.log_w, 1)
    seen, ell = walk(now.target, *outermost(trial.z, even, 64), 8)
    low = too_low(q, seen, ell - trial.log_z[:, None] - LOW)
    assert int(low.sum()) > 20 and float((3 * seen[low][:, 0]).min()) > 0.8
