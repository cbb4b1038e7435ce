"""The ladder on posteriors that are known: who answers, and whether the answer is right."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from mixture_cases import FOUR, known
from visbi.certificate import WeightedDraws
from visbi.families.gaussians import Mixture
from visbi.fitting import budget, climbing, ladder, looking, matching, mixing, witnesses
from visbi.fitting.budget import Budget
from visbi.fitting.climbing import ALONE, Answer, Group, Record
from visbi.fitting.explore import explore
from visbi.fitting.ladder import climb
from visbi.fitting.mixture import defended
from visbi.fitting.pool import Pool
from visbi.fitting.refine import around, from_particles
from visbi.fitting.target import Target
from visbi.fitting.verdicts import certified
from visbi.fitting.witnesses import missing
from visbi.priors import BoxUniform, coordinates

GOOD = ("ok", "corrected")


def standard(dim: int) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())


def target_of(log_p, dim: int = 2, **limits) -> Target:
    return Target(log_p, coordinates(standard(dim)), Budget(**limits))


def group_of(log_p, dim: int = 2) -> Group:
    target = target_of(log_p, dim)
    return Group(target, [Record()], ALONE, Pool(target))


def four(theta: Tensor) -> Tensor:
    return FOUR.log_prob(theta[None])[0] + 3.0


def banana(theta: Tensor) -> Tensor:
    bent = (theta[:, 1] - theta[:, 0].square() + 1) / 0.3
    inside = theta[:, 0].square() + bent.square() + theta[:, 2:].square().sum(-1)
    return 3.0 - 0.5 * inside - 0.5 * theta.shape[1] * math.log(2 * math.pi) - math.log(0.3)


def funnel(theta: Tensor) -> Tensor:
    """theta_0 ~ N(0, 1), the others N(0, exp(theta_0)^2)."""
    scaled = theta[:, 1:] * (-theta[:, :1]).exp()
    inside = theta[:, 0].square() + scaled.square().sum(-1)
    d = theta.shape[1]
    return 3.0 - 0.5 * inside - 0.5 * d * math.log(2 * math.pi) - (d - 1) * theta[:, 0]


def resampled(answer: Answer, n: int = 4000) -> Tensor:
    return WeightedDraws(answer.z, answer.ell, answer.log_q).resampled(n)


def within_errors(answer: Answer, log_z: float) -> bool:
    report = answer.report
    return abs(report.log_evidence - log_z) < 4 * report.log_evidence_se + 1e-6


class TestAnswers:
    @pytest.mark.parametrize("dim", [1, 2, 8])
    def test_a_gaussian(self, dim):
        cov = 0.02 * torch.eye(dim).double() + 0.05
        exact = MultivariateNormal(torch.full((dim,), 0.7).double(), cov)
        answer = climb(target_of(lambda theta: exact.log_prob(theta) + 3.0, dim))
        report = answer.report
        assert (report.rung, report.status, report.stop_reason) == ("a Gaussian", "ok", "")
        assert within_errors(answer, 3.0) and report.log_evidence_se < 0.01
        assert report.ess_fraction > 0.8 and report.kl_forward < 0.1
        z = resampled(answer)
        torch.testing.assert_close(z.mean(0), exact.loc, atol=0.03, rtol=0)
        torch.testing.assert_close(torch.cov(z.mT).reshape(dim, dim), cov, atol=0.008, rtol=0)
        assert answer.q.log_prob(answer.z[None]).shape == (1, len(answer.z)) == (1, report.n_draws)
        torch.testing.assert_close(answer.q.log_prob(answer.z[None])[0], answer.log_q)

    def test_what_is_nearly_a_gaussian_is_refitted(self):
        """A slight bend: the Gaussian's own draws lead to a mixture, before any is sought."""

        def bent(theta):
            y = 3 * theta
            straight = torch.cat([y[:, :1], y[:, 1:2] - 0.3 * y[:, :1].square(), y[:, 2:]], 1)
            return 3.0 + standard(4).log_prob(straight) + 4 * math.log(3)

        answers = []
        for seed in range(4):
            torch.manual_seed(seed)
            (now,) = looking.look(group_of(bent, 4))
            assert matching.gaussian(now) == []
            (record,) = now.records
            assert record.answer is not None and within_errors(record.answer[1], 3.0)
            answers.append(record.answer)
        assert "a mixture" in [rung for rung, _ in answers]
        assert {answer.report.status for _, answer in answers} <= set(GOOD)

    def test_four_modes(self):
        answer = climb(target_of(four))
        assert answer.report.rung == "a mixture" and answer.report.status in GOOD
        assert within_errors(answer, 3.0) and answer.report.log_evidence_se < 0.02
        z = resampled(answer)
        near = torch.cdist(z, FOUR.loc[0]).argmin(1)
        masses = torch.bincount(near, minlength=4).double() / len(z)
        torch.testing.assert_close(masses, FOUR.log_weights[0].exp(), atol=0.02, rtol=0)
        assert any("Gaussian" in line for line in answer.report.story)

    @pytest.mark.parametrize(("log_p", "dim"), [(banana, 2), (funnel, 2), (funnel, 3)])
    def test_bends_and_funnels(self, log_p, dim):
        answer = climb(target_of(log_p, dim))
        assert answer.report.status in GOOD
        assert answer.report.rung in ("a bent Gaussian", "a mixture", "a flow", "a bridged mixture")
        assert within_errors(answer, 3.0) and answer.report.log_evidence_se < 0.05
        z = resampled(answer)
        assert float(z[:, 0].mean()) == pytest.approx(0.0, abs=0.15)
        assert float(z[:, 0].std()) == pytest.approx(1.0, abs=0.1)

    def test_a_constant_of_a_million_changes_nothing_but_the_evidence(self):
        torch.manual_seed(3)
        plain = climb(target_of(four)).report
        torch.manual_seed(3)
        shifted = climb(target_of(lambda theta: four(theta) + 1e6)).report
        assert (shifted.status, shifted.rung) == (plain.status, plain.rung)
        assert shifted.log_evidence == pytest.approx(plain.log_evidence + 1e6, abs=0.05)

    def test_what_it_says_on_the_way(self):
        said: list[str] = []
        climb(target_of(four), say=said.append)
        assert said == ["look", "gaussian", "bent", "mixture"]

    def test_a_start_that_is_right_is_used(self):
        narrow = known([1.0], [[2.0, 2.0]], 0.3)
        start = around(narrow.sample(500))
        answer = climb(target_of(lambda theta: narrow.log_prob(theta[None])[0]), start=start)
        assert answer.report.status in GOOD and within_errors(answer, 0.0)


