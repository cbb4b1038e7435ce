"""Mixtures that follow the posterior: matched, from particles, refitted, patched."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from mixture_cases import CENTRES, FOUR, known, of_mixture
from visbi.fitting.explore import explore
from visbi.fitting.mixture import defended
from visbi.fitting.pool import Pool
from visbi.fitting.refine import Blend, around, from_particles, matched, patch, refined
from visbi.fitting.target import Target
from visbi.priors import coordinates


def target_of(log_p, dim: int = 2) -> Target:
    return Target(log_p, coordinates(MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())))


def banana(theta: Tensor) -> Tensor:
    """N(z_0; 0, 1) N(z_1; z_0^2 - 1, .3^2)."""
    bent = (theta[:, 1] - theta[:, 0].square() + 1) / 0.3
    return -0.5 * (theta[:, 0].square() + bent.square()) - math.log(2 * math.pi * 0.3)


def evidence(pool: Pool) -> float:
    return float(pool.log_w().logsumexp(1)) - math.log(pool.log_w().shape[1])


class TestMatched:
    def test_four_gaussians_exactly(self):
        starts = FOUR.loc[0].repeat(5, 1) + 0.1 * torch.randn(20, 2, dtype=torch.float64)
        found = matched(of_mixture(FOUR, 3.0), starts[None], 0.01 * torch.eye(2).double().expand(1, 20, 2, 2))
        order = torch.cdist(FOUR.loc[0], found.loc[0]).argmin(1)
        assert found.loc.shape == (1, 4, 2) and sorted(order.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(found.loc[0, order], FOUR.loc[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(found.cov[0, order], FOUR.cov[0], atol=1e-4, rtol=0)
        masses = 0.8 * FOUR.log_weights[0].exp() + 0.2 / 4  # a fifth is shared evenly
        torch.testing.assert_close(found.log_weights[0, order].exp(), masses, atol=1e-5, rtol=0)

    def test_hopeless_ones_are_dropped(self):
        """A second hill far below the first."""
        low = known([1.0, 1e-9], [[-1.0, 0.0], [1.0, 0.0]], 0.15)
        starts = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()
        found = matched(of_mixture(low), starts[None], 0.02 * torch.eye(2).double().expand(1, 2, 2, 2))
        torch.testing.assert_close(found.loc[0], low.loc[0, :1], atol=1e-2, rtol=0)

    def test_starts_where_nothing_is_finite(self):
        log_p = lambda theta: torch.where(theta[:, 0] > 0, FOUR.log_prob(theta[None])[0], -math.inf)  # noqa: E731
        starts = torch.tensor([[1.5, 1.2], [-30.0, 0.0]]).double()
        found = matched(target_of(log_p), starts[None], 0.01 * torch.eye(2).double().expand(1, 2, 2, 2))
        torch.testing.assert_close(found.loc[0], FOUR.loc[0, 2:3], atol=1e-2, rtol=0)


class TestFirstMixtures:
    def test_around_covers_the_points(self):
        """All of them, in every mode, and not what is between: good enough to be drawn from."""
        z = FOUR.sample(1000)
        q = around(z)
        assert 4 <= q.loc.shape[1] <= 12
        assert float(q.log_prob(z).min()) > math.log(1e-4)
        assert float(q.log_prob(torch.zeros(1, 1, 2).double())) < -8
        assert Pool(of_mixture(FOUR)).draw(defended(q), 4096).share > 0.8

    @pytest.mark.parametrize("n", [2, 3, 5])
    def test_around_a_few_points(self, n):
        q = around(torch.randn(1, n, 2, dtype=torch.float64))
        assert bool(q.loc.isfinite().all() and q.tril.isfinite().all())
        assert bool(q.sample(10).isfinite().all())

    @pytest.mark.parametrize("gradient", [True, False])
    def test_from_particles(self, gradient):
        target = of_mixture(FOUR, 1.0)
        q = from_particles(explore(target, 512, gradient=gradient))
        trial = Pool(target).draw(defended(q), 4096)
        assert trial.share > 0.4 and trial.khat < 0.7
        near = torch.cdist(q.loc[0], FOUR.loc[0]).argmin(1)
        masses = torch.zeros(4).double().index_add(0, near, q.log_weights[0].exp())
        torch.testing.assert_close(masses, FOUR.log_weights[0].exp(), atol=0.12, rtol=0)

    def test_from_particles_takes_as_many_components_as_it_may_and_as_points_are_enough_for(self):
        seen = explore(of_mixture(FOUR, 1.0), 1024)
        few, many = (from_particles(seen, components=n).loc.shape[1] for n in (3, 48))
        assert few == 3 and 30 < many <= 48
        assert from_particles(seen, 160, components=48).loc.shape[1] <= 160 // 16


class TestRefined:
    def test_a_bend_gets_components_and_the_effective_sample_size_rises(self):
        """Not by luck: a single draw at the edge may halve a share, so most of seven must be good."""
        shares, khats, again = [], [], []
        for seed in range(7):
            torch.manual_seed(seed)
            pool = Pool(target_of(banana))
            start = known([1.0], [[0.0, 0.0]], 1.2)
            first = pool.draw(defended(start), 4096)
            q, trial, _ = refined(pool, start, first)
            assert first.share < 0.3 and q.loc.shape[1] > 3
            again.append(float(pool.draw(defended(q), 4096).share / first.share))
            assert evidence(pool) == pytest.approx(0.0, abs=0.05)
            shares.append(float(trial.share))
            khats.append(float(trial.khat))
        assert sorted(shares)[3] > 0.75 and sorted(khats)[3] < 0.7 and sorted(again)[3] > 2

    def test_weights_of_modes_are_found(self):
        pool = Pool(of_mixture(FOUR, 2.0))
        start = known([0.25] * 4, CENTRES, 0.2)
        q, trial, _ = refined(pool, start, pool.draw(defended(start), 4096))
        near = torch.cdist(q.loc[0], FOUR.loc[0]).argmin(1)
        masses = torch.zeros(4).double().index_add(0, near, q.log_weights[0].exp())
        torch.testing.assert_close(masses, FOUR.log_weights[0].exp(), atol=0.03, rtol=0)
        assert trial.share > 0.8 and evidence(pool) == pytest.approx(2.0, abs=0.02)

    def test_what_is_good_stays_as_it_is(self):
        pool = Pool(of_mixture(FOUR))
        trial = pool.draw(defended(FOUR), 4096)
        q, again, _ = refined(pool, FOUR, trial)
        assert q is FOUR and again is trial and pool.target.n_values == 4096

    def test_how_steady_refits_are_is_the_lower_of_the_last_two_trials(self):
        pool = Pool(target_of(banana))
        start = known([1.0], [[0.0, 0.0]], 1.2)
        _, _, steady = refined(pool, start, pool.draw(defended(start), 4096))
        assert len(pool.proposals) > 2
        assert torch.equal(steady, torch.minimum(*(trial.share for _, trial in pool.proposals[-2:])))
        only = Pool(of_mixture(FOUR))
        trial = only.draw(defended(FOUR), 4096)
        assert torch.equal(refined(only, FOUR, trial)[2], trial.share)

    def test_never_worse_than_the_start(self):
        pool = Pool(target_of(banana))
        start = known([1.0], [[0.0, 0.0]], 1.2)
        first = pool.draw(defended(start), 100)  # hardly a start
        _, trial, _ = refined(pool, start, first, rounds=1)
        assert trial.share >= first.share


class TestBlend:
    def test_density_and_draws(self):
        one, other = known([1.0], [[-3.0, 0.0]], 0.15), known([1.0], [[3.0, 0.0]], 0.15)
        blend = Blend(one, other, torch.tensor([0.25]).double())
        z = blend.sample(1001)
        assert z.shape == (1, 1001, 2) and int((z[..., 0] > 0).sum()) == 250
        assert 25 < int((z[0, :200, 0] > 0).sum()) < 75  # in random order
        both = 0.75 * one.log_prob(z).exp() + 0.25 * other.log_prob(z).exp()
        torch.testing.assert_close(blend.log_prob(z).exp(), both)

    def test_a_patch_is_put_where_q_is_too_low(self):
        """q holds one mode, and too little of the other one, as a fitted flow might."""
        exact = known([0.7, 0.3], [[-1.0, 0.0], [1.0, 0.0]], 0.25)
        q = known([0.95, 0.05], [[-1.0, 0.0], [1.0, 0.0]], 0.26)
        pool = Pool(of_mixture(exact, 1.0))
        before = pool.draw(q, 4096)
        mended = patch(pool, q)
        assert mended.main is q and float(mended.share) == pytest.approx(0.27, abs=0.06)
        after = pool.draw(mended, 4096)
        assert before.share < 0.5 and after.share > 0.85 and after.khat < 0.7
        there = mended.rest.log_prob(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]).double())[0]
        assert float(there[0]) > float(there[1]) + 2

    def test_a_patch_where_q_has_no_density_at_all(self):
        """A flow that was trained on next to nothing; weights of NaN were drawn from."""

        class Nowhere:
            def log_prob(self, z: Tensor) -> Tensor:
                return torch.full_like(z[..., 0], -torch.inf)

        pool = Pool(of_mixture(FOUR))
        pool.draw(FOUR, 64)
        rest = patch(pool, Nowhere()).rest  # type: ignore[arg-type]
        assert bool(torch.isfinite(rest.log_prob(FOUR.sample(64))).all())

    def test_a_patch_on_what_needs_none_does_no_harm(self):
        pool = Pool(of_mixture(FOUR))
        pool.draw(FOUR, 4096)
        mended = patch(pool, FOUR)
        assert pool.draw(mended, 4096).share > 0.9
