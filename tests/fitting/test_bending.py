"""The rung of bends on posteriors that are known: chains, bananas and funnels, and what it leaves alone."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from visbi.certificate import WeightedDraws
from visbi.families.bent import BentBody
from visbi.fitting import bending, looking, matching, mixing
from visbi.fitting.bend import BentProposal, bent_around
from visbi.fitting.bending import bent, bent_at_sight
from visbi.fitting.climbing import ALONE, SIDE_BY_SIDE, Group, Record
from visbi.fitting.ladder import Answer, climb
from visbi.fitting.pool import Pool, Trial
from visbi.fitting.target import ManyTargets, Target
from visbi.priors import coordinates

GOOD = ("ok", "corrected")


def normal(scales: list[float]) -> Independent:
    return Independent(Normal(torch.zeros(len(scales)).double(), torch.tensor(scales).double()), 1)


def chain(theta: Tensor, noise: float = 0.3) -> Tensor:
    """theta_1 ~ N(0, 1), each of the others ~ N(the square of the one before, noise^2)."""
    log_p = Normal(0.0, 1.0).log_prob(theta[:, 0])
    return log_p + Normal(theta[:, :-1].square(), noise).log_prob(theta[:, 1:]).sum(-1)


def banana(theta: Tensor) -> Tensor:
    straight = torch.cat([theta[:, :1], (theta[:, 1:2] - theta[:, :1].square()) / 0.1, theta[:, 2:]], 1)
    return standard(theta.shape[1]).log_prob(straight) - math.log(0.1)


def two_modes(theta: Tensor) -> Tensor:
    each = [standard(theta.shape[1]).log_prob((theta - side) / 0.2) for side in (1.0, -1.0)]
    return torch.logaddexp(*each) - math.log(2) - theta.shape[1] * math.log(0.2)


def standard(d: int) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(d).double(), torch.eye(d).double())


def group_of(log_p, scales: list[float], effort=ALONE) -> Group:
    target = Target(log_p, coordinates(normal(scales)))
    (now,) = looking.look(Group(target, [Record()], effort, Pool(target)))
    return now


def right(answer: Answer) -> bool:
    report = answer.report
    return report.status in GOOD and abs(report.log_evidence) < 4 * report.log_evidence_se + 1e-3


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scales", [[3.0, 5.0, 30.0], [3.0, 5.0, 30.0, 1000.0]])
def test_a_chain_of_parabolas_to_its_end(scales: list[float], seed: int):
    """A hundredth of the mass lies 5,000 noise widths beyond the middle: no other rung came there."""
    torch.manual_seed(seed)
    answer = climb(Target(chain, coordinates(normal(scales))))
    assert right(answer) and answer.report.rung == "a bent Gaussian"
    draws = WeightedDraws(answer.z, answer.ell, answer.log_q).resampled(20_000)
    last = draws[:, -1] * scales[-1]
    exact = 2.5758 ** (2 ** (len(scales) - 1))  # the square of the square .. of 99 % of |N(0, 1)|
    assert float(last.quantile(0.99)) == pytest.approx(exact, rel=0.4)


def test_a_banana():
    torch.manual_seed(0)
    answer = climb(Target(banana, coordinates(normal([2.0] * 6))))
    assert right(answer) and answer.report.rung == "a bent Gaussian" and answer.report.ess_fraction > 0.7


def test_without_a_gradient():
    torch.manual_seed(0)
    answer = climb(Target(lambda theta: banana(theta.detach()), coordinates(normal([2.0] * 3))))
    assert right(answer) and answer.report.n_gradients < 1000


def test_a_shell_gets_a_mixture():
    """Each entry's scale follows from the squares of the others; at the poles that is no Gaussian."""

    def shell(theta: Tensor) -> Tensor:
        return -0.5 * ((theta.square().sum(-1).sqrt() - 1.0) / 0.1).square()

    torch.manual_seed(0)
    answer = climb(Target(shell, coordinates(normal([1.0] * 6))))
    r = torch.linspace(0, 2, 100_001).double()
    exact = torch.trapezoid(r**5 * (-0.5 * ((r - 1.0) / 0.1).square()).exp(), r) * math.pi**3
    report = answer.report
    assert report.status in GOOD and report.rung == "a bent mixture"
    assert abs(report.log_evidence - math.log(float(exact))) < 4 * report.log_evidence_se


class TestLeftAlone:
    def test_two_modes_are_no_bend(self):
        torch.manual_seed(0)
        now = group_of(two_modes, [1.0] * 4)
        now.explore(1024)
        before = now.target.n_values + now.target.n_gradients
        assert bent(now) == [now] and now.target.n_values + now.target.n_gradients == before
        assert not now.records[0].story and now.records[0].best is None

    @pytest.mark.parametrize("scales", [[2.0], [2.0, 2.0]])
    def test_the_plane(self, scales: list[float]):
        now = group_of(lambda theta: banana(torch.cat([theta, theta], 1)[:, :2]), scales)
        assert bent(now) == [now] and now.seen is None

    def test_what_is_straight(self):
        now = group_of(lambda theta: standard(4).log_prob(10 * theta), [1.0] * 4)
        assert bent(now) == [now] and not now.records[0].bent