class TestWithoutGradient:
    @pytest.mark.parametrize(
        "log_p", [lambda theta: four(theta.detach()), lambda theta: four(theta).detach()]
    )
    def test_it_walks(self, log_p):
        target = target_of(log_p)
        answer = climb(target)
        assert "the potential has no useful gradient" in answer.report.story
        assert target.n_gradients == 0
        assert answer.report.rung in ("a mixture", "a bridged mixture") and answer.report.status in GOOD
        assert within_errors(answer, 3.0)

    def test_a_likelihood_in_steps(self):
        """Counts: round(3 z_0) is seen with noise; the evidence is a sum over steps."""

        def log_p(theta):
            return standard(2).log_prob(theta) - 0.5 * ((3 * theta[:, 0]).round() - 2).square()

        answer = climb(target_of(log_p))
        k = torch.arange(-30, 31, dtype=torch.float64)
        mass = torch.special.ndtr((k + 0.5) / 3) - torch.special.ndtr((k - 0.5) / 3)
        exact = float((mass * (-0.5 * (k - 2).square()).exp()).sum().log())
        assert answer.report.status in GOOD and within_errors(answer, exact)
        assert answer.report.log_evidence_se < 0.02


class TestNotFinite:
    @pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
    def test_nowhere(self, value):
        with pytest.raises(
            ValueError, match=r"^`potential_fn`: expected finite values at draws of the prior"
        ):
            climb(target_of(lambda theta: 0 * theta.sum(-1) + value))

    @pytest.mark.parametrize("bad", [math.nan, -math.inf])
    def test_regions(self, bad):
        """Half of a Gaussian; the truth is the other half of it."""

        def log_p(theta):
            return torch.where(theta[:, 0] > 0.5, standard(2).log_prob(theta), bad)

        answer = climb(target_of(log_p))
        inside = 0.5 * math.erfc(0.5 / math.sqrt(2))
        report = answer.report
        assert within_errors(answer, math.log(inside)) and report.log_evidence_se < 0.05
        z = resampled(answer)
        assert bool((z[:, 0] > 0.5).all())
        mean = math.exp(-0.125) / math.sqrt(2 * math.pi) / inside
        assert float(z[:, 0].mean()) == pytest.approx(mean, abs=0.05)
        if math.isinf(bad):
            assert report.status in GOOD
        else:
            assert report.status == "suspect"
            assert report.sentence.startswith("the potential is NaN or +inf at ")
            assert len(report.story) <= 1  # no dearer way would mend it
        assert report.n_nonfinite == int((answer.z[:, 0] <= 0.5).sum()) > 0
        assert report.kl_reverse == math.inf and max(map(len, str(report).splitlines())) < 300


