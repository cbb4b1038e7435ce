"""The verdict on fits whose quality is known, and how it reads."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    StudentT,
)

from visbi.certificate import FitError, Mode, Report, certify
from visbi.certificate.rows import log_evidence
from visbi.certificate.verdict import certify_many

N = 50_000


def gaussian(dim: int = 1, sd: float = 1.0) -> Distribution:
    return Independent(Normal(torch.zeros(dim).double(), sd), 1)


def mixture(share: float, mean: float, sd: float) -> Distribution:
    """N(0, 1), and with probability `share` N(mean, sd^2)."""
    means, sds = torch.tensor([[0.0], [mean]]).double(), torch.tensor([[1.0], [sd]]).double()
    return MixtureSameFamily(
        Categorical(torch.tensor([1 - share, share]).double()), Independent(Normal(means, sds), 1)
    )


def report(p: Distribution, q: Distribution, n: int = N, shift: float = 0.0, **options) -> Report:
    theta = q.sample((n,))
    return certify(p.log_prob(theta) + shift, q.log_prob(theta), **options)


class TestStatus:
    @pytest.mark.parametrize("sd", [0.95, 1.0, 1.1])
    def test_good_fits(self, sd):
        found = report(gaussian(), gaussian(sd=sd), shift=2.5)
        assert found.status == "ok"
        assert found.log_evidence == pytest.approx(2.5, abs=0.02)
        assert found.total_variation < 0.1
        assert found.ess_fraction == pytest.approx(found.ess / N)
        assert found.n_draws == N
        assert found.n_nonfinite == 0

    @pytest.mark.parametrize("dim", [1, 5, 20])
    def test_exact_fits(self, dim):
        found = report(gaussian(dim), gaussian(dim))
        assert found.status == "ok"
        assert found.khat == -math.inf
        assert found.ess == pytest.approx(N)
        assert found.total_variation < 1e-9

    @pytest.mark.parametrize(("dim", "sd"), [(1, 0.7), (5, 0.9), (20, 0.95)])
    def test_too_narrow_but_sound_weights(self, dim, sd):
        found = report(gaussian(dim), gaussian(dim, sd))
        assert found.status == "suspect"
        assert found.khat < 0.7
        assert "resampling with them would mend it" in found.sentence

    @pytest.mark.parametrize("sd", [1.5, 3.0])
    def test_too_wide(self, sd):
        found = report(gaussian(), gaussian(sd=sd))
        assert found.status == "suspect"
        assert found.khat < 0
        assert "resampling with them would mend it" in found.sentence

    def test_much_too_narrow(self):
        found = report(gaussian(5), gaussian(5, 0.4))
        assert found.status in ("suspect", "failed")
        assert "resampling" not in found.sentence

    @pytest.mark.parametrize("mean", [3.5, 4.0, 5.0])
    def test_a_missing_mode_that_some_draws_came_near(self, mean):
        found = report(mixture(0.5, mean, 1.0), gaussian())
        assert found.status == "failed"
        assert found.khat > 1

    @pytest.mark.parametrize("mean", [6.0, 7.0])
    def test_a_missing_mode_on_the_horizon_is_not_called_ok(self, mean):
        # no draw is in it, and where draws are q is right: the growth of the weights alone gives it away
        found = report(mixture(0.5, mean, 1.0), gaussian())
        assert found.status in ("suspect", "failed")
        assert found.khat > 1

    def test_a_missing_mode_beyond_the_horizon_is_invisible(self):
        # half of p is missing: the limit that the module's text states
        found = report(mixture(0.5, 20.0, 1.0), gaussian(), shift=math.log(2.0))
        assert found.status == "ok"
        assert found.log_evidence == pytest.approx(0.0, abs=0.01)  # of the half that was found

    def test_a_mode_that_is_known_but_weighs_too_little(self):
        found = report(mixture(0.4, 10.0, 1.0), mixture(0.1, 10.0, 1.0))
        assert found.status == "suspect"
        assert found.total_variation == pytest.approx(0.3, abs=0.02)
        assert "resampling" in found.sentence

    @pytest.mark.parametrize(("width", "flagged"), [(5.0, 8), (10.0, 8), (100.0, 6)])
    def test_a_wide_halo_that_draws_hardly_see(self, width, flagged):
        # a fifth of p, of which q's draws see .1, .08, .01: an upper bound on k-hat catches the last ones
        found = [report(mixture(0.2, 0.0, width), gaussian()).status for _ in range(8)]
        assert sum(status != "ok" for status in found) >= flagged

    def test_tails_that_are_a_little_heavier_do_no_harm(self):
        heavy = Independent(StudentT(10 * torch.ones(1).double()), 1)
        assert report(heavy, gaussian()).status == "ok"

    def test_a_point_in_nowhere(self):
        found = report(gaussian(20), Independent(Normal(10 * torch.ones(20).double(), 1.0), 1))
        assert found.status == "failed"

    def test_an_ess_that_falls_as_draws_are_added(self):
        log_w = 0.1 * torch.randn(N, dtype=torch.float64)
        assert certify(log_w, torch.zeros(N)).status == "ok"
        few = log_w.clone()
        few[N // 4 :: N // 25] += 5.3  # nineteen weights of 200, none in the first quarter
        found = certify(few, torch.zeros(N))
        assert found.ess > 1000
        assert found.status == "suspect"  # for their tail; smoothed, the largest do not weigh so much
        log_w[N // 4 :: 38] += 3.0  # a fiftieth of all draws, of weight 20: more than a tail
        found = certify(log_w, torch.zeros(N))
        assert found.ess > 1000
        assert found.status == "suspect"
        assert found.sentence.startswith("q covers the posterior poorly")

    def test_few_draws_leave_room_for_little(self):
        assert report(gaussian(5), gaussian(5), n=400).status == "ok"
        assert report(gaussian(5), gaussian(5, 0.8), n=400).status == "suspect"


class TestBrokenNumbers:
    def test_a_potential_that_is_nowhere_finite(self):
        for value in (-math.inf, math.nan):
            found = certify(torch.full((1000,), value), torch.zeros(1000))
            assert found.status in ("failed", "suspect")
            assert found.n_nonfinite == 1000
            assert found.ess == 0
            assert found.log_evidence == -math.inf

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_potential_that_breaks_here_and_there(self, value):
        theta = torch.randn(10_000).double()
        log_p, log_q = -0.5 * theta.square(), Normal(0.0, 1.0).log_prob(theta)
        log_p[:20] = value
        few = certify(log_p, log_q)
        assert few.status == "ok"
        assert few.n_nonfinite == 20
        assert "potential not finite at 20 draws" in str(few)
        log_p[:300] = value
        many = certify(log_p, log_q)
        assert many.status == "suspect"
        assert many.sentence.startswith("the potential is NaN or +inf at 3 % of the draws")

    def test_a_region_where_p_is_zero_is_no_defect(self):
        theta = torch.randn(N).double()
        log_p = torch.where(theta > -1.75, -0.5 * theta.square(), -math.inf)  # 4 % of q
        found = certify(log_p, Normal(0.0, 1.0).log_prob(theta))
        assert found.status == "ok"
        assert found.total_variation == pytest.approx(0.04, abs=0.005)
        assert found.khat == -math.inf

    @pytest.mark.parametrize("shift", [1e4, -1e4])
    def test_a_constant_changes_the_evidence_alone(self, shift):
        theta = 0.9 * torch.randn(N, dtype=torch.float64)
        log_p, log_q = -0.5 * theta.square(), Normal(0.0, 0.9).log_prob(theta)
        plain, shifted = certify(log_p, log_q), certify(log_p + shift, log_q)
        assert shifted.log_evidence == pytest.approx(plain.log_evidence + shift)
        assert (shifted.status, shifted.sentence) == (plain.status, plain.sentence)
        for name in ("khat", "ess", "total_variation", "log_evidence_se"):
            assert getattr(shifted, name) == pytest.approx(getattr(plain, name), rel=1e-5)

    def test_rounding_of_a_large_potential_in_float32_is_no_defect_of_q(self):
        theta = torch.randn(N, dtype=torch.float64)
        log_q = Normal(0.0, 1.0).log_prob(theta)
        assert certify((log_q + 1e5).float(), log_q).status == "ok"

    @pytest.mark.parametrize(
        ("shift", "dtype"), [(1e300, torch.float64), (-1e17, torch.float64), (1e10, torch.float32)]
    )
    def test_a_constant_that_drowns_the_potential_is_not_called_ok(self, shift, dtype):
        theta = 0.5 * torch.randn(N, dtype=torch.float64)
        found = certify((-0.5 * theta.square() + shift).to(dtype), torch.zeros(N))
        assert found.status == "suspect"
        assert "Subtract a constant" in found.sentence

    @pytest.mark.parametrize("value", [1e300, -1e300])
    def test_a_single_entry_at_the_end_of_floating_point(self, value):
        theta = torch.randn(N, dtype=torch.float64)
        log_q = Normal(0.0, 1.0).log_prob(theta)
        log_p = log_q.clone()
        log_p[0] = value
        assert certify(log_p, log_q).status == ("failed" if value > 0 else "ok")


class TestEvidence:
    @pytest.mark.parametrize(("k", "plain_is_enough"), [(0.3, True), (0.5, True), (0.7, False)])
    def test_heavy_tails_stay_within_its_errors(self, k, plain_is_enough):
        """Weights u^-k are Pareto of shape k and mean 1 / (1 - k)."""
        torch.manual_seed(1)
        log_w = -k * torch.rand(2000, 4096, dtype=torch.float64).log()
        reports = certify_many(log_w, torch.zeros_like(log_w))
        off = torch.tensor([r.log_evidence for r in reports]).double() + math.log(1 - k)
        error = torch.tensor([r.log_evidence_se for r in reports]).double()
        assert float((off.abs() > 3 * error).double().mean()) < 0.05
        plain = log_evidence(log_w)[1]
        assert (float((off.abs() > 3 * plain).double().mean()) < 0.05) == plain_is_enough
        assert bool((error >= plain).all())


class TestReport:
    def test_it_reads_in_a_few_lines(self):
        found = report(gaussian(), gaussian(sd=0.9), stop_reason="the objective no longer improved")
        lines = str(found).splitlines()
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 200
        assert lines[0] == f"ok: {found.sentence}"
        for piece in ("k-hat 0.", f"of {N} draws", "total variation", "log-evidence", "no longer improved"):
            assert piece in str(found)

    @pytest.mark.parametrize(
        "log_p", [torch.full((100,), math.nan), torch.zeros(100), 1e3 * torch.randn(100)]
    )
    def test_it_can_be_printed_whatever_the_numbers(self, log_p):
        assert 4 <= len(str(certify(log_p, torch.zeros(100))).splitlines()) <= 10

    def test_it_is_frozen(self):
        found = report(gaussian(), gaussian())
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.status = "ok"

    def test_gradients_do_not_leak_into_it(self):
        theta = torch.randn(100, requires_grad=True)
        found = certify(-0.5 * theta.square(), Normal(0.0, 1.0).log_prob(theta))
        assert type(found.log_evidence) is float

    def test_shapes(self):
        for log_p, log_q in ((torch.zeros(100, 1), torch.zeros(100)), (torch.zeros(100), torch.zeros(99))):
            with pytest.raises(
                ValueError, match=r"^`log_p` and `log_q`: expected one shape \(N,\); got \(100"
            ):
                certify(log_p, log_q)
        with pytest.raises(ValueError, match="at least 25"):
            certify(torch.zeros(10), torch.zeros(10))


class TestResampled:
    """Draws that are resampled with the weights before they are used."""

    @pytest.mark.parametrize(("dim", "sd"), [(1, 0.7), (5, 0.9), (20, 0.95), (1, 1.5), (1, 3.0)])
    def test_sound_weights_mend(self, dim, sd):
        found = report(gaussian(dim), gaussian(dim, sd), resampled=True)
        assert found.status == "corrected"
        assert (
            found.sentence == "raw draws of q differ visibly from the posterior; resampled ones can be used."
        )
        assert found.khat < 0.7 and found.total_variation > 0.05

    def test_a_good_fit_needs_no_correction(self):
        assert report(gaussian(), gaussian(sd=1.05), resampled=True).status == "ok"

    def test_unsound_weights_do_not_mend(self):
        for p, q in ((gaussian(5), gaussian(5, 0.4)), (mixture(0.5, 4.0, 1.0), gaussian())):
            found = report(p, q, resampled=True)
            assert found.status in ("suspect", "failed") and found.khat > 0.7

    @pytest.mark.parametrize("n", [400, 1500])
    def test_few_draws_do_not_mend(self, n):
        assert report(gaussian(5), gaussian(5, 2.0), n=n, resampled=True).status == "suspect"

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_broken_potential_is_not_mended(self, value):
        theta = torch.randn(10_000, dtype=torch.float64)
        log_p = -0.5 * theta.square() / 1.5
        log_p[:300] = value
        found = certify(log_p, Normal(0.0, 1.0).log_prob(theta), resampled=True)
        assert found.status == "suspect" and "NaN or +inf" in found.sentence


class TestDoubts:
    @pytest.mark.parametrize("sd", [1.0, 1.5])
    def test_they_make_good_fits_suspect(self, sd):
        plain = report(gaussian(), gaussian(sd=sd), resampled=True)
        found = report(gaussian(), gaussian(sd=sd), resampled=True, doubts=["a first one.", "a second one."])
        assert plain.status in ("ok", "corrected")
        assert (found.status, found.sentence) == ("suspect", "a first one.")
        assert report(gaussian(), gaussian(sd=sd), resampled=True, doubts=()).status == plain.status

    def test_what_is_worse_keeps_its_own_sentence(self):
        for q in (gaussian(5, 0.4), gaussian(5, 0.2)):
            theta = q.sample((N,))
            log_p, log_q = gaussian(5).log_prob(theta), q.log_prob(theta)
            plain, doubted = certify(log_p, log_q), certify(log_p, log_q, doubts=["mine."])
            assert plain.status in ("suspect", "failed")
            assert (doubted.status, doubted.sentence) == (plain.status, plain.sentence)


class TestDivergences:
    @pytest.mark.parametrize("sd", [0.8, 1.0, 1.3])
    def test_they_are_those_of_gaussians(self, sd):
        found = report(gaussian(2), gaussian(2, sd), shift=7.0)
        reverse = 2 * (0.5 * sd**2 - 0.5 - math.log(sd))
        forward = 2 * (0.5 / sd**2 - 0.5 + math.log(sd))
        assert found.kl_reverse == pytest.approx(reverse, abs=0.01)
        assert found.kl_forward == pytest.approx(forward, abs=0.02)

    def test_p_of_zero_somewhere(self):
        theta = torch.randn(N, dtype=torch.float64)
        log_q = Normal(0.0, 1.0).log_prob(theta)
        found = certify(torch.where(theta > 0, log_q, -math.inf), log_q)
        assert found.kl_reverse == math.inf and found.kl_forward == pytest.approx(math.log(2), abs=0.02)


class TestWhatAFitAdds:
    def full(self, **changes) -> Report:
        modes = (Mode(0.7, (1.0, -2.5)), Mode(0.3, (0.123456, 4e5)))
        made = report(gaussian(), gaussian(sd=1.5), resampled=True, stop_reason="interrupted")
        return dataclasses.replace(
            made,
            n_nonfinite=3,
            modes=modes,
            rung="a mixture",
            story=("a Gaussian had an effective share of 0.10", "a flow was no better"),
            n_values=1234,
            n_gradients=567,
            seconds=3.21,
            seed=5,
            **changes,
        )

    def test_all_of_it_fits_in_ten_lines(self):
        lines = str(self.full()).splitlines()
        assert len(lines) <= 10
        for piece in (
            "corrected: raw draws",
            "2 modes of weights 0.70, 0.30 at (1, -2.5), (0.123, 4e+05)",
            "answered by a mixture; before: a Gaussian had an effective share of 0.10; a flow was no better",
            "1234 evaluations of the potential, 567 more with gradient, 3.2 s, seed 5",
            "potential not finite at 3 draws",
            "fit ended: interrupted",
        ):
            assert piece in str(self.full())
        assert "KL(q, p)" in lines[2] and "KL(p, q)" in lines[2]

    def test_what_is_not_there_is_not_said(self):
        text = str(report(gaussian(), gaussian()))
        for piece in ("mode", "answered", "evaluations", "seed", "ended", "finite"):
            assert piece not in text
        assert "seed" not in str(dataclasses.replace(self.full(), seed=None))
        assert "before" not in str(dataclasses.replace(self.full(), story=()))

    def test_one_mode_and_many(self):
        one = dataclasses.replace(self.full(), modes=(Mode(1.0, (0.0,)),))
        assert "one mode" in str(one)
        many = dataclasses.replace(self.full(), modes=tuple(Mode(0.05, (float(i),)) for i in range(20)))
        (line,) = [line for line in str(many).splitlines() if "modes" in line]
        assert line == "20 modes of weights " + ", ".join(["0.05"] * 8) + " and 12 more"
        wide = dataclasses.replace(self.full(), modes=(Mode(0.5, (0.0,) * 9), Mode(0.5, (1.0,) * 9)))
        assert "2 modes of weights 0.50, 0.50\n" in str(wide)

    def test_what_may_have_been_missed(self):
        searched = dataclasses.replace(self.full(), n_searched=30_000)
        assert searched.least_share == pytest.approx(1e-4)
        assert len(str(searched).splitlines()) <= 10
        assert "2 modes of weights 0.70, 0.30 at (1, -2.5), (0.123, 4e+05); one that reaches less" in str(
            searched
        )
        assert "than 1e-04 of the prior may be missed" in str(searched)
        assert math.isnan(self.full().least_share)

    def test_an_error_carries_it(self):
        made, posterior = self.full(), object()
        error = FitError(made, posterior)
        assert error.report is made and error.posterior is posterior
        assert str(made) in str(error) and "allow_failed=True" in str(error)


def test_an_error_that_is_not_known_is_said_in_words():
    known = report(gaussian(), gaussian(sd=0.9))
    unknown = dataclasses.replace(known, log_evidence=1.5, log_evidence_se=math.inf)
    assert "+- 0." in str(known) and "inf" not in str(known)
    assert "log-evidence 1.500 with an unknown error" in str(unknown) and "inf" not in str(unknown)
