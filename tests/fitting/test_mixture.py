"""Mixtures as tensors, and EM, against torch's distributions, autograd and known mixtures."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from visbi.fitting import mixture as module
from visbi.fitting.em import expectation_maximisation, maximise
from visbi.fitting.mixture import (
    Mixture,
    defence,
    defended,
    local_covariances,
    merged,
    spread_out,
)


def covariances(fits: int, k: int, dim: int) -> Tensor:
    root = torch.randn(fits, k, dim, dim, dtype=torch.float64)
    return root @ root.mT / dim + 0.3 * torch.eye(dim, dtype=torch.float64)


def some(fits: int = 1, k: int = 3, dim: int = 2, spread: float = 2.0) -> Mixture:
    """Nothing special about it."""
    loc = spread * torch.randn(fits, k, dim, dtype=torch.float64)
    return Mixture.of(torch.randn(fits, k, dtype=torch.float64), loc, covariances(fits, k, dim))


def known(weights: list[float], centres: list[list[float]], sd: float = 0.5) -> Mixture:
    loc = torch.tensor(centres, dtype=torch.float64)[None]
    cov = sd**2 * torch.eye(loc.shape[-1], dtype=torch.float64).expand(1, loc.shape[1], -1, -1)
    return Mixture.of(torch.tensor(weights, dtype=torch.float64)[None].log(), loc, cov)


def reference(q: Mixture, fit: int) -> MixtureSameFamily:
    components = MultivariateNormal(q.loc[fit], q.cov[fit])
    return MixtureSameFamily(Categorical(logits=q.log_weights[fit]), components)


def even(z: Tensor) -> Tensor:
    return torch.full(z.shape[:2], 1.0 / z.shape[1], dtype=torch.float64)


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

    def test_defended_integrates_to_one_and_bounds_the_weights(self):
        q = some(1, 3, spread=1.0)
        wide = defended(q)
        axis = torch.linspace(-40, 40, 321, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)[None]
        assert float(wide.log_prob(grid).exp().sum()) * 0.25**2 == pytest.approx(1.0, abs=1e-6)
        shares = sum(share for _, share in defence(2))
        assert shares == pytest.approx(0.1)
        ratio = q.log_prob(grid) - wide.log_prob(grid)
        assert float(ratio.max()) <= -math.log(1 - shares) + 1e-9
        # at the edge a target a little wider than q is held
        target = q.widened(1.5**2)
        assert float((target.log_prob(grid) - wide.log_prob(grid)).max()) < math.log(60)

    @pytest.mark.parametrize("dim", [1, 10, 300])
    def test_defence_moves_the_shell_by_the_same_in_any_dimension(self, dim):
        radius = torch.randn(4000, dim, dtype=torch.float64).norm(dim=-1)
        for (factor, _), spreads in zip(defence(dim), (2.5, 6.0), strict=True):
            moved = (factor - 1) * math.sqrt(dim) / math.sqrt(0.5)
            assert moved == pytest.approx(spreads)
        assert dim == 1 or float(radius.std()) == pytest.approx(math.sqrt(0.5), rel=0.1)


class TestEM:
    def test_a_known_mixture_is_recovered(self):
        exact = known([0.2, 0.5, 0.3], [[-3.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
        z = exact.sample(20_000)
        rough = Mixture.of(torch.zeros(1, 3).double(), exact.loc + 0.8, 4 * exact.cov)
        found = expectation_maximisation(rough, z, even(z), max_iters=100, tol=1e-7)
        torch.testing.assert_close(found.log_weights.exp(), exact.log_weights.exp(), atol=0.01, rtol=0)
        torch.testing.assert_close(found.loc, exact.loc, atol=0.03, rtol=0)
        torch.testing.assert_close(found.cov, exact.cov, atol=0.015, rtol=0)

    def test_weights_of_points_count(self):
        """Points of a proposal, weighted, stand for the target."""
        exact, proposal = known([0.8, 0.2], [[-1.5, 0.0], [1.5, 0.0]]), known([1.0], [[0.0, 0.0]], 2.0)
        z = proposal.sample(40_000)
        weights = (exact.log_prob(z) - proposal.log_prob(z)).softmax(1)
        rough = Mixture.of(torch.zeros(1, 2).double(), exact.loc, 4 * exact.cov)
        found = expectation_maximisation(rough, z, weights, max_iters=100, tol=1e-7)
        torch.testing.assert_close(found.log_weights.exp(), exact.log_weights.exp(), atol=0.02, rtol=0)
        torch.testing.assert_close(found.loc, exact.loc, atol=0.05, rtol=0)
        torch.testing.assert_close(found.cov, exact.cov, atol=0.03, rtol=0)

    @pytest.mark.parametrize("seed", range(5))
    def test_likelihood_hardly_ever_falls(self, seed):
        """EM's own steps never lower it; shrinkage may, by no more than what n points leave uncertain."""
        torch.manual_seed(seed)
        z = some(1, 4, 3, spread=1.5).sample(2000)
        q, scores = some(1, 5, 3), []
        for _ in range(15):
            scores.append(float(q.log_prob(z).mean()))
            joint = q.by_component(z)
            q = maximise(q, z, (joint - torch.logsumexp(joint, 1, keepdim=True)).exp() / 2000)
        steps = torch.tensor(scores).diff()
        assert float(steps[0]) > 0.05 and float(steps.min()) > -0.01
        assert float(steps[-5:].abs().max()) < 0.02

    def test_one_m_step_of_all_points_is_their_moments(self):
        """n = N points: the covariance is shrunk and widened as the module's formula says."""
        z = torch.randn(1, 50, 3, dtype=torch.float64) @ torch.randn(3, 3).double()
        found = maximise(some(1, 1, 3), z, even(z)[:, None])
        sample = torch.cov(z[0].mT, correction=0)
        shrunk = (1 + 4 / 50) * (50 * sample + 5 * sample.diagonal().diag()) / 55
        torch.testing.assert_close(found.loc[0, 0], z[0].mean(0))
        torch.testing.assert_close(found.cov[0, 0], shrunk)
        assert found.log_weights.tolist() == [[0.0]]

    def test_components_without_points_lose_their_weight(self):
        q = known([0.5, 0.25, 0.25], [[0.0, 0.0], [40.0, 0.0], [20.0, 0.0]])
        z = 0.5 * torch.randn(1, 500, 2, dtype=torch.float64)
        z[0, :2] += torch.tensor([20.0, 0.0])
        found = expectation_maximisation(q, z, even(z))
        assert found.log_weights[0, 1] == -math.inf  # none
        assert found.log_weights[0, 2] == -math.inf  # two points have no covariance
        assert float(found.log_weights[0, 0]) == pytest.approx(0.0)
        assert bool(found.tril.isfinite().all() and found.log_prob(z).isfinite().all())

    def test_nothing_to_go_on_leaves_it_as_it_was(self):
        q = some(1, 2)
        z = torch.randn(1, 2, 2, dtype=torch.float64)
        found = expectation_maximisation(q, z, even(z))
        torch.testing.assert_close(found.log_weights, q.log_weights)
        torch.testing.assert_close(found.loc, q.loc)
        torch.testing.assert_close(found.tril, q.tril)

    @SMALL
    def test_fits_do_not_mix(self, at_once, monkeypatch):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        z, start = some(3, 3, 2).sample(200), some(3, 3, 2)
        weights = torch.rand(3, 200, dtype=torch.float64).softmax(1)
        together = expectation_maximisation(start, z, weights, max_iters=5, tol=0.0)
        for f in range(3):
            one = Mixture(start.log_weights[f : f + 1], start.loc[f : f + 1], start.tril[f : f + 1])
            alone = expectation_maximisation(one, z[f : f + 1], weights[f : f + 1], max_iters=5, tol=0.0)
            torch.testing.assert_close(together.log_weights[f], alone.log_weights[0])
            torch.testing.assert_close(together.loc[f], alone.loc[0])
            torch.testing.assert_close(together.tril[f], alone.tril[0])