class TestSmallSupport:
    """A ball that holds 5e-4 of a box: hardly any of the explorer's own draws would be in it."""

    @staticmethod
    def ball(theta: Tensor) -> Tensor:
        inside = (torch.special.ndtr(theta) - 0.7).norm(dim=-1) < 0.1
        return torch.where(inside, 0.0, -torch.inf) - 0.5 * theta.square().sum(-1)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_explorer_starts_from_the_draws_that_can_be_used(self, seed):
        torch.manual_seed(seed)
        answer = climb(target_of(self.ball, 4))
        assert answer.report.status in GOOD
        volume = math.log(math.pi**2 / 2 * 0.1**4) + 2 * math.log(2 * math.pi)
        assert answer.report.log_evidence == pytest.approx(volume, abs=0.04)
        u = torch.special.ndtr(resampled(answer)) - 0.7
        assert (u.norm(dim=-1) / 0.1).pow(4).mean() == pytest.approx(0.5, abs=0.03)


class TestPriorThatSees:
    """Where hundreds of the prior's draws lie in the posterior no particle need be carried there."""

    @pytest.mark.parametrize(("sd", "sent"), [(0.2, False), (0.01, True)])
    def test_particles_are_sent_only_where_the_draws_are_few(self, sd, sent, monkeypatch):
        where = []
        monkeypatch.setattr(climbing, "explore", lambda *a, **k: where.append(a) or explore(*a, **k))
        torch.manual_seed(0)
        four = known([0.4, 0.3, 0.2, 0.1], [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], sd)
        answer = climb(target_of(lambda theta: four.log_prob(theta[None])[0]))
        assert bool(where) is sent
        assert answer.report.status in GOOD and within_errors(answer, 0.0)
        z = resampled(answer)
        assert float((z > 0).all(-1).double().mean()) == pytest.approx(0.4, abs=0.03)


class TestFirstMixtures:
    """Particles are fitted where matched Gaussians do not do, with more components where modes are many."""

    @pytest.mark.parametrize("modes", [4, 36])
    def test_what_is_fitted_to_particles(self, modes, monkeypatch):
        asked = []

        def spied(*arguments: object, components: int) -> Mixture:
            asked.append(components)
            return from_particles(*arguments, components=components)

        monkeypatch.setattr(mixing, "from_particles", spied)
        side = round(math.sqrt(modes))
        axis = torch.linspace(-1.6, 1.6, side).double()
        places = torch.cartesian_prod(axis, axis).tolist()
        torch.manual_seed(0)
        grid = known([1 / modes] * modes, places, 0.1)
        answer = climb(target_of(lambda theta: grid.log_prob(theta[None])[0]))
        assert answer.report.status in GOOD and within_errors(answer, 0.0)
        if modes == 4:
            assert not asked and answer.report.ess_fraction > 0.9
        else:
            assert len(asked) == 1 and asked[0] > 24


class TestOnceMore:
    """A mixture that fails by its weights gets a refit before a flow is trained, and no second one."""

    @pytest.mark.parametrize(("passes", "flown"), [(1, False), (2, False), (3, True)])
    def test_the_flow_comes_after_two_failures(self, passes, flown, monkeypatch):
        asked, flights = [], []

        def certificate(now: Group, rung: str, *_: object, **__: object) -> Tensor:
            asked.append(rung)
            return now.all() if len(asked) == passes else ~now.all()

        monkeypatch.setattr(mixing, "certified", certificate)
        monkeypatch.setattr(ladder, "fly", lambda now, **_: flights.append(now) or [now])
        monkeypatch.setattr(ladder, "_bridge", lambda now: [])
        torch.manual_seed(3)
        climb(target_of(lambda theta: (0.7 * theta - theta.exp() - 0.01 * theta.square()).sum(-1), 4))
        if passes < 3:
            assert len(asked) == passes
        assert set(asked) == {"a mixture"} and bool(flights) is flown


