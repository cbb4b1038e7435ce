"""Many posteriors at once: each as if it were alone."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from visbi.certificate import WeightedDraws
from visbi.certificate.weights import effective_sample_size
from visbi.families.gaussians import Mixture
from visbi.fitting import bending
from visbi.fitting.budget import Budget
from visbi.fitting.climbing import ALONE, SIDE_BY_SIDE
from visbi.fitting.ladder import climb_together
from visbi.fitting.mixture import defended
from visbi.fitting.pool import Pool
from visbi.fitting.target import ManyTargets
from visbi.priors import coordinates

GOOD = ("ok", "corrected")
FITS = 4


def standard(dim: int) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())


def many(log_p, dim: int, fits: int = FITS, **limits) -> ManyTargets:
    return ManyTargets(log_p, coordinates(standard(dim)), fits, Budget(**limits))


def gaussians(theta: Tensor, which: Tensor) -> Tensor:
    """N(theta; .3 which, .2^2) and evidence `which`."""
    centre = 0.3 * which.double()[:, None, None]
    inside = ((theta - centre) / 0.2).square().sum(-1)
    return which.double()[:, None] - 0.5 * inside - theta.shape[-1] * math.log(0.2 * math.sqrt(2 * math.pi))


def unlike(theta: Tensor, which: Tensor) -> Tensor:
    """One mode, two modes with masses .7 and .3, a bend, a narrow bend."""
    x, y = theta[..., 0], theta[..., 1]
    normal = math.log(2 * math.pi)

    def at(centre: float, sd: float) -> Tensor:
        return -0.5 * (((x - centre) / sd).square() + (y / sd).square()) - normal - 2 * math.log(sd)

    def bend(sd: float) -> Tensor:
        return -0.5 * (x.square() + ((y - x.square() + 1) / sd).square()) - normal - math.log(sd)

    two = torch.logaddexp(at(-1.2, 0.2) + math.log(0.7), at(1.2, 0.2) + math.log(0.3))
    each = torch.stack([at(0.3, 0.3), two, bend(0.5), bend(0.25)])
    return each[which, torch.arange(len(which))]


class TestTargets:
    def test_each_row_has_its_own_potential(self):
        target, z = many(gaussians, 2), torch.randn(FITS, 5, 2).double()
        ell, gradient = target.value_and_gradient(z)
        for f in range(FITS):
            one = torch.tensor([f])
            torch.testing.assert_close(ell[f], gaussians(z[f : f + 1], one)[0])
            torch.testing.assert_close(gradient[f], -(z[f] - 0.3 * f) / 0.04)
        torch.testing.assert_close(target.value(z), ell)

    def test_more_leading_rows_than_fits(self):
        """What belongs to one fit stands together: 3 starts for each."""
        target, z = many(gaussians, 2), torch.randn(FITS * 3, 5, 2).double()
        torch.testing.assert_close(target.value(z), target.value(z.reshape(FITS, 15, 2)).reshape(12, 5))

    def test_in_pieces(self, monkeypatch):
        monkeypatch.setattr("visbi.fitting.target._BATCH", 8)
        target, z = many(gaussians, 2), torch.randn(FITS, 7, 2).double()
        torch.testing.assert_close(target.value(z), gaussians(z, torch.arange(FITS)))

    def test_fewer_and_fewer(self):
        target = many(gaussians, 2)
        some = target.only(torch.tensor([True, False, True, True])).only(torch.tensor([False, True, True]))
        z = torch.randn(2, 5, 2).double()
        torch.testing.assert_close(some.value(z), gaussians(z, torch.tensor([2, 3])))
        assert target.tally.values.tolist() == [0, 0, 5, 5] and some.n_values == 10

    def test_what_is_not_finite_is_counted_for_each(self):
        def log_p(theta, which):
            return torch.where(which[:, None] == 1, torch.nan, torch.zeros(theta.shape[:2]).double())

        target = many(log_p, 2)
        assert target.value(torch.zeros(FITS, 3, 2).double())[:, 0].tolist() == [0.0, -1e30, 0.0, 0.0]
        assert target.broken.tolist() == [0, 3, 0, 0]

    def test_a_budget_is_that_of_each(self):
        target = many(gaussians, 2, max_evals=10)
        target.value(torch.zeros(FITS, 10, 2).double())
        assert target.budget.left == 0


class TestPool:
    def test_each_fit_has_its_own_weights(self):
        q = Mixture.of(
            torch.zeros(FITS, 1).double(),
            torch.zeros(FITS, 1, 2).double(),
            torch.eye(2).double().expand(FITS, 1, 2, 2),
        )
        pool = Pool(many(gaussians, 2))
        trial = pool.draw(defended(q), 4000)
        pool.draw(defended(q.widened(0.5)), 3000)
        assert trial.share.shape == trial.khat.shape == (FITS,)
        alone = [effective_sample_size(row) / 4000 for row in trial.log_w]
        assert trial.share.tolist() == pytest.approx(alone)
        log_z = torch.logsumexp(pool.log_w(), 1) - math.log(7000)
        torch.testing.assert_close(log_z, torch.arange(FITS).double(), atol=0.15, rtol=0)
        z, weights = pool.points(500)
        mean = (weights[..., None] * z).sum(1)
        centres = 0.3 * torch.arange(FITS)[:, None].double().expand(-1, 2)
        torch.testing.assert_close(mean, centres, atol=0.06, rtol=0)
        torch.testing.assert_close(weights.sum(1), torch.ones(FITS).double())
        fewer = pool.of_fits(torch.tensor([False, True, False, True]))
        torch.testing.assert_close(fewer.log_w(), pool.log_w()[[1, 3]])


class TestClimb:
    @pytest.mark.parametrize("effort", [SIDE_BY_SIDE, ALONE])
    @pytest.mark.parametrize("dim", [1, 5])
    def test_gaussians(self, effort, dim):
        answers = climb_together(many(gaussians, dim), effort=effort)
        for f, answer in enumerate(answers):
            report = answer.report
            assert (report.rung, report.status) == ("a Gaussian", "ok")
            assert abs(report.log_evidence - f) < 4 * report.log_evidence_se + 1e-6
            z = WeightedDraws(answer.z, answer.ell, answer.log_q).resampled(4000)
            assert z.mean(0).tolist() == pytest.approx([0.3 * f] * dim, abs=0.02)
            torch.testing.assert_close(answer.q.log_prob(answer.z[None])[0], answer.log_q)

    @pytest.mark.parametrize("effort", [SIDE_BY_SIDE, ALONE])
    def test_unlike_ones(self, effort):
        """One fit in eight of the narrow bend lacks 6 to 8 % at its ends, so most of three must be right."""
        evidences = []
        for seed in range(3):
            torch.manual_seed(seed)
            answers = climb_together(many(unlike, 2), effort=effort)
            assert [answer.report.status in GOOD for answer in answers] == [True] * FITS
            assert answers[0].report.rung == "a Gaussian" and answers[2].report.rung == "a mixture"
            evidences.append([answer.report.log_evidence for answer in answers])
        middle = torch.tensor(evidences).median(0).values
        assert middle.tolist() == pytest.approx([0.0] * FITS, abs=0.06)
        two = answers[1]
        z = WeightedDraws(two.z, two.ell, two.log_q).resampled(4000)
        assert float((z[:, 0] > 0).double().mean()) == pytest.approx(0.3, abs=0.03)

    @pytest.mark.parametrize("bends", [True, False])
    def test_funnels(self, bends: bool, monkeypatch):
        """Mixtures of four such funnels lacked 5 to 23 % of the mass and were called good."""
        if not bends:
            monkeypatch.setattr(bending, "_DIMENSIONS", 6)

        def funnels(theta: Tensor, which: Tensor) -> Tensor:
            shifted = 3 * theta - 0.2 * which[:, None, None]
            neck, others = shifted[..., :1], shifted[..., 1:]
            inside = (neck / 1.5).square().sum(-1) + (others * (-neck).exp()).square().sum(-1)
            log_norm = 2.5 * math.log(2 * math.pi) + math.log(1.5) - 5 * math.log(3)
            return -0.5 * inside - 4 * neck[..., 0] - log_norm

        torch.manual_seed(1)
        answers = climb_together(many(funnels, 5), effort=SIDE_BY_SIDE)
        expected = ("a bent Gaussian", "a bent mixture") if bends else ("a flow", "a patched flow")
        assert sum(answer.report.rung in expected for answer in answers) >= 3
        off = sorted(abs(answer.report.log_evidence) for answer in answers)
        assert off[2] < 0.03  # of three in four

    def test_one_that_is_finite_nowhere_does_not_hold_up_the_others(self):
        def log_p(theta, which):
            return torch.where(which[:, None] == 2, -torch.inf, gaussians(theta, which))

        answers = climb_together(many(log_p, 2), effort=SIDE_BY_SIDE)
        assert [answer.report.status for answer in answers] == ["ok", "ok", "failed", "ok"]

    def test_a_budget_ends_all_of_them_with_the_best_so_far(self):
        answers = climb_together(many(unlike, 2, max_evals=5000), effort=SIDE_BY_SIDE)
        assert all(answer.report.stop_reason == "reached max_potential_evals = 5000" for answer in answers)
        assert all(answer.report.status not in GOOD for answer in answers)

    def test_a_start_for_each(self):
        """Modes that no draw of the prior comes near."""
        centre = torch.tensor([3.5, -3.5, 3.0, -3.0]).double()

        def log_p(theta, which):
            return -0.5 * ((theta - centre[which, None, None]) / 0.05).square().sum(-1)

        cov = 0.01 * torch.eye(2).double().expand(FITS, 1, 2, 2)
        start = Mixture.of(torch.zeros(FITS, 1).double(), centre[:, None, None].expand(-1, 1, 2), cov)
        for f, answer in enumerate(climb_together(many(log_p, 2), start=start, effort=SIDE_BY_SIDE)):
            assert answer.report.status in GOOD
            z = WeightedDraws(answer.z, answer.ell, answer.log_q).resampled(1000)
            assert z.mean(0).tolist() == pytest.approx([float(centre[f])] * 2, abs=0.01)