class TestPlaces:
    def test_merged_keeps_unlike_ones_best_first(self):
        q = known([0.25] * 4, [[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [5.0, 0.1]])
        found = merged(q, torch.tensor([[1.0, 2.0, 4.0, 3.0]]), 10)
        torch.testing.assert_close(found.loc[0], q.loc[0, [2, 1]])
        torch.testing.assert_close(found.log_weights.exp(), torch.full((1, 2), 0.5).double())
        assert merged(q, torch.tensor([[1.0, 2.0, 4.0, 3.0]]), 1).loc.tolist() == [[[5.0, 0.0]]]

    def test_merged_tells_shapes_apart(self):
        """The same centre; the Bhattacharyya distance of N(0, 1) and N(0, s^2) is log((s + 1/s) / 2) / 2."""
        for s, kept in ((2.0, 1), (8.0, 2)):
            distance = 0.5 * math.log((s + 1 / s) / 2)
            assert (distance > 0.5) == (kept == 2)
            cov = torch.tensor([1.0, s**2], dtype=torch.float64).reshape(1, 2, 1, 1)
            q = Mixture.of(torch.zeros(1, 2).double(), torch.zeros(1, 2, 1).double(), cov)
            assert merged(q, torch.zeros(1, 2), 5).loc.shape[1] == kept

    @pytest.mark.parametrize(("gap", "kept"), [(1.9, 1), (2.1, 2)])
    def test_merged_at_the_distance_of_one_half(self, gap, kept):
        """Equal covariances: gap^2 / 8 standard deviations."""
        q = known([0.5, 0.5], [[0.0, 0.0], [gap * 0.5, 0.0]])
        assert merged(q, torch.zeros(1, 2), 5).loc.shape[1] == kept

    def test_spread_out_reaches_every_group(self):
        z = torch.cat([torch.randn(300, 2), torch.randn(20, 2) + 30, torch.randn(20, 2) - 30]).double()
        weights = torch.full((1, 340), 1 / 340, dtype=torch.float64)
        for _ in range(10):
            chosen = spread_out(z[None], weights, 8)[0]
            groups = torch.bucketize(z[chosen, 0], torch.tensor([-15.0, 15.0]).double())
            assert len(set(chosen.tolist())) == 8 and set(groups.tolist()) == {0, 1, 2}

    def test_spread_out_leaves_out_points_of_no_weight_and_copies(self):
        z = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]).double()
        weights = torch.tensor([0.3, 0.3, 0.2, 0.2, 0.0]).double()
        chosen = spread_out(z[None], weights[None], 5)[0]
        assert len(chosen) == 5 and set(chosen.clamp_min(1).tolist()) == {1, 2, 3}
        assert len(set(chosen[:3].clamp_min(1).tolist())) == 3  # unlike ones first

    def test_local_covariances_on_a_narrow_ridge(self):
        """A bent ridge: neighbourhoods are as narrow as it is, along it."""
        t = 4 * torch.rand(4000, dtype=torch.float64) - 2
        z = torch.stack([t, t.square() + 0.001 * torch.randn(4000).double()], 1)
        centres = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]).double()
        cov = local_covariances(z[None], centres[None], 40)[0]
        assert cov.shape == (3, 2, 2)
        values, vectors = torch.linalg.eigh(cov)
        along = vectors[:, :, 1] * vectors[:, :1, 1].sign()
        slope = torch.tensor([2.0, -2.0, 0.0]).double()
        torch.testing.assert_close(along[:, 1] / along[:, 0], slope, atol=0.4, rtol=0)
        assert bool((values[:, 1] > 10 * values[:, 0]).all())

    def test_local_covariances_of_gaussian_points_are_no_larger_than_theirs(self):
        z = torch.randn(3000, 2, dtype=torch.float64)
        cov = local_covariances(z[None], torch.zeros(1, 1, 2).double(), 300)[0, 0]
        # those within r hold 1 - exp(-r^2/2) = a tenth; their variance is about r^2 / 4
        assert cov.diagonal().tolist() == pytest.approx([0.053, 0.053], rel=0.35)
        assert abs(float(cov[0, 1])) < 0.02

    def test_local_covariances_where_points_lie_on_top_of_each_other(self):
        z = torch.cat([torch.zeros(100, 2), torch.ones(5, 2)]).double()
        cov = local_covariances(z[None], torch.zeros(1, 1, 2).double(), 50)
        assert bool(torch.linalg.eigvalsh(cov).gt(0).all())

    def test_more_neighbours_than_points(self):
        z = torch.randn(10, 2, dtype=torch.float64)
        assert local_covariances(z[None], z[None, :2], 400).shape == (1, 2, 2, 2)
