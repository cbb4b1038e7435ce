"""The test of uniformity against all that can happen, and against scipy."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch

from visbi.certificate.uniformity import chi_squared, curve, holm, kolmogorov_smirnov


@pytest.mark.parametrize("possible", [[0, 1, 2, 3], [0, 1, 1, 2, 2]])
def test_p_value_is_exact(possible: list[int]) -> None:
    grid = torch.tensor(possible)
    outcomes = Counter(tuple(sorted(outcome)) for outcome in product(possible, repeat=5))
    total = sum(outcomes.values())
    p_values = {outcome: curve(torch.tensor(outcome), grid).p_value for outcome in outcomes}
    assert len(set(p_values.values())) > 5
    for p in set(p_values.values()):
        chance = sum(times for outcome, times in outcomes.items() if p_values[outcome] <= p + 1e-9)
        assert p == pytest.approx(chance / total, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_the_band_is_the_test(alpha: float) -> None:
    generator, outside = torch.Generator().manual_seed(0), []
    for _ in range(300):
        found = curve(torch.randint(0, 41, (60,), generator=generator), torch.arange(41))
        low, high = found.band(alpha)
        left = bool(((found.shares < low - 1e-9) | (found.shares > high + 1e-9)).any())
        assert left == (found.p_value <= alpha)
        outside.append(left)
    assert abs(np.mean(outside) - alpha) < 4 * (alpha * (1 - alpha) / 300) ** 0.5


def test_many_values_of_few() -> None:
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, 501, (2000,), generator=generator) for _ in range(100)]
    p = [curve(ranks, torch.arange(501)).p_value for ranks in samples]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001


def test_hopeless_ranks_have_a_p_value_of_next_to_nothing() -> None:
    found = curve(torch.zeros(1000, dtype=torch.long), torch.arange(101))
    assert 0.0 <= found.p_value < 1e-100


def test_chi_squared_is_that_of_scipy() -> None:
    ranks = torch.randint(0, 100, (1000,), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(ranks, minlength=100).reshape(20, 5).sum(1)
    assert chi_squared(ranks, 100) == pytest.approx(float(scipy.stats.chisquare(counts.numpy()).pvalue))


@pytest.mark.parametrize(("n", "possible"), [(400, 100), (50, 12), (60, 31)])
def test_other_tests_have_their_size(n: int, possible: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = [torch.randint(0, possible, (n,)) for _ in range(500)]
        for test in (chi_squared, kolmogorov_smirnov):
            share = np.mean([test(ranks, possible) < 0.1 for ranks in samples])
            assert abs(share - 0.1) < 4 * (0.09 / 500) ** 0.5


def test_holm_by_hand() -> None:
    assert holm(np.array([0.04, 0.01, 0.03, 0.9])).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert holm(np.array([0.6, 0.5])).tolist() == [1.0, 1.0]