class TestNearly:
    """Refits whose best trial has a third of the draws in effect: that flatters some of them."""

    @pytest.mark.parametrize(
        ("share", "khat", "first"), [(0.2, 0.7, "a flow"), (0.2, 0.3, "a mixture"), (0.4, 0.7, "a mixture")]
    )
    def test_once_more_before_a_certificate(self, share, khat, first, monkeypatch):
        asked = []
        now = group_of(lambda theta: standard(4).log_prob(theta), 4)
        now.records[0].count_modes = lambda: 1
        q = known([1.0], [[0.0] * 4], 1.0)
        flattered = replace(now.pool.draw(q, 4096), share=torch.tensor([0.35]), khat=torch.tensor([0.6]))
        fresh = replace(flattered, share=torch.tensor([share]), khat=torch.tensor([khat]))
        monkeypatch.setattr(Pool, "draw", lambda *_: fresh)
        monkeypatch.setattr(mixing, "refitted", lambda *_, **__: (q, flattered, flattered.share))
        monkeypatch.setattr(mixing, "fly", lambda now, **_: asked.append("a flow") or [now])
        monkeypatch.setattr(mixing, "certified", lambda now, rung, *_, **__: asked.append(rung) or now.all())
        mixing._refits(now, q, flattered)
        assert asked[0] == first


class TestRough:
    """4^8 ripples on a Gaussian: a smooth q has even weights, and few draws in effect."""

    @staticmethod
    def ripples(theta: Tensor) -> Tensor:
        return (torch.cos(18 * theta) - 4 * theta.square()).sum(-1)

    def test_more_draws_are_taken_where_few_are_in_effect(self):
        torch.manual_seed(1)
        report = climb(target_of(self.ripples, 8)).report
        assert report.status == "corrected" and report.ess_fraction < 0.122  # a flow fits no better
        assert report.ess >= 2000 and ALONE.draws < report.n_draws <= 4 * ALONE.draws
        grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
        known = 8 * float(torch.logsumexp(torch.cos(18 * grid) - 4 * grid.square(), 0) + math.log(8 / 40_000))
        assert report.log_evidence == pytest.approx(known, abs=4 * report.log_evidence_se)


