"""Where the next round simulates: shares, the region, and the prior's own density inside it."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi import BoxUniform, VIPosterior
from visbi.core.random import seeded
from visbi.rounds import RoundProposal, TruncatedPrior

BOX = BoxUniform(-10 * torch.ones(2), 10 * torch.ones(2))


def two_modes(theta: Tensor, x_o: Tensor) -> Tensor:
    return torch.logaddexp(
        -0.5 * ((theta - 4) / 0.5).square().sum(-1), -0.5 * ((theta + 4) / 0.5).square().sum(-1)
    )


def fitted(potential, prior) -> VIPosterior:
    return VIPosterior(potential, prior, q="auto").train(torch.zeros(1, 2), seed=0, show_progress_bar=False)


@pytest.fixture(scope="module")
def bimodal() -> VIPosterior:
    return fitted(two_modes, BOX)


def draws(proposal, n: int, seed: int = 0) -> Tensor:
    with seeded(seed):
        return proposal.sample((n,))


def test_the_truncated_prior_is_the_prior_in_the_region(bimodal: VIPosterior) -> None:
    with seeded(1):
        truncated = TruncatedPrior(bimodal)
    theta = draws(truncated, 4000).double()
    assert bool(truncated.contains(theta.float()).all())
    # uniform over both discs of radius r: half in each, and E d^2 = r^2 / 2 from its centre
    right = theta.sum(-1) > 0
    assert float(right.double().mean()) == pytest.approx(0.5, abs=0.05)
    distance = (theta - torch.where(right, 4.0, -4.0)[:, None]).norm(dim=-1)
    radius = float(distance.max())
    assert 0.5 * math.sqrt(-2 * math.log(1e-3)) < radius < 0.5 * math.sqrt(-2 * math.log(1e-6))
    assert float(distance.square().mean()) == pytest.approx(radius**2 / 2, rel=0.12)


def test_a_prior_that_is_not_flat_keeps_its_slope() -> None:
    prior = Independent(Normal(torch.zeros(2), torch.tensor([2.0, 2.0])), 1)

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:  # of the posterior: N(2, .5^2)
        return -0.5 * ((theta - 2) / 0.5).square().sum(-1)

    with seeded(1):
        truncated = TruncatedPrior(fitted(potential, prior))
    theta = draws(truncated, 8000).double()
    with seeded(2):
        exact = prior.sample((2_000_000,))
    exact = exact[truncated.contains(exact)].double()
    assert len(exact) > 20_000
    assert torch.allclose(theta.mean(0), exact.mean(0), atol=0.06)  # its sd is .9, and 8000 draws
    assert torch.allclose(theta.std(0), exact.std(0), rtol=0.05)


def test_a_region_that_is_a_millionth_of_the_prior() -> None:
    wide = BoxUniform(-1000 * torch.ones(2), 1000 * torch.ones(2))

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return -0.5 * theta.square().sum(-1)

    with seeded(1):
        truncated = TruncatedPrior(fitted(potential, wide))
    theta = draws(truncated, 1000)
    assert bool(truncated.contains(theta).all()) and len(theta.unique(dim=0)) > 950
    axis = torch.linspace(-8, 8, 401)
    grid = torch.cartesian_prod(axis, axis)
    exact = grid[truncated.contains(grid)].square().sum(-1).double()
    assert 3.5 < float(exact.max().sqrt()) < 6
    assert float(theta.double().square().sum(-1).mean()) == pytest.approx(float(exact.mean()), rel=0.06)


def test_outside_sets_the_region(bimodal: VIPosterior) -> None:
    with seeded(1):
        small, large = (TruncatedPrior(bimodal, outside=share) for share in (0.5, 1e-3))
    theta = draws(bimodal, 4000)
    assert float(small.contains(theta).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(large.contains(theta).double().mean()) > 0.99


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_shares_of_the_mixture(bimodal: VIPosterior, share: float) -> None:
    theta = draws(RoundProposal(bimodal, prior_share=share), 4000)
    right = theta.sum(-1) > 0
    distance = ((theta - torch.where(right, 4.0, -4.0)[:, None]) / 0.5).norm(dim=-1)
    # beyond two sds lie e^-2 = .14 of the posterior, and of the region all but 4 / r^2, about .8; r^2 / 2 is
    # the highest of 10,000 exponential variables, 9.2 +- 1.3, so that this share is uncertain by .03
    with seeded(1):
        flat = draws(TruncatedPrior(bimodal), 4000)
    far = ((flat - torch.where(flat.sum(-1) > 0, 4.0, -4.0)[:, None]) / 0.5).norm(dim=-1) > 2
    expected = (1 - share) * math.exp(-2) + share * float(far.double().mean())
    assert float((distance > 2).double().mean()) == pytest.approx(expected, abs=0.03 + 0.1 * share)


def test_equal_seeds_draw_alike_whatever_was_drawn_before(bimodal: VIPosterior) -> None:
    proposal = RoundProposal(bimodal)
    first = draws(proposal, 100)
    bimodal.sample((40_000,))  # its pool of draws grows
    proposal.sample((50_000,))
    assert torch.equal(first, draws(proposal, 100))
    assert not torch.equal(first, draws(proposal, 100, seed=1))


def test_shapes(bimodal: VIPosterior) -> None:
    assert RoundProposal(bimodal).sample((3, 5)).shape == (3, 5, 2)
    assert TruncatedPrior(bimodal).sample((3, 5)).shape == (3, 5, 2)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(prior_share=1.5), r"`prior_share`: expected a number in \[0, 1\]; got 1.5"),
        (dict(outside=0.0), r"`outside`: expected a number in \(0, 1\); got 0"),
    ],
)
def test_refuses(bimodal: VIPosterior, keywords, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoundProposal(bimodal, **keywords)


def test_refuses_what_is_not_fitted() -> None:
    with pytest.raises(ValueError, match="train"):
        RoundProposal(VIPosterior(two_modes, BOX, q="auto")).sample((10,))
