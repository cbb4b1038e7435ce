"""Weighted draws of a fit: what they are, how a pool of them grows, and what is taken from it."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from posterior_cases import real
from visbi.certificate import WeightedDraws
from visbi.core.random import seeded
from visbi.correcting import corrected, in_pieces, pool, pool_for, weighted_draws
from visbi.families import Family, named_family
from visbi.fitting.gradient import Trace
from visbi.fitting.state import SingleFit
from visbi.priors import coordinates


def q() -> Family:
    return named_family("gaussian", coordinates(real()), num_transforms=1, hidden_features=1)


def fit(**changes: Any) -> SingleFit:
    plain = SingleFit(q(), None, Trace((), ""), None, "rKL", None, None)  # type: ignore[arg-type]
    return replace(plain, **changes)


class Seen:
    """A potential with the shape of a Gaussian, in float32; it keeps how many thetas every call brought."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.sizes = scale, []

    def __call__(self, theta: Tensor) -> Tensor:
        self.sizes.append(len(theta))
        return Normal(0.0, self.scale).log_prob(theta).sum(-1).float()


def rows(draws: Any) -> int:
    assert len(draws.theta) == len(draws.log_p) == len(draws.log_q)
    return len(draws.theta)


def test_draws_come_with_both_densities_and_without_gradients() -> None:
    one = fit()
    draws = weighted_draws(one, Seen(), 50)
    assert draws.theta.shape == (50, 2) and draws.log_p.shape == draws.log_q.shape == (50,)
    assert draws.log_p.dtype == draws.log_q.dtype == torch.float64
    torch.testing.assert_close(draws.log_q, one.family.log_prob(draws.theta).detach())
    assert torch.equal(draws.log_p, Seen()(draws.theta).double())
    assert not (draws.theta.requires_grad or draws.log_p.requires_grad or draws.log_q.requires_grad)
    assert any(weight.requires_grad for weight in one.family.parameters())


def test_the_potential_is_evaluated_in_pieces() -> None:
    potential = Seen()
    theta = torch.randn(40_000, 2)
    assert torch.equal(in_pieces(potential, theta), Seen()(theta))
    assert potential.sizes == [16_384, 16_384, 7232]
    potential.sizes.clear()
    weighted_draws(fit(), potential, 16_385)
    assert potential.sizes == [16_384, 1]


@pytest.mark.parametrize(("kept", "asked", "drawn"), [(0, 3, 25), (0, 26, 26), (0, None, 16_384)])
def test_a_first_pool(kept: int, asked: int | None, drawn: int) -> None:
    potential = Seen()
    draws = pool(fit(), potential) if asked is None else pool(fit(), potential, asked)
    assert potential.sizes == [drawn] and rows(draws) == drawn


@pytest.mark.parametrize(
    ("asked", "drawn"), [(99, 0), (100, 0), (101, 25), (125, 25), (126, 26), (1000, 900)]
)
def test_a_pool_keeps_what_is_there(asked: int, drawn: int) -> None:
    potential = Seen()
    kept = weighted_draws(fit(), potential, 100)
    potential.sizes.clear()
    draws = pool(fit(draws=kept), potential, asked)
    assert rows(draws) == 100 + drawn and potential.sizes == [drawn] * (drawn > 0)
    assert torch.equal(draws.theta[:100], kept.theta) and torch.equal(draws.log_p[:100], kept.log_p)
    assert draws is kept or drawn > 0


def test_a_pool_grows_until_it_is_enough() -> None:
    one, potential = fit(), Seen()
    small = pool_for(1000, one, potential, 7)
    assert potential.sizes == [16_384] and rows(small) == 16_384  # of some 4000 in effect
    potential.sizes.clear()
    large = pool_for(10_000, one, potential, 7)
    assert rows(large) >= large.needed(10_000) > rows(small) and rows(large) == sum(potential.sizes)
    assert rows(pool_for(10_000, fit(draws=large), potential, 7)) == rows(large)
    with seeded(7):  # the first part has one seed, what is added the next one
        assert torch.equal(pool(one, potential).theta, large.theta[:16_384])
    with seeded(8):
        more = weighted_draws(one, potential, small.needed(10_000) - 16_384)
    assert torch.equal(more.theta, large.theta[16_384 : 16_384 + rows(more)])


class JustEnough(WeightedDraws):
    """Of which each asks for as many as there are."""

    def needed(self, n: int) -> int:
        return len(self.theta)


def test_a_pool_that_loses_by_growing_says_so() -> None:
    """A certificate has its draws by chance; what further ones weigh is the other half of the truth."""
    one = fit()
    few = pool(one, Seen())
    flat = WeightedDraws(few.theta, few.log_q, few.log_q)
    grown = []

    def elsewhere(theta: Tensor) -> Tensor:
        grown.append(len(theta))
        return 50.0 * (theta.sum(-1) > 2.0).double()

    with pytest.warns(
        UserWarning, match="fell from 16384 of 16384 draws of q to .* when more .* its certificate"
    ):
        fallen = pool_for(10_000, fit(draws=flat), elsewhere, 7)
    assert len(grown) == 1  # and it does not go on
    with pytest.warns(UserWarning, match="fell from 16384 of 16384 draws"):  # now or later
        assert rows(pool_for(10_000, fit(draws=fallen), elsewhere, 8)) == rows(fallen)
    assert len(grown) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool_for(10_000, fit(draws=few), Seen(), 7)


def test_a_pool_that_is_just_enough_stays() -> None:
    kept = JustEnough(torch.zeros(16_384, 2), torch.zeros(16_384), torch.zeros(16_384))
    assert pool_for(8192, fit(draws=kept), Seen(), 7) is kept  # and does not go on looking for ever


def test_equal_seeds_give_equal_draws_from_a_pool() -> None:
    draws = pool_for(100, fit(), Seen(), 7)
    before = torch.get_rng_state()
    theta = corrected(draws, torch.Size([20, 5]), 7)
    assert theta.shape == (20, 5, 2) and corrected(draws, torch.Size([]), 7).shape == (2,)
    assert corrected(draws, torch.Size([0]), 7).shape == (0, 2)
    assert torch.equal(corrected(draws, torch.Size([100]), 7), theta.reshape(100, 2))
    with seeded(9):  # a seed of its own again
        assert torch.equal(draws.resampled(100), theta.reshape(100, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_corrected_draws_are_those_of_the_posterior() -> None:
    one = fit()
    theta = corrected(pool_for(20_000, one, Seen(0.7), 1), torch.Size([20_000]), 1)
    assert (theta.std(0) - 0.7).abs().max() < 0.02 and theta.mean(0).abs().max() < 0.02
    assert one.family.sample((5000,)).std(0).min() > 1.5  # those of q are not


def test_no_finite_weight() -> None:
    draws = pool(fit(), lambda theta: torch.full((len(theta),), -math.inf))
    with pytest.raises(ValueError, match="`log_p`: expected a finite value at one draw at least; got none"):
        corrected(draws, torch.Size([3]), 0)
