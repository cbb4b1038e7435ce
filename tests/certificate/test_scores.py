"""The score of proportionality against its formula."""

import math

import pytest
import torch

from visbi.certificate import proportionality


def direct(p, q):
    slope = (p @ q) / (q @ q)
    return 1 - (p - slope * q).square().sum() / (p - p.mean()).square().sum()


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_against_the_formula(noise):
    log_q = torch.randn(500, dtype=torch.float64)
    log_p = log_q + noise * torch.randn(500, dtype=torch.float64)
    assert proportionality(log_p, log_q) == pytest.approx(direct(log_p.exp(), log_q.exp()).item(), abs=1e-10)


def test_proportional_is_one_whatever_the_constant():
    log_q = torch.randn(500, dtype=torch.float64)
    for constant in (0.0, 1e4, -1e4):
        assert proportionality(log_q + constant, log_q - 2 * constant) == pytest.approx(1, abs=1e-9)


def test_less_noise_scores_higher_and_none_like_it_scores_low():
    log_q = torch.randn(5000)
    scores = [proportionality(log_q + noise * torch.randn(5000), log_q) for noise in (0.05, 0.3, 1.0)]
    assert scores[0] > 0.99 > scores[1] > scores[2]
    assert proportionality(-5 * log_q, log_q) < 0.1


def test_a_density_of_zero_counts():
    log_q = torch.zeros(1000)
    log_p = log_q.clone()
    log_p[:500] = -math.inf  # q is flat where half of p is empty
    assert proportionality(log_p, log_q) == pytest.approx(0, abs=1e-9)
    log_p, log_q = torch.randn(1000), torch.full((1000,), -math.inf)
    log_q[:10] = log_p[:10]  # q holds next to nothing of p
    assert proportionality(log_p, log_q) < 0.2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_density_is_left_out(bad):
    log_q = torch.randn(500)
    log_p = log_q + 0.3 * torch.randn(500)
    broken = log_p.clone()
    broken[:50] = bad
    assert proportionality(broken, log_q) == proportionality(log_p[50:], log_q[50:])


def test_nothing_to_compare():
    for log_p in (torch.full((10,), math.nan), torch.full((10,), -math.inf)):
        assert proportionality(log_p, torch.zeros(10)) == 0
    assert proportionality(torch.zeros(10), torch.full((10,), -math.inf)) == 0


def test_constant_densities():
    assert proportionality(torch.full((10,), 3.0), torch.zeros(10)) == 1
    assert proportionality(torch.zeros(10), torch.randn(10)) == 0
