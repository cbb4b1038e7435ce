"""Mixtures as tensors against torch's distributions and autograd."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from mixture_cases import covariances, known, reference, some
from visbi.families import gaussians as module
from visbi.families.gaussians import Mixture

SMALL = pytest.mark.parametrize("at_once", [2**23, 7], ids=["at once", "in pieces"])


class TestDensity:
    @SMALL
    @pytest.mark.parametrize("dim", [1, 2, 20])
    def test_log_prob(self, dim, at_once, monkeypatch):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        q, z = some(2, 3, dim), 3 * torch.randn(2, 11, dim, dtype=torch.float64)
        assert q.by_component(z).shape == (2, 3, 11)
        for fit in range(2):
            torch.testing.assert_close(q.log_prob(z)[fit], reference(q, fit).log_prob(z[fit]))
            each = q.log_weights[fit, 1] + MultivariateNormal(q.loc[fit, 1], q.cov[fit, 1]).log_prob(z[fit])
            torch.testing.assert_close(q.by_component(z)[fit, 1], each)

    @pytest.mark.parametrize("dim", [1, 3, 20])
    def test_score(self, dim):
        q, z = some(2, 4, dim), torch.randn(2, 9, dim, dtype=torch.float64, requires_grad=True)
        value, score = q.log_prob_and_score(z)
        torch.testing.assert_close(value, q.log_prob(z))
        torch.testing.assert_close(score.detach(), torch.autograd.grad(q.log_prob(z).sum(), z)[0])

    def test_weights_are_normalised_and_covariances_kept(self):
        cov = covariances(2, 3, 4)
        q = Mixture.of(5.0 + torch.randn(2, 3).double(), torch.zeros(2, 3, 4).double(), cov)
        torch.testing.assert_close(q.log_weights.exp().sum(-1), torch.ones(2).double())
        torch.testing.assert_close(q.cov, cov)

    def test_components_of_no_weight_count_nothing(self):
        q = some(1, 2)
        more = Mixture(
            torch.cat([q.log_weights, torch.full((1, 1), -math.inf).double()], 1),
            torch.cat([q.loc, torch.zeros(1, 1, 2).double()], 1),
            torch.cat([q.tril, 1e-3 * torch.eye(2).double()[None, None]], 1),
        )
        z = torch.randn(1, 50, 2, dtype=torch.float64)
        for got, want in zip(more.log_prob_and_score(z), q.log_prob_and_score(z), strict=True):
            torch.testing.assert_close(got, want)
        drawn = more.sample(2000)[0]
        assert not bool((drawn.norm(dim=-1) < 5e-3).any())

    def test_far_away_nothing_overflows(self):
        value, score = some().log_prob_and_score(torch.full((1, 3, 2), 1e8).double())
        assert bool(value.isfinite().all() and score.isfinite().all())

    def test_a_singular_covariance_gets_a_ridge(self):
        flat = torch.ones(1, 1, 2, 2, dtype=torch.float64)
        q = Mixture.of(torch.zeros(1, 1).double(), torch.zeros(1, 1, 2).double(), flat)
        torch.testing.assert_close(q.cov, flat, rtol=1e-6, atol=1e-6)
        assert bool(q.tril.diagonal(dim1=-2, dim2=-1).gt(0).all())


class TestDraws:
    @pytest.mark.parametrize("dim", [2, 20])
    def test_moments_and_shares(self, dim):
        q = known([0.2, 0.5, 0.3], [[-9.0] * dim, [0.0] * dim, [9.0] * dim])
        tilt = torch.eye(dim, dtype=torch.float64).tril() + 0.3 * torch.ones(dim, dim).double().tril(-1)
        q = Mixture(q.log_weights, q.loc, 0.5 * tilt.expand(1, 3, -1, -1))
        z = q.sample(20_000)
        assert z.shape == (1, 20_000, dim)
        which = torch.cdist(z[0], q.loc[0]).argmin(1)
        assert bool((torch.bincount(which) - torch.tensor([4000, 10_000, 6000])).abs().max() <= 1)
        for k in range(3):
            part = z[0, which == k]
            torch.testing.assert_close(part.mean(0), q.loc[0, k], atol=0.1, rtol=0)
            torch.testing.assert_close(torch.cov(part.mT), q.cov[0, k], atol=0.08, rtol=0.08)
        first = torch.bincount(which[:2000], minlength=3) / 2000  # in random order
        torch.testing.assert_close(first, torch.tensor([0.2, 0.5, 0.3]), atol=0.05, rtol=0)

    def test_each_fit_draws_its_own(self):
        q = known([1.0], [[5.0, 5.0]])
        both = Mixture(q.log_weights.expand(2, -1), torch.cat([q.loc, -q.loc]), q.tril.expand(2, -1, -1, -1))
        z = both.sample(500)
        assert bool((z[0] > 0).all() and (z[1] < 0).all()) and z.shape == (2, 500, 2)

    def test_small_components_are_drawn_now_and_then(self):
        q = known([0.999, 0.001], [[0.0], [100.0]])
        counts = [int((q.sample(100) > 50).sum()) for _ in range(400)]
        assert set(counts) == {0, 1} and 10 <= sum(counts) <= 80


class TestCombined:
    def test_with_gives_a_share_away(self):
        one, other, z = some(1, 2), some(1, 3), torch.randn(1, 20, 2, dtype=torch.float64)
        both = 0.7 * one.log_prob(z).exp() + 0.3 * other.log_prob(z).exp()
        torch.testing.assert_close(one.with_(other, 0.3).log_prob(z).exp(), both)

    def test_widened_and_only(self):
        q = some(2, 3)
        torch.testing.assert_close(q.widened(2.5).cov, 2.5 * q.cov)
        left = q.only(torch.tensor([[True, False, True]]).expand(2, 3))
        torch.testing.assert_close(left.log_weights.exp().sum(-1), torch.ones(2).double())
        torch.testing.assert_close(left.loc, q.loc[:, [0, 2]])
        torch.testing.assert_close(left.log_weights.diff(), q.log_weights[:, [0, 2]].diff())
        torch.testing.assert_close(left.loc, q.loc[:, [0, 2]])

    def test_each_mixture_keeps_its_own_components(self):
        q = some(2, 3)
        left = q.only(torch.tensor([[True, False, False], [False, False, True]]))
        torch.testing.assert_close(left.loc, q.loc[:, [0, 2]])
        assert left.log_weights.tolist() == [[0.0, -math.inf], [-math.inf, 0.0]]

    def test_the_better_of_two_for_each_fit(self):
        q, other = some(3, 2), some(3, 5)
        best = q.better(other, torch.tensor([False, True, False]))
        z = torch.randn(3, 40, 2, dtype=torch.float64)
        for f, one in ((0, q), (1, other), (2, q)):
            torch.testing.assert_close(best.log_prob(z)[f], one.log_prob(z)[f])
        assert q.better(other, torch.tensor([True] * 3)) is other
        assert q.better(other, torch.tensor([False] * 3)) is q
