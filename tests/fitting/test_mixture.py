"""Defence, and the places that mixtures start from."""

import math

import pytest
import torch

from mixture_cases import known, some
from visbi.families.gaussians import Mixture
from visbi.fitting.mixture import defence, defended, local_covariances, merged, spread_out


class TestDefence:
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


class TestPlaces:
    def test_merged_keeps_unlike_ones_best_first(self):
        q = known([0.1, 0.3, 0.2, 0.4], [[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [5.0, 0.1]])
        found = merged(q, torch.tensor([[1.0, 2.0, 4.0, 3.0]]), 10)
        torch.testing.assert_close(found.loc[0], q.loc[0, [2, 1]])
        torch.testing.assert_close(found.log_weights.exp(), torch.tensor([[0.4, 0.6]]).double())
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
