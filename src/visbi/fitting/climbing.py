"""What a climb knows: of each of F posteriors that are fitted side by side, and of all of them together."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from visbi.certificate.report import Report, certify_many
from visbi.certificate.rows import cleaned, pareto_smooth
from visbi.certificate.weights import resample
from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.budget import BudgetReached
from visbi.fitting.explore import MOVES, Exploration, drift, explore
from visbi.fitting.hidden import with_hidden
from visbi.fitting.mixture import defended
from visbi.fitting.pool import BELIEVED, DISCOUNT, Pool, Proposal, Trial
from visbi.fitting.refine import POINTS, ROUNDS, TRIAL, around
from visbi.fitting.target import Target
from visbi.fitting.uphill import too_low, tops

__all__ = ["ALONE", "SEARCHED", "SIDE_BY_SIDE", "Answer", "Effort", "Group", "Record"]

LOW = math.log(20.0)  # nats by which q is much too low somewhere
FEW = 5e-3  # share of the mass that may lie there
SEARCHED = 5
"""Dimensions up to which eight times the draws of the prior meet modes of two thirds the width, or less."""
_GOOD = ("ok", "corrected")
_ACCUSERS = 2  # particles; a mode of a few percent may have lost all but so many of its own on the way
_FEW_USABLE = 0.1  # share of the prior's draws
_MANY = 2000.0  # draws in effect that a user may ask for
_MORE = 3  # times as many draws where there are fewer
_EVEN = 0.5  # k-hat
_WITNESSES = 20  # points in effect; fewer may be a tail's chance
_MISSING = 0.02  # share of the mass beyond which an answer is in doubt
_FLOW_DIMENSIONS = 4
_DRIFT = 5.0  # standard errors


@dataclass(frozen=True)
class Effort:
    """How much a climb spends on its steps.

    Attributes:
        look: draws of the prior that are looked at first, and
        search: so many more of them in `SEARCHED` dimensions or fewer, for modes that hardly any draw meets;
            in more dimensions
        inward: draws that are moved inwards: all of the prior's lie near one distance from its middle there,
            and the slopes that lead to a narrow mode may lie nearer.
        keep_look: whether they count among the points that mixtures are fitted to.
        particles: of the explorer; `confirming` of them where a Gaussian already fits, and none where
            the look's draws bear witness.
        starts: from which Gaussians are matched, with
        start_batch, start_iters: draws in each of so many iterations; None is `refine.matched`'s own number.
        first_batch: the same for the Gaussian that is matched from the prior.
        trial: draws that say how good a proposal is. points: that mixtures are fitted to, in
        rounds: of refits at most; least: of them, for each dimension, in effect, or else they are tempered.
        draws: that a certificate rests on.
        witnesses: draws of what accuses q.
        drifters, drift_rounds: draws that are moved to see whether they stay where they are, and how often.
    """

    look: int = 4096
    search: int = 28_672
    inward: int = 12_288
    keep_look: bool = False
    particles: int = 1024
    confirming: int = 512
    starts: int = 24
    start_batch: int | None = None
    start_iters: int = 10
    first_batch: int | None = None
    trial: int = TRIAL
    points: int = POINTS
    rounds: int = ROUNDS
    least: float = 0.0
    draws: int = 16_384
    witnesses: int = 2048
    drifters: int = 512
    drift_rounds: int = 5


ALONE = Effort()
"""Of a fit to one observation."""

SIDE_BY_SIDE = Effort(
    look=2048,
    search=0,
    inward=0,
    keep_look=True,
    particles=256,
    confirming=0,
    starts=8,
    start_batch=16,
    start_iters=6,
    first_batch=64,
    trial=512,
    points=1024,
    rounds=7,
    least=20.0,
    draws=4096,
    witnesses=512,
    drifters=128,
    drift_rounds=3,
)
"""Of the first climb of many fits; those that it does not answer climb alone."""


@dataclass(frozen=True)
class Answer:
    """What the ladder found.

    Attributes:
        q: in coordinates z.
        z, ell, log_q: fresh draws of q (N, d), the target, -inf where it is not finite, and log q at them
            (N,): what the certificate rests on.
        report: the certificate, with what the ladder has to say.
    """

    q: Proposal
    z: Tensor
    ell: Tensor
    log_q: Tensor
    report: Report


@dataclass
class Record:
    """What is known of one fit.

    Attributes:
        story: why the rungs so far did not answer.
        count_modes: says how many there seem to be, if that is asked for.
        flown: whether a flow was tried.
        best: the best q so far (F = 1) with its rung and trial.
        answer: the best that has a certificate, with its rung, and
        rank: how good that is; what leaves out mass that was seen elsewhere is worse than what may do so.
        carried: particles that came from the best q.
        doubted: whether something beside its weights spoke against the q that was certified last.
        broken: share of the answer's draws at which the potential is NaN or +inf.
    """

    story: list[str] = field(default_factory=list)
    count_modes: Callable[[], int] = lambda: 1
    flown: bool = False
    best: tuple[str, Proposal, Trial] | None = None
    answer: tuple[str, Answer] | None = None
    rank: tuple[int, bool, float] = (-1, False, 0.0)
    carried: Exploration | None = None
    doubted: bool = False
    broken: float = 0.0

    @cached_property
    def modes(self) -> int:
        """How many there seem to be."""
        return self.count_modes()


@dataclass
class Group:
    """Fits that climb together.

    Attributes:
        target: their F potentials.
        records: what is known of each, F of them.
        effort: how much to spend.
        pool: all points so far.
        start: earlier q, or moments of draws, to begin with beside the usual starts.
        gradient: whether the potential has one that is of use.
        starts: (F, S, d) promising draws of the prior, and
        usable: (F, S) whether the potential is finite there.
        searched: (F, N, d) draws of the prior, some of them moved inwards, and
        found: (F, N) ell at them, -inf where it is not finite.
        n_prior: how many of them were not moved.
        seen: what the explorer saw.
        elsewhere: the last q that lacked mass, with Gaussians where that was found; of one fit alone.
    """

    target: Target
    records: list[Record]
    effort: Effort
    pool: Pool
    start: Mixture | None = None
    gradient: bool = True
    starts: Tensor = field(default_factory=lambda: torch.zeros(0))
    usable: Tensor = field(default_factory=lambda: torch.zeros(0))
    searched: Tensor = field(default_factory=lambda: torch.zeros(0))
    found: Tensor = field(default_factory=lambda: torch.zeros(0))
    n_prior: int = 0
    seen: Exploration | None = None
    elsewhere: Mixture | None = None

    @property
    def alone(self) -> bool:
        """Whether all that there is may be spent."""
        return self.effort == ALONE

    @property
    def like(self) -> dict[str, object]:
        """dtype and device of what is computed."""
        return {"dtype": torch.float64, "device": self.target.device}

    def only(self, which: Tensor) -> "Group":
        """The fits `which`, (F,) bool; their records are shared."""
        if bool(which.all()):
            return self
        return Group(
            self.target.only(which),
            [record for record, there in zip(self.records, which.tolist(), strict=True) if there],
            self.effort,
            self.pool.of_fits(which),
            None if self.start is None else self.start.of_fits(which),
            self.gradient,
            self.starts[which],
            self.usable[which],
            self.searched[which] if len(self.searched) else self.searched,
            self.found[which] if len(self.found) else self.found,
            self.n_prior,
            None if self.seen is None else self.seen.of_fits(which),
            None if self.elsewhere is None else self.elsewhere.of_fits(which),
        )

    def parts(self, which: Tensor) -> tuple["Group | None", "Group | None"]:
        """The fits `which` and the others, None where there are none."""
        chosen, others = which, ~which
        return tuple(self.only(each) if bool(each.any()) else None for each in (chosen, others))  # type: ignore[return-value]

    def tell(self, which: Tensor, what: Callable[[int], str] | str) -> None:
        """Add to the stories of the fits `which`."""
        for i, record in enumerate(self.records):
            if bool(which[i]):
                record.story.append(what if isinstance(what, str) else what(i))

    def all(self) -> Tensor:
        """(F,) True."""
        return torch.ones(len(self.records), dtype=torch.bool, device=self.target.device)

    def one(self, i: int) -> Tensor:
        """(F,) True at fit i alone."""
        return torch.arange(len(self.records), device=self.target.device) == i

    def singles(self) -> list["Group"]:
        """Each fit as a group of its own."""
        return [self.only(self.one(i)) for i in range(len(self.records))]

    def where(self, holds: Callable[[Record], bool]) -> Tensor:
        """(F,) of which fits the record is such."""
        return torch.tensor([holds(record) for record in self.records], device=self.target.device)

    def for_a_flow(self) -> Tensor:
        """(F,) whether a flow is to come that may fit better than any mixture: one mode, not in few."""
        none = not self.alone or self.target.dim < _FLOW_DIMENSIONS or not self.gradient
        return self.where(lambda record: not none and record.modes == 1 and not record.flown)

    def log_z(self) -> Tensor:
        """(F,) log-evidence by the best trials so far."""
        found = [0.0 if r.best is None else float(r.best[2].log_z) for r in self.records]
        return torch.tensor(found, **self.like)  # type: ignore[arg-type]

    def consider(self, rung: str, q: Proposal, trial: Trial) -> None:
        """Keep q where it is the best so far."""
        for i, record in enumerate(self.records):
            if record.best is None or float(trial.merit[i]) > float(record.best[2].merit):
                one = self.one(i)
                record.best = rung, q.of_fits(one), trial.of_fits(one)

    def certified(self, rung: str, q: Proposal, *, spare: float) -> Tensor:
        """(F,) whether q passes with draws to spare; what passes at all is kept.

        To spare are a share `spare` of the draws in effect, or many where their weights are even and a flow,
        which might have fitted better, was tried.
        """
        broken = self.target.broken
        trial = self.pool.draw(q, self.effort.draws)
        if self._too_few(trial):
            trial = trial.with_(self.pool.draw(q, _MORE * self.effort.draws))
        broken = (self.target.broken - broken) / trial.ell.shape[1]
        reports = [
            replace(report, n_searched=self.n_searched)
            for report in certify_many(trial.ell, trial.log_q, resampled=True)
        ]
        passed = torch.tensor([report.status in _GOOD for report in reports], device=self.target.device)
        doubted = [False] * len(reports)
        if bool(passed.any()):  # what the weights say is final where they are bad
            doubts = iter(self.only(passed).doubts(q.of_fits(passed), trial.of_fits(passed)))
            each = [next(doubts) if good else [] for good in passed.tolist()]
            reports = [_doubted(*pair) for pair in zip(reports, each, strict=True)]
            doubted = [bool(doubt) for doubt in each]
        for i, (record, report) in enumerate(zip(self.records, reports, strict=True)):
            answer = Answer(q.of_fits(self.one(i)), trial.z[i], trial.ell[i], trial.log_q[i], report)
            record.doubted = doubted[i]
            rank = _rank(report, doubted=doubted[i])
            if rank > record.rank:
                record.answer, record.rank, record.broken = (rung, answer), rank, float(broken[i])
            many = record.flown and report.khat < _EVEN and report.ess >= _MANY
            passed[i] = report.status in _GOOD and (report.ess_fraction >= spare or many)
            if not passed[i]:
                record.story.append(f"{rung} {_why(report)}")
        return passed

    def _too_few(self, trial: Trial) -> bool:
        """Whether weights are sound, but so few of a single fit's draws in effect that more are worth it."""
        n = trial.ell.shape[1]
        if not self.alone or self.target.fits > 1 or self.target.budget.left < _MORE * n:
            return False
        if bool(self.for_a_flow()):
            return False
        ess = n * float(trial.share)
        return float(trial.khat) < BELIEVED and _MANY / (1 + _MORE) <= ess < _MANY

    def doubts(self, q: Proposal, trial: Trial) -> list[list[str]]:
        """What speaks against each q beside its weights."""
        share = self.missing(q, trial.log_z, trial=trial)
        share = torch.maximum(share, self.missing_of_points(q, trial)).tolist()
        found: list[list[str]] = [
            [
                f"an independent exploration has seen about {100 * each / (1 + each):.1f} % of the "
                "posterior's mass where q has next to none. Run MCMC to be sure."
            ]
            if each > _MISSING
            else []
            for each in share
        ]
        try:
            smooth = pareto_smooth(cleaned(trial.log_w))[0]
            z = picked(trial.z, torch.stack([resample(row, self.effort.drifters) for row in smooth]))
            moved = drift(
                self.target,
                z,
                q.log_prob,
                gradient=self.gradient,
                rounds=self.effort.drift_rounds,
                step=None if self.seen is None else self.seen.step,
            ).tolist()
        except BudgetReached:
            left = "the budget left no room to check that resampled draws stay where they are."
            return [[*each, left] for each in found]
        carried = (
            "the posterior's own moves carry resampled draws to where q is too low: mass next to them is "
            "missing. Run MCMC to be sure."
        )
        return [[*each, carried] if by > _DRIFT else each for each, by in zip(found, moved, strict=True)]

    def explore(self, n: int, *, moves: int = MOVES) -> None:
        """Send n particles from the prior to the posterior of every fit; from those of its draws that can be
        used, where these are few.
        """
        usable = torch.isfinite(self.found) if len(self.found) else torch.ones(1, 1, dtype=torch.bool)
        share = usable.double().mean(1)
        start = None
        if bool(((share > 0) & (share < _FEW_USABLE)).all()):
            log_w = torch.where(usable, 0.0, -torch.inf)
            index = torch.stack([resample(row, n) for row in log_w])
            start = picked(self.searched, index), share.log()
        self.seen = explore(
            self.target, n, fits=self.target.fits, gradient=self.gradient, moves=moves, start=start
        )

    @property
    def n_searched(self) -> int:
        """Draws of the prior, for each fit, from which modes were looked for."""
        if self.n_prior:
            return self.n_prior
        return self.effort.look if self.effort.keep_look else 0 if self.seen is None else self.seen.z.shape[1]

    def missing(
        self, q: Proposal, log_z: Tensor, *, trial: Trial | None = None, enough: float = math.inf
    ) -> Tensor:
        """(F,) share of the posterior's mass where the explorer's particles, or the look's draws where there
        are none, and the searched draws of the prior say that q is much too low.

        Points alone are no proof: where an explorer mixes badly they sit where hardly any mass is. So a
        mixture fitted to those that accuse q is drawn from, and Gaussians matched at the tops to which they
        lead, and the mass there is weighed, less what the draws of q in `trial` find there. Where the first
        has found more than `enough` of every fit it is left at that.
        """
        share = torch.zeros_like(log_z)
        seen = self._seen()
        if seen is not None:
            share = self._missing_near(*seen, q, log_z, trial)
        if bool((share > enough).all()):
            return share
        if self.gradient and self.alone:
            share = torch.maximum(share, self._missing_uphill(q, log_z, trial))
        elif len(self.searched):
            share = torch.maximum(share, self._missing_near(self.searched, self.found, q, log_z, trial))
        return share

    def hides(self, q: Mixture, log_z: Tensor) -> Tensor:
        """(F,) whether what a closely matched q does not explain leads to mass it lacks: see `hidden`."""
        if not (self.alone and self.gradient and self.target.fits == 1 and len(self.searched)):
            return ~self.all()
        each = [(self.searched, self.found), (self.pool.z, self.pool.ell)]
        each += [] if self.seen is None else [(self.seen.z, self.seen.ell)]
        z, ell = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
        both = with_hidden(self.target, q, z, ell, by=LOW)
        if both.loc.shape[1] == q.loc.shape[1]:
            return ~self.all()
        new = both.only(torch.arange(both.loc.shape[1], device=z.device)[None] >= q.loc.shape[1])
        found = self.missing_at(defended(q), defended(new), log_z) > FEW
        if bool(found.all()):
            self.elsewhere = both
        return found

    def _seen(self) -> tuple[Tensor, Tensor] | None:
        """Points (F, N, d) and the target at them (F, N) that are independent of q."""
        if self.seen is not None:
            return self.seen.z, self.seen.ell
        if self.effort.keep_look:
            looked = self.pool.proposals[0][1]
            return looked.z, looked.ell
        return None

    def _missing_near(
        self, z: Tensor, ell: Tensor, q: Proposal, log_z: Tensor, trial: Trial | None
    ) -> Tensor:
        """(F,) mass around those of the points z (F, N, d) that say q is much too low."""
        share = torch.zeros_like(log_z)
        low = too_low(q, z, ell - log_z[:, None] - LOW)
        accused = low.sum(1) >= _ACCUSERS
        if bool(accused.any()):
            local = defended(around(z[accused], low[accused].double()))
            trial = None if trial is None else trial.of_fits(accused)
            share[accused] = self.only(accused).missing_at(q.of_fits(accused), local, log_z[accused], trial)
        return share

    def _missing_uphill(self, q: Proposal, log_z: Tensor, trial: Trial | None) -> Tensor:
        """(F,) mass at the tops to which particles and searched draws of the prior lead: see `uphill`."""
        share = torch.zeros_like(log_z)
        each = [points for points in (self._seen(), (self.searched, self.found)) if points and len(points[0])]
        if not each:
            return share
        z, ell = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
        local, there = tops(self.target, z, ell, q, log_z, by=LOW)
        if bool(there.any()):
            local = local.of_fits(there)
            trial = None if trial is None else trial.of_fits(there)
            share[there] = self.only(there).missing_at(q.of_fits(there), defended(local), log_z[there], trial)
            if self.alone and isinstance(q, Mixture) and bool((share > FEW).all()):
                self.elsewhere = q.with_(local, float(share[0] / (1 + share[0])))
        return share

    def missing_of_points(self, q: Proposal, trial: Trial) -> Tensor:
        """(F,) mass, relative to what q has, that draws of all proposals find where q is much too low.

        Less what q's own draws, the trial, find there: that much their weights bring back.
        """
        log_z = trial.log_z[:, None]
        low = too_low(q, self.pool.z, self.pool.ell - log_z - LOW)
        somewhere = low.any(0)
        if not bool(somewhere.any()):
            return torch.zeros_like(trial.log_z)
        weights = (self.pool.log_w(somewhere) - log_z).clamp_max(50.0).exp() * low[:, somewhere]
        mass, squares = weights.sum(1), weights.square().sum(1)
        own = trial.log_w - log_z
        own = torch.where(own > LOW, own.exp(), 0.0).mean(1)
        known = mass.square() > _WITNESSES * squares
        return torch.where(known, (mass / low.shape[1] - own).clamp_min(0.0), 0.0)

    def missing_at(self, q: Proposal, local: Mixture, log_z: Tensor, trial: Trial | None = None) -> Tensor:
        """(F,) mass, relative to what q has, that draws of `local` find where q is much too low.

        Each counts by local / (q + local): as one of so many draws, half of which are thought to be q's. What
        the draws of q in `trial` find there, counted alike, is not missing: their weights bring it back.
        """
        found = self.pool.draw(local, self.effort.witnesses)
        log_q, log_z = q.log_prob(found.z), log_z[:, None]
        log_w = found.ell - torch.logaddexp(log_q, found.log_q) - log_z
        share = (log_w.clamp_max(50.0).exp() * (found.ell - log_q - log_z > LOW)).mean(1)
        if trial is None:
            return share
        log_w = trial.log_w - log_z
        low = (log_w > LOW).any(0)
        log_q, log_local = trial.log_q[:, low], local.log_prob(trial.z[:, low])
        part = torch.sigmoid(log_local - log_q) * log_w[:, low].clamp_max(50.0).exp()
        own = (part * (log_w[:, low] > LOW)).sum(1) / log_w.shape[1]
        return (share - own).clamp_min(0.0)


def _doubted(report: Report, doubts: list[str]) -> Report:
    return replace(report, status="suspect", sentence=doubts[0]) if doubts else report


def _rank(report: Report, *, doubted: bool) -> tuple[int, bool, float]:
    order = {"failed": 0, "suspect": 1, "corrected": 2, "ok": 2}
    return (
        order[report.status],
        not doubted,
        report.ess_fraction * (1.0 if report.khat < BELIEVED else DISCOUNT),
    )


def _why(report: Report) -> str:
    numbers = f"had k-hat {report.khat:.2f} and an effective share of {report.ess_fraction:.2f}"
    return numbers if report.status != "suspect" else f"{numbers} ({report.sentence.split('.')[0]})"
