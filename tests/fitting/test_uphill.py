"""Accusers that are led uphill: tails of what q has, or slopes of what it lacks."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.families.gaussians import Mixture
from visbi.fitting.budget import Budget
from visbi.fitting.ladder import climb
from visbi.fitting.target import Target
from visbi.fitting.uphill import too_low, tops, uphill
from visbi.priors import coordinates

WIDE = Independent(Normal(torch.zeros(2).double(), 1.0), 1)


def mixture(weights: list[float], centres: list[list[float]], sds: list[float]) -> Mixture:
    loc = torch.tensor(centres, dtype=torch.float64)[None]
    cov = torch.tensor(sds, dtype=torch.float64).square()[None, :, None, None] * torch.eye(2).double()
    return Mixture.of(torch.tensor(weights, dtype=torch.float64)[None].log(), loc, cov)


HAYSTACK, NEEDLE = [-0.4, -0.4], [0.4, 0.4]
BOTH = mixture([0.7, 0.3], [HAYSTACK, NEEDLE], [0.2, 0.004])
HAYSTACK_ALONE = mixture([1.0], [HAYSTACK], [0.2])
NO_TIME = torch.zeros(1).double()


def target_of(q: Mixture, **limits: int) -> Target:
    return Target(lambda theta: q.log_prob(theta[None])[0], coordinates(WIDE), Budget(**limits))


@pytest.mark.parametrize("bound", [-12.0, -3.0, 1.0, 6.0])
def test_too_low_is_what_the_density_says(bound: float):
    """Where the largest component does not acquit, all of them do: three equal ones are 1.1 nats higher."""
    q = mixture([0.3, 0.3, 0.3, 0.1], [HAYSTACK, HAYSTACK, HAYSTACK, NEEDLE], [0.2, 0.2, 0.2, 0.004])
    z = torch.cat([q.sample(300), torch.randn(1, 300, 2).double()], 1)
    least = bound + torch.randn(1, 600).double()
    least[:, :5] = -torch.inf
    low = too_low(q, z, least)
    assert torch.equal(low, q.log_prob(z) < least) and 0 < int(low.sum()) < 600
    assert bool((q.at_least(z) <= q.log_prob(z)).all())
    assert bool((q.log_prob(z) <= q.at_least(z) + math.log(4) + 1e-12).all())


def test_a_line_search_goes_up_and_never_down():
    target = target_of(BOTH)
    z = torch.randn(1, 200, 2).double()
    z[:, 0] = torch.tensor(NEEDLE)  # nothing is higher
    before = target.value(z)
    after_z, after = uphill(target, z)
    assert bool((after >= before).all())
    assert torch.equal(after, target.value(after_z))
    assert torch.equal(after_z[:, 0], z[:, 0])
    assert float((after > before).double().mean()) > 0.95


def test_the_slope_of_a_needle_leads_to_it():
    slope = torch.tensor([NEEDLE]).double() + torch.tensor([[0.010, -0.004], [0.003, 0.009]]).double()
    z = torch.cat([slope, torch.randn(300, 2).double()])[None]
    target = target_of(BOTH)
    found, there = tops(target, z, target.value(z), HAYSTACK_ALONE, NO_TIME, by=3.0)
    assert there.tolist() == [True]
    nearest = (found.loc[0] - torch.tensor(NEEDLE)).norm(dim=-1).argmin()
    assert found.loc[0, nearest].tolist() == pytest.approx(NEEDLE, abs=1e-4)
    assert found.cov[0, nearest].diagonal().sqrt().tolist() == pytest.approx([0.004] * 2, rel=0.1)


def test_a_tail_is_no_top():
    """A heavy tail accuses a Gaussian by many nats, and leads back to where it has its mass."""

    def student(theta: Tensor) -> Tensor:
        return -2.5 * torch.log1p(theta.square().sum(-1) / 0.04 / 3)

    target = Target(student, coordinates(WIDE))
    q = mixture([1.0], [[0.0, 0.0]], [0.25])
    z = torch.randn(1, 500, 2).double()
    ell, log_z = target.value(z), torch.tensor([math.log(2 * math.pi * 0.04)]).double()
    accused = ell - q.log_prob(z) - log_z[:, None] > 3.0
    assert int(accused.sum()) > 100
    assert not bool(tops(target, z, ell, q, log_z, by=3.0)[1].any())


def test_nothing_accuses_a_q_that_is_right():
    target = target_of(BOTH)
    z = torch.randn(1, 500, 2).double()
    used = target.n_gradients
    assert not bool(tops(target, z, target.value(z), BOTH, NO_TIME, by=3.0)[1].any())
    assert target.n_gradients == used


@pytest.mark.parametrize("seed", range(3))
def test_the_ladder_finds_a_needle(seed: int):
    """Its slope holds about 3e-4 of the prior: ten draws of the search, one of the usual 4096."""
    torch.manual_seed(seed)
    report = climb(target_of(BOTH)).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(0.0, abs=0.02)
    assert report.n_searched == 28_672


def test_a_small_budget_is_not_spent_on_the_search():
    torch.manual_seed(0)
    report = climb(target_of(HAYSTACK_ALONE, max_evals=100_000)).report
    assert report.status in ("ok", "corrected") and report.stop_reason == ""
    assert report.n_searched < 4096