class TestMissing:
    """A part that the explorer has seen and q misses, while all of q's own draws are content."""

    TWO = known([0.7, 0.3], [[-1.5, 0.0], [1.5, 0.0]], 0.1)
    HALF = known([1.0], [[-1.5, 0.0]], 0.1)

    def climbing(self, seen: bool = True) -> Group:
        now = group_of(lambda theta: self.TWO.log_prob(theta[None])[0])
        now.seen = explore(now.target, 1024) if seen else None
        return now

    def test_its_share_is_told(self):
        now = self.climbing()
        log_z = torch.tensor([0.7]).double().log()  # what q's draws say
        share = float(missing(now, defended(self.HALF), log_z))
        assert share == pytest.approx(0.3 / 0.7, rel=0.15)
        assert float(missing(now, defended(self.TWO), torch.zeros(1).double())) < 0.005

    def test_a_q_that_lacks_all_but_nothing_keeps_a_little(self):
        """e^45 times what q has: in float64 a share of 1, which would leave q a weight of log 0."""
        now = self.climbing()
        assert float(missing(now, defended(self.HALF), torch.tensor([-45.0]).double())) > 1e17
        assert now.elsewhere is not None and now.elsewhere.log_weights.isfinite().all()

    def test_what_is_enough_is_not_sought_elsewhere(self, monkeypatch):
        now = self.climbing()
        monkeypatch.setattr(witnesses, "missing_uphill", lambda *_: pytest.fail("it was"))
        assert float(missing(now, defended(self.HALF), torch.tensor([0.7]).double().log(), enough=0.1)) > 0.3
        with pytest.raises(pytest.fail.Exception, match="it was"):
            missing(now, defended(self.HALF), torch.tensor([0.7]).double().log(), enough=0.6)

    def test_no_q_that_misses_it_is_called_good(self):
        now = self.climbing()
        assert not certified(now, "half of it", defended(self.HALF), spare=0.1)
        (record,) = now.records
        assert record.answer is not None and record.answer[1].report.status == "suspect"
        said = record.answer[1].report.sentence
        assert re.match(r"an independent exploration has seen about (29|30|31)", said)
        assert len(record.story) == 1 and record.story[0].startswith("half of it had k-hat")
        assert certified(now, "all of it", defended(self.TWO), spare=0.1)
        assert record.answer[0] == "all of it" and record.answer[1].report.status in GOOD

    def test_without_an_exploration_nobody_would_know(self, monkeypatch):
        """What the check is for: the weights alone are content."""
        monkeypatch.setattr(witnesses, "missing_uphill", lambda *_: torch.zeros(1).double())
        assert certified(self.climbing(seen=False), "half of it", defended(self.HALF), spare=0.1)

    def test_lines_through_what_is_known_tell_of_what_differs_in_one_entry(self):
        now = self.climbing(seen=False)
        assert not certified(now, "half of it", defended(self.HALF), spare=0.1)
        (record,) = now.records
        assert record.doubted and record.answer is not None
        assert re.search(r"seen about (29|30|31)", record.answer[1].report.sentence)

    def test_a_q_that_spoke_is_filled_with_what_is_missing(self):
        now = self.climbing(seen=False)
        trial = now.pool.draw(defended(self.HALF), 4096)
        assert mixing._filled(now, self.HALF, trial)[0] is self.HALF  # nothing was said against it
        now.records[0].doubted = True
        q, after = mixing._filled(now, self.HALF, trial)
        assert q.loc.shape[1] > 1 and float(after.share) > 0.9
        assert float(after.log_z) == pytest.approx(0.0, abs=0.02)

    def test_mass_next_to_q_is_noticed_without_an_exploration(self):
        wide = standard(2)
        now = group_of(wide.log_prob)
        q = known([1.0], [[0.0, 0.0]], 0.45)
        assert not certified(now, "too narrow", q, spare=0.1)
        (record,) = now.records
        assert record.answer is not None and record.answer[1].report.status in ("suspect", "failed")

    @pytest.mark.parametrize("seed", range(2))
    def test_a_narrow_mode_beside_a_wide_one(self, seed):
        """The whole climb: both found, or not called good."""
        torch.manual_seed(seed)
        both = Mixture(
            torch.tensor([[0.6, 0.4]]).double().log(),
            torch.tensor([[[0.0, 0.0], [1.5, 1.5]]]).double(),
            torch.stack([0.8 * torch.eye(2), 0.06 * torch.eye(2)])[None].double(),
        )
        answer = climb(target_of(lambda theta: both.log_prob(theta[None])[0]))
        z = resampled(answer)
        small = float(((z - 1.5).norm(dim=-1) < 0.25).double().mean())
        right = abs(small - 0.401) < 0.03 and within_errors(answer, 0.0)
        assert right or answer.report.status not in GOOD


