"""Corrected draws against the posterior that they stand for."""

import math

import pytest
import torch
from torch.distributions import Normal

from visbi.certificate import WeightedDraws, pareto_smooth


def draws(n: int = 20_000, sd: float = 1.5, dtype: torch.dtype = torch.float64) -> WeightedDraws:
    """q = N(0, sd^2), p = N(1, .5^2) exp(7)."""
    theta = sd * torch.randn(n, 1, dtype=torch.float64)
    log_p = Normal(1.0, 0.5).log_prob(theta[:, 0]) + 7.0
    return WeightedDraws(theta.to(dtype), log_p, Normal(0.0, sd).log_prob(theta[:, 0]))


def test_resampled_draws_have_the_moments_of_p():
    found = draws().resampled(4000)
    assert found.shape == (4000, 1)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.04)
    assert float(found.std()) == pytest.approx(0.5, abs=0.03)


def test_draws_come_as_often_as_their_weight_says():
    made = draws(2000)
    share = made.log_weights.exp()
    assert float(share.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(made.log_weights, pareto_smooth(made.log_p - made.log_q)[0])
    times = (made.resampled(500)[:, None, 0] == made.theta[None, :, 0]).sum(0)
    assert bool((times >= (500 * share).floor() - 1e-9).all() and (times <= (500 * share).ceil()).all())


def test_needed_makes_draws_that_hardly_ever_coincide():
    few = draws(1000)
    n = few.needed(2000)
    share = float(few.log_weights.exp().square().sum().reciprocal()) / 1000
    assert n == pytest.approx(2 * 2000 / share, rel=0.02)
    unlike = draws(n).resampled(2000).unique(dim=0)
    assert len(unlike) > 0.99 * 2000


def test_needed_has_an_end():
    hopeless = WeightedDraws(torch.zeros(50, 1), torch.full((50,), -math.inf), torch.zeros(50))
    assert hopeless.needed(10) == 2**20
    exact = WeightedDraws(torch.zeros(50, 1), torch.full((50,), 3.0), torch.zeros(50))
    assert exact.needed(10) in (20, 21)  # rounded up


def test_more_draws_are_added_at_the_end():
    one, other = draws(100), draws(60)
    both = one.with_(other)
    assert both.theta.shape == (160, 1)
    torch.testing.assert_close(both.theta[100:], other.theta)
    torch.testing.assert_close(both.log_p[100:], other.log_p)
    torch.testing.assert_close(both.log_q[:100], one.log_q)
    assert float(both.log_weights.exp().sum()) == pytest.approx(1.0)


def test_draws_of_no_weight_never_come():
    made = draws(500)
    made = WeightedDraws(made.theta, torch.where(made.theta[:, 0] > 0.5, made.log_p, -math.inf), made.log_q)
    assert bool((made.resampled(300) > 0.5).all())


def test_the_dtype_of_theta_is_kept():
    assert draws(100, dtype=torch.float32).resampled(7).dtype == torch.float32
    assert draws(100).to("cpu").theta.device == torch.device("cpu")


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_nothing_to_resample(value):
    nothing = WeightedDraws(torch.zeros(50, 1), torch.full((50,), value), torch.zeros(50))
    with pytest.raises(ValueError, match="`log_p`: expected a finite value"):
        nothing.resampled(3)