class TestSideBySide:
    """A banana, two modes and a Gaussian."""

    def group(self) -> Group:
        def log_p(theta: Tensor, which: Tensor) -> Tensor:
            each = (banana, two_modes, lambda theta: standard(4).log_prob(10 * theta))
            return torch.stack([each[i](rows) for i, rows in zip(which.tolist(), theta, strict=True)])

        torch.manual_seed(0)
        target = ManyTargets(log_p, coordinates(normal([1.2] * 4)), 3)
        records = [Record() for _ in range(3)]
        (now,) = looking.look(Group(target, records, SIDE_BY_SIDE, Pool(target)))
        return now

    def test_what_is_bent_is_answered_and_the_others_are_left(self):
        now = self.group()
        rest = bent(now)
        assert sum(len(group.records) for group in rest) == 2
        first, *others = now.records
        assert first.bent and first.answer is not None and first.answer[0] == "a bent Gaussian"
        report = first.answer[1].report
        assert report.status in GOOD and abs(report.log_evidence) < 4 * report.log_evidence_se
        assert all(record.answer is None for record in others)

    def test_at_sight_particles_are_sent_for_what_is_bent_alone(self):
        now = self.group()
        before = now.target.tally.gradients.clone()
        bent_at_sight(now)
        assert ((now.target.tally.gradients - before) > 0).tolist() == [True, False, False]
        assert now.records[0].answer is not None

    def test_each_is_certified_by_its_name(self, monkeypatch):
        """A mixture for two modes, a Gaussian for the others; what fails is asked once more, of its kind."""
        now, asked = self.group(), []

        def certificate(now: Group, name: str, q: BentProposal, **_: object) -> Tensor:
            asked.append((name, len(now.records), len(q.noise.loc)))
            return ~now.all()

        now.explore(256)
        assert now.seen is not None
        weights = torch.full((3, 256), 1 / 256).double()
        q, _ = bent_around(now.seen.z, weights, mixed=torch.tensor([False, True, False]))
        trial = now.pool.draw(q, 512)
        monkeypatch.setattr(bending, "certified", certificate)
        monkeypatch.setattr(bending, "_regressed", lambda *_: (q, trial, torch.ones(3)))
        rest = bending._answers(now, q, trial)
        assert asked == 2 * [("a bent mixture", 1, 1), ("a bent Gaussian", 2, 2)]
        assert sorted(len(group.records) for group in rest) == [1, 2]
        assert all(record.regressed for record in now.records)

    def test_once_is_enough(self):
        now = self.group()
        for record in now.records:
            record.regressed = True
        assert bent(now) == [now] and now.seen is None

    def test_at_sight_the_plane_is_left_alone(self):
        now = group_of(lambda theta: banana(torch.cat([theta, theta], 1)[:, :2]), [2.0, 2.0], SIDE_BY_SIDE)
        assert bent_at_sight(now) == [now]


@pytest.mark.parametrize("seed", range(3))
def test_a_second_mode_in_the_neck(seed: int):
    """A tenth of a funnel's mass, e^-5 as wide as its mouth: no particle came there."""

    def log_p(theta: Tensor) -> Tensor:
        s = theta[:, 0]
        above, below = Normal(0.0, 1.0).log_prob(s), Normal(-5.0, 0.5).log_prob(s)
        each = Normal(0.0, s.exp()[:, None]).log_prob(theta[:, 1:]).sum(-1)
        return torch.logaddexp(above + math.log(0.9), below + math.log(0.1)) + each

    torch.manual_seed(seed)
    answer = climb(Target(log_p, coordinates(normal([6.0] * 6))))
    assert right(answer)
    draws = WeightedDraws(answer.z, answer.ell, answer.log_q).resampled(4000)
    assert float((draws[:, 0] * 6.0 < -3.5).double().mean()) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(("steady", "asked"), [(0.29, False), (0.31, True)])
def test_what_comes_out_now_good_now_bad_gets_no_certificate(steady: float, asked: bool, monkeypatch):
    torch.manual_seed(0)
    now, certificates = group_of(banana, [2.0] * 3), []
    regressed = bending._regressed
    monkeypatch.setattr(
        bending, "_regressed", lambda *a: (*regressed(*a)[:2], torch.tensor([steady]).double())
    )
    monkeypatch.setattr(bending, "certified", lambda now, *a, **k: certificates.append(a) or ~now.all())
    assert bent(now) == [now] and bool(certificates) is asked
    assert bool(now.records[0].story) is not asked


@pytest.mark.parametrize(("is_bent", "unsteady"), [(True, True), (False, False)])
def test_even_weights_are_no_proof_of_what_is_bent(is_bent: bool, unsteady: bool):
    now = group_of(banana, [2.0] * 3)
    now.records[0].bent = is_bent
    log_q = torch.rand(1, 1000).double()
    trial = Trial.of(torch.zeros(1, 1000, 3).double(), torch.zeros(1, 1000).double(), log_q)
    assert float(trial.khat) < 0.5
    assert bool(mixing._unsteady(now, trial, torch.tensor([0.2]).double())) is unsteady


def test_it_comes_between_the_gaussian_and_the_mixture():
    torch.manual_seed(0)
    now = group_of(banana, [2.0] * 3)
    (rest,) = matching.gaussian(now)
    assert rest is now and bent(now) == []
    assert now.records[0].answer is not None and now.records[0].answer[0] == "a bent Gaussian"


def test_the_body():
    from visbi.fitting.auto import _body

    torch.manual_seed(0)
    answer = climb(Target(banana, coordinates(normal([2.0] * 3))))
    body = _body(answer.q)
    assert isinstance(body, BentBody)
    torch.testing.assert_close(body.log_prob(answer.z), answer.log_q, atol=1e-6, rtol=1e-6)
