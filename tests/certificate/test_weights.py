"""Importance weights against what is known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from visbi.certificate import (
    divergences,
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    resample,
    rows,
    total_variation,
)
from visbi.certificate.rows import tail_mass
from visbi.certificate.weights import unseen_mass

N = 50_000
LOG_Z = 1.7


def gaussian_weights(s: float, n: int = N, m: float = 0.0) -> Tensor:
    """log w for q = N(m, s^2) and p = exp(LOG_Z) N(0, 1)."""
    theta = m + s * torch.randn(n, dtype=torch.float64)
    log_q = -0.5 * ((theta - m) / s).square() - math.log(s)
    return LOG_Z - 0.5 * theta.square() - log_q


def pareto_weights(k: float, n: int = N) -> Tensor:
    """log w for P(w > t) = t^(-1/k)."""
    return -k * torch.rand(n, dtype=torch.float64).log()


class TestKhat:
    @pytest.mark.parametrize("s", [0.8, 0.6, 0.5])
    def test_a_narrow_gaussian(self, s):
        # sd .05 over seeds; the weights' tail is a power times a logarithm, which k-hat reads up to .04 low
        mean = sum(pareto_smooth(gaussian_weights(s))[1] for _ in range(10)) / 10
        assert mean == pytest.approx(1 - s**2, abs=0.09)

    @pytest.mark.parametrize("k", [0.2, 0.5, 0.9, 1.5])
    def test_a_pareto_tail(self, k):
        assert pareto_smooth(pareto_weights(k))[1] == pytest.approx(k, abs=0.25)

    def test_a_wide_gaussian_has_bounded_weights(self):
        assert pareto_smooth(gaussian_weights(1.5))[1] < 0
        assert pareto_smooth(gaussian_weights(1.5, 500))[1] < 0

    def test_constant_weights_have_no_tail(self):
        for log_w in (torch.zeros(1000), torch.full((1000,), 3.0), 1e-5 * torch.randn(1000)):
            smooth, khat = pareto_smooth(log_w)
            assert khat == -math.inf
            torch.testing.assert_close(smooth.exp(), torch.full((1000,), 1e-3).double(), rtol=1e-3, atol=0)

    def test_a_few_draws_that_are_off_make_no_tail(self):
        log_w = 1e-5 * torch.randn(N)
        log_w[:3] = 0.1
        assert pareto_smooth(log_w)[1] == -math.inf

    @pytest.mark.parametrize("broken", [(math.nan, math.nan), (math.inf, 1.0), (0.3, -1.0), (0.3, 0.0)])
    def test_a_fit_that_breaks_leaves_the_weights_as_they_are(self, broken, monkeypatch):
        monkeypatch.setattr(
            rows, "_pareto_fit", lambda excess: tuple(excess.new_full((len(excess),), v) for v in broken)
        )
        log_w = gaussian_weights(0.8, 1000)
        smooth, khat = pareto_smooth(log_w)
        assert khat == (broken[0] if broken[0] == 0.3 else math.inf)
        torch.testing.assert_close(smooth, log_w.log_softmax(0))

    @pytest.mark.parametrize("n", [25, 400, 3000, N])
    @pytest.mark.parametrize("s", [0.5, 0.8, 0.95])
    def test_another_implementation_says_the_same(self, s, n):
        from arviz_stats.base import array_stats

        log_w = gaussian_weights(s, n)
        smooth, khat = pareto_smooth(log_w)
        expected, expected_khat = array_stats.psislw(-log_w.numpy())
        assert khat == pytest.approx(float(expected_khat), abs=1e-8)
        torch.testing.assert_close(smooth, torch.as_tensor(expected), atol=1e-8, rtol=0)

    def test_numpy_may_be_told_to_raise(self):
        log_w = torch.randn(5000, dtype=torch.float64).sort().values
        log_w[-3:] += 500.0  # next to these, exp of the others is zero
        before = pareto_smooth(log_w)[1]
        with np.errstate(all="raise"):
            assert pareto_smooth(log_w)[1] == before

    @pytest.mark.parametrize(("ties", "fitted"), [(24, True), (25, False)])
    def test_a_tail_whose_lower_quartile_holds_nothing(self, ties, fitted):
        # of 1000 weights 94 make the tail; the fit divides by the 24th smallest excess over the 95th weight
        top = torch.linspace(2.0, 1.0, 95 - ties, dtype=torch.float64)
        log_w = torch.cat([top, torch.zeros(ties).double(), torch.linspace(-1.0, -2.0, 905).double()])
        assert math.isfinite(pareto_smooth(log_w)[1]) is fitted

    def test_a_tail_and_its_cut_off_all_the_same(self):
        log_w = torch.cat([torch.zeros(95), torch.linspace(-1.0, -2.0, 905)]).double()
        assert pareto_smooth(log_w)[1] == -math.inf

    def test_a_constant_tail_has_no_shape(self):
        log_w = torch.cat([torch.zeros(900), -torch.rand(100)])  # the largest are all the same
        assert pareto_smooth(log_w)[1] == -math.inf

    def test_zero_weights_say_nothing_about_the_tail(self):
        log_w = gaussian_weights(0.7)
        padded = torch.cat([log_w, torch.full((3 * N,), -math.inf, dtype=torch.float64)])
        smooth, khat = pareto_smooth(padded)
        assert khat == pareto_smooth(log_w)[1]
        torch.testing.assert_close(smooth[:N], pareto_smooth(log_w)[0])
        assert (smooth[N:] == -math.inf).all()

    @pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
    def test_what_is_not_finite_counts_as_zero(self, bad):
        log_w = gaussian_weights(0.8, 2000)
        broken = log_w.clone()
        broken[:20] = bad
        smooth, khat = pareto_smooth(broken)
        assert (smooth[:20] == -math.inf).all()
        assert khat == pareto_smooth(log_w[20:])[1]
        assert smooth.exp().sum().item() == pytest.approx(1)

    def test_nothing_finite(self):
        smooth, khat = pareto_smooth(torch.full((100,), -math.inf))
        assert khat == math.inf
        assert torch.equal(smooth, torch.full((100,), -math.log(100), dtype=torch.float64))

    def test_hardly_anything_finite(self):
        log_w = torch.full((1000,), -math.inf)
        log_w[:10] = torch.randn(10)
        smooth, khat = pareto_smooth(log_w)
        assert khat == math.inf
        torch.testing.assert_close(smooth[:10], log_w[:10].double().log_softmax(0))

    @pytest.mark.parametrize("spread", [1e2, 1e3, 1e5])
    def test_weights_too_uneven_for_floating_point(self, spread):
        smooth, khat = pareto_smooth(spread * torch.randn(5000, dtype=torch.float64))
        assert khat > 1
        assert smooth.isfinite().all()
        assert smooth.exp().sum().item() == pytest.approx(1)

    def test_smoothing_changes_the_tail_alone_and_keeps_its_order(self):
        log_w = gaussian_weights(0.6)
        smooth, _ = pareto_smooth(log_w)
        tail = torch.topk(log_w, int(3 * N**0.5)).indices
        body = torch.ones(N, dtype=torch.bool)
        body[tail] = False
        shift = (smooth - log_w)[body]
        assert (shift.max() - shift.min()) < 1e-9
        assert (smooth[tail].diff() <= 1e-12).all()
        assert smooth.exp().sum().item() == pytest.approx(1)
        assert smooth[tail[0]] <= torch.log_softmax(log_w, 0)[tail[0]] + 1e-2  # no weight above the largest

    def test_smoothing_steadies_the_mean(self):
        # E_p theta^2 = 1 by weights of a q that is too narrow: smoothed weights have the smaller spread
        raw, smoothed = [], []
        for _ in range(40):
            theta = 0.6 * torch.randn(2000, dtype=torch.float64)
            log_w = -0.5 * theta.square() + 0.5 * (theta / 0.6).square()
            raw.append((log_w.softmax(0) * theta.square()).sum())
            smoothed.append((pareto_smooth(log_w)[0].exp() * theta.square()).sum())
        assert torch.stack(smoothed).std() < 0.95 * torch.stack(raw).std()

    def test_few_draws(self):
        assert math.isfinite(pareto_smooth(gaussian_weights(0.8, 25))[1])
        with pytest.raises(ValueError, match=r"^`log_w`: expected at least 25 log-weights; got 24$"):
            pareto_smooth(torch.zeros(24))


class TestTailMass:
    @pytest.mark.parametrize("k", [0.3, 0.5, 0.7])
    def test_of_a_pareto(self, k):
        size = int(3 * N**0.5)
        cutoff = (size / N) ** -k  # excess over it, as a share of the mean 1 / (1 - k)
        expected = k * cutoff ** (1 - 1 / k)
        found = [pareto_smooth(pareto_weights(k)) for _ in range(10)]
        mass = [float(tail_mass(smooth[None])[1]) + unseen_mass(smooth, khat) for smooth, khat in found]
        assert sum(mass) / 10 == pytest.approx(expected, rel=0.2)

    @pytest.mark.parametrize("k", [0.3, 0.5, 0.7, 0.9])
    def test_what_the_draws_do_not_reach(self, k):
        # no noise, the quantiles in the middle of N equal steps: its mean falls short
        # of 1 / (1 - k)
        log_w = -k * ((torch.arange(N, dtype=torch.float64) + 0.5) / N).log()
        shortfall = 1 - float(log_w.exp().mean()) * (1 - k)
        assert unseen_mass(log_w.log_softmax(0), k) * (1 - shortfall) == pytest.approx(shortfall, rel=0.35)

    def test_a_standard_error_more_holds_more(self):
        smooth, khat = pareto_smooth(gaussian_weights(0.6))
        at_least, at_most = unseen_mass(smooth, khat), unseen_mass(smooth, khat, sigmas=2.0)
        assert 0 < at_least < at_most < math.inf
        assert unseen_mass(smooth, khat, sigmas=100.0) == math.inf

    @pytest.mark.parametrize(("n", "size"), [(25, 5), (100, 20), (400, 60)])
    @pytest.mark.parametrize("k", [0.5, -0.3])
    def test_by_hand(self, n, size, k):
        # of few weights a fifth makes the tail, of many three times their root
        smooth = torch.randn(n, dtype=torch.float64).log_softmax(0)
        top = smooth.exp().sort(descending=True).values
        seen = float(top[:size].sum() - size * top[size])
        share = (2 * size) ** (k - 1)
        assert float(tail_mass(smooth[None])[1]) == pytest.approx(seen)
        assert unseen_mass(smooth, k) == pytest.approx(seen * share / (1 - share))
        raised = (2 * size) ** (k + 0.5 * (1 + max(k, 0.0)) / math.sqrt(size) - 1)
        assert unseen_mass(smooth, k, sigmas=0.5) == pytest.approx(seen * raised / (1 - raised))

    def test_ends(self):
        smooth, _ = pareto_smooth(gaussian_weights(0.6, 1000))
        assert unseen_mass(smooth, -math.inf) == 0
        assert unseen_mass(smooth, 1.0) == math.inf
        assert unseen_mass(smooth, math.inf) == math.inf

    def test_bounded_weights_have_next_to_nothing_beyond(self):
        smooth, khat = pareto_smooth(gaussian_weights(1.5))
        assert unseen_mass(smooth, khat, sigmas=2.0) < 1e-4


class TestEffectiveSampleSize:
    @pytest.mark.parametrize("s", [0.9, 1.0, 1.5, 3.0])  # below .87 w^2 has no variance
    def test_of_gaussians(self, s):
        # E_q w^2 = s^2 / sqrt(2 s^2 - 1)
        expected = N * math.sqrt(2 * s**2 - 1) / s**2
        assert effective_sample_size(gaussian_weights(s)) == pytest.approx(expected, rel=0.02)

    def test_equal_weights_some_of_them_zero(self):
        log_w = torch.full((100,), 2.0)
        log_w[:30] = -math.inf
        assert effective_sample_size(log_w) == pytest.approx(70)

    def test_equal_weights_at_any_height(self):
        assert effective_sample_size(torch.full((100,), 1e15, dtype=torch.float64)) == pytest.approx(100)

    def test_one_weight_and_none(self):
        log_w = torch.full((100,), -math.inf)
        assert effective_sample_size(log_w) == 0
        log_w[3] = -5.0
        assert effective_sample_size(log_w) == pytest.approx(1)


class TestEvidence:
    def test_of_gaussians(self):
        for s in (0.9, 1.0, 1.5):
            value, error = log_evidence(gaussian_weights(s))
            assert abs(value - LOG_Z) < max(5 * error, 1e-12)
            expected = math.sqrt((s**2 / math.sqrt(2 * s**2 - 1) - 1) / N)
            assert error == pytest.approx(expected, rel=0.05, abs=1e-7)

    @pytest.mark.parametrize("s", [0.9, 1.5])
    def test_its_error_is_calibrated(self, s):
        pairs = [log_evidence(gaussian_weights(s, 2000)) for _ in range(200)]
        z = torch.tensor([(value - LOG_Z) / error for value, error in pairs])
        assert z.mean().abs() < 0.3
        assert 0.85 < z.std() < 1.15

    def test_zeros_count_as_draws(self):
        log_w = torch.zeros(1000)
        log_w[:250] = -math.inf
        value, error = log_evidence(log_w)
        assert value == pytest.approx(math.log(0.75))
        assert error == pytest.approx(math.sqrt((1 / 0.75 - 1) / 1000))

    def test_nothing(self):
        assert log_evidence(torch.full((100,), -math.inf)) == (-math.inf, math.inf)


class TestTotalVariation:
    @pytest.mark.parametrize("s", [0.8, 0.95, 1.2, 2.0])
    def test_of_unlike_scales(self, s):
        cross = s * math.sqrt(2 * math.log(s) / (s**2 - 1))  # where the densities are equal
        expected = 2 * abs(stats.norm.cdf(cross) - stats.norm.cdf(cross / s))
        assert total_variation(gaussian_weights(s)) == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize("m", [0.1, 1.0])
    def test_of_unlike_means(self, m):
        expected = 2 * stats.norm.cdf(m / 2) - 1
        assert total_variation(gaussian_weights(1.0, m=m)) == pytest.approx(expected, abs=0.01)

    def test_ends(self):
        log_w = torch.zeros(100)
        assert total_variation(log_w) == 0
        log_w[:40] = -math.inf
        assert total_variation(log_w) == pytest.approx(0.4)
        log_w[:99] = -math.inf
        assert total_variation(log_w) == pytest.approx(0.99)
        assert total_variation(torch.full((100,), -math.inf)) == 1


@pytest.mark.parametrize("shift", [1e4, -1e4, 1e8])
def test_a_constant_changes_the_evidence_alone(shift):
    log_w = gaussian_weights(0.7, 4000)
    shifted = log_w + shift
    assert pareto_smooth(shifted)[1] == pytest.approx(pareto_smooth(log_w)[1], abs=1e-5)
    torch.testing.assert_close(pareto_smooth(shifted)[0], pareto_smooth(log_w)[0], rtol=0, atol=1e-6)
    assert effective_sample_size(shifted) == pytest.approx(effective_sample_size(log_w), rel=1e-6)
    assert total_variation(shifted) == pytest.approx(total_variation(log_w), abs=1e-6)
    value, error = log_evidence(shifted)
    assert value == pytest.approx(log_evidence(log_w)[0] + shift)
    assert error == pytest.approx(log_evidence(log_w)[1], rel=1e-6)


def test_entries_at_the_ends_of_floating_point():
    log_w = gaussian_weights(0.8, 4000)
    low = torch.cat([log_w, torch.full((4000,), -1e300, dtype=torch.float64)])
    assert effective_sample_size(low) == pytest.approx(effective_sample_size(log_w))
    assert log_evidence(low)[0] == pytest.approx(log_evidence(log_w)[0] - math.log(2))
    assert total_variation(low) == pytest.approx(0.5, abs=0.15)
    high = log_w.clone()
    high[0] = 1e300
    assert effective_sample_size(high) == pytest.approx(1)
    assert pareto_smooth(high)[1] > 1
    assert log_evidence(high)[0] == pytest.approx(1e300)
    assert total_variation(high) == pytest.approx(1, abs=1e-3)
    assert resample(high, 10).tolist() == [0] * 10


def test_float32_weights_are_taken_in_float64():
    log_w = gaussian_weights(0.7, 4000)
    assert pareto_smooth(log_w.float())[0].dtype is torch.float64
    assert pareto_smooth(log_w.float())[1] == pytest.approx(pareto_smooth(log_w)[1], abs=1e-3)


class TestResample:
    def test_counts_are_within_one_of_their_expectation(self):
        log_w = torch.randn(1000, dtype=torch.float64)
        counts = resample(log_w, 5000).bincount(minlength=1000)
        expected = 5000 * log_w.softmax(0)
        assert ((counts >= expected.floor()) & (counts <= expected.ceil())).all()

    def test_it_is_unbiased(self):
        log_w = torch.log(torch.tensor([0.05, 0.15, 0.3, 0.5] * 10))
        runs = 4000
        counts = torch.stack([resample(log_w, 7).bincount(minlength=40) for _ in range(runs)]).double()
        expected = 7 * log_w.double().softmax(0)
        error = (expected * (1 - expected) / runs).sqrt()
        assert ((counts.mean(0) - expected).abs() < 4.5 * error).all()

    def test_the_order_is_random(self):
        index = resample(torch.zeros(1000), 1000)
        assert sorted(index.tolist()) == list(range(1000))
        assert stats.spearmanr(index.numpy(), range(1000)).statistic == pytest.approx(0, abs=0.15)

    def test_zero_weights_never_come_up(self):
        log_w = torch.zeros(100)
        log_w[::2] = -math.inf
        log_w[1::4] = math.nan
        assert set((resample(log_w, 1000) % 4).tolist()) == {3}

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match=r"^`log_w`: expected at least one finite log-weight; got none$"):
            resample(torch.full((100,), -math.inf), 5)

    def test_torchs_generator_decides(self):
        log_w = torch.randn(100)
        torch.manual_seed(4)
        first = resample(log_w, 50)
        torch.manual_seed(4)
        assert torch.equal(resample(log_w, 50), first)
        assert not torch.equal(resample(log_w, 50), first)


class TestDivergences:
    @pytest.mark.parametrize(("s", "m"), [(0.8, 0.0), (1.0, 0.5), (1.4, -0.3)])
    def test_of_gaussians(self, s, m):
        reverse, forward = divergences(gaussian_weights(s, m=m))
        assert reverse == pytest.approx(0.5 * (s**2 + m**2 - 1) - math.log(s), abs=0.015)
        assert forward == pytest.approx(0.5 * ((1 + m**2) / s**2 - 1) + math.log(s), abs=0.03)

    @pytest.mark.parametrize("shift", [1e4, -1e8])
    def test_a_constant_changes_nothing(self, shift):
        log_w = gaussian_weights(0.8, 1000)
        assert divergences(log_w + shift) == pytest.approx(divergences(log_w), abs=1e-6)

    def test_never_negative(self):
        for n in (30, 1000):
            assert min(min(divergences(1e-6 * torch.randn(n).double())) for _ in range(50)) >= 0.0

    def test_zero_weights(self):
        log_w = torch.zeros(1000)
        log_w[:250] = -math.inf
        reverse, forward = divergences(log_w)
        assert reverse == math.inf and forward == pytest.approx(math.log(1 / 0.75))

    @pytest.mark.parametrize("value", [-math.inf, math.nan])
    def test_no_weights(self, value):
        assert divergences(torch.full((100,), value)) == (math.inf, math.inf)

    def test_few_weights(self):
        with pytest.raises(ValueError, match="at least 25"):
            divergences(torch.zeros(10))