class TestLimits:
    @pytest.mark.parametrize("n", [1, 30, 4095, 4096, 4500, 6000, 12_000, 20_000, 40_000, 60_000])
    def test_no_more_evaluations_than_allowed(self, n):
        rows = 0

        def log_p(theta):
            nonlocal rows
            rows += len(theta)
            return banana(theta)

        target = target_of(log_p, max_evals=n)
        answer = climb(target)
        report = answer.report
        assert rows == target.budget.evals == target.n_values + target.n_gradients <= n
        assert report.stop_reason == f"reached max_potential_evals = {n}"
        assert report.status not in GOOD and report.rung
        if n < 25:
            assert rows == 0 and report.rung == "the prior" and report.status == "failed"
            assert report.n_nonfinite == 0  # it was not asked
        elif n <= 4096:
            assert rows == n == report.n_draws and report.rung == "the prior"
            assert n == 30 or abs(report.log_evidence - 3) < 0.5
        assert len(str(report).splitlines()) <= 10

    def test_the_draws_of_the_look_are_better_than_a_q_that_lacks_a_mode(self):
        """A Gaussian fits one mode of four; the prior's draws have all, and more than twice the evidence."""
        modes = known([0.25] * 4, [[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]], 0.3)
        box = BoxUniform(-5 * torch.ones(2).double(), 5 * torch.ones(2).double())
        log_p = lambda theta: modes.log_prob(theta[None])[0]  # noqa: E731
        target = Target(log_p, coordinates(box), Budget(max_evals=16_000))
        answer = climb(target)
        assert answer.report.rung == "the prior" and answer.report.status == "suspect"
        assert answer.report.sentence.startswith("the fit ended early: reached max_potential_evals = 16000.")
        assert answer.report.log_evidence == pytest.approx(0.0, abs=0.5)
        theta = coordinates(box).to_theta(resampled(answer))[0]
        near = torch.cdist(theta, modes.loc[0]).argmin(1)
        assert float(torch.bincount(near, minlength=4).amin()) > 100

    def test_slow_potentials_do_not_overrun_their_time(self):
        """The clock is looked at after a tenth of the time, and what was evaluated until then is kept."""
        now, rows = [0.0], []

        def log_p(theta):
            now[0] += 0.01 * len(theta)
            rows.append(len(theta))
            return four(theta)

        target = target_of(log_p, max_seconds=20.0)
        target.budget.started = 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(budget.time, "monotonic", lambda: now[0])
            answer = climb(target)
        assert now[0] < 24 and rows[0] == 64
        assert answer.report.n_draws == sum(rows) and answer.report.stop_reason == "reached max_seconds = 20"
        assert math.isfinite(answer.report.log_evidence)

    def test_seconds(self):
        answer = climb(target_of(banana, max_seconds=0.0))
        assert answer.report.stop_reason == "reached max_seconds = 0" and answer.report.status == "failed"

    @pytest.mark.parametrize("calls", [0, 1, 5, 30])
    def test_interrupted(self, calls):
        done = 0

        def log_p(theta):
            nonlocal done
            done += 1
            if done > calls:
                raise KeyboardInterrupt
            return banana(theta)

        answer = climb(target_of(log_p))
        assert answer.report.stop_reason == "interrupted" and answer.report.status not in GOOD
        assert answer.z.shape[1] == 2 and bool(answer.log_q.isfinite().all())
        assert math.isfinite(answer.report.log_evidence) == (calls > 0)  # what was drawn is kept

    def test_what_was_there_before_the_end_is_kept_with_a_doubt(self):
        target = target_of(banana, max_evals=90_000)
        answer = climb(target)
        if answer.report.stop_reason:
            assert answer.report.status not in GOOD
        assert answer.report.ess_fraction > 0.05 and within_errors(answer, 3.0)

    def test_errors_of_the_potential_come_through(self):
        def log_p(theta):
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            climb(target_of(log_p))


class TestMixturesThatFail:
    """One mode in six dimensions: a flow is to come."""

    @pytest.fixture
    def now(self) -> Group:
        target = target_of(funnel, 6)
        return Group(target, [Record()], ALONE, Pool(target))

    @pytest.mark.parametrize(
        ("doubted", "again", "more"), [(True, 2, True), (True, 1, False), (False, 1, False)]
    )
    def test_what_lacks_mass_that_was_seen_is_refitted_once(self, now, doubted, again, more, monkeypatch):
        """Of one mode, in many dimensions: then it is a flow's turn."""

        def failing(group, rung, q, *, spare):
            group.records[0].doubted = doubted
            return torch.tensor([False])

        monkeypatch.setattr(mixing, "certified", failing)
        q = known([1.0], [[0.0] * 6], 1.0)
        trial = replace(now.pool.draw(q, 4096), share=torch.tensor([0.6]).double())
        (left,) = mixing._certified_mixture(now, q, trial, again=again)
        assert left is now and (len(now.pool.proposals) > 1) == more

    @pytest.mark.parametrize(("steady", "first"), [(0.1, "a flow"), (0.5, "a mixture")])
    def test_a_flow_comes_first_where_refits_are_unsteady(self, now, steady, first, monkeypatch):
        q, tried = known([1.0], [[0.0] * 6], 1.0), []
        trial = replace(now.pool.draw(q, 4096), share=torch.tensor([0.6]).double())
        found = (q, trial, torch.tensor([steady]).double())
        monkeypatch.setattr(mixing, "refined", lambda *_, **__: found)
        monkeypatch.setattr(mixing, "fly", lambda *_, **__: tried.append("a flow") or [])
        monkeypatch.setattr(mixing, "_certified_mixture", lambda *_, **__: tried.append("a mixture") or [])
        assert mixing._refits(now, q, trial) == [] and tried == [first]
