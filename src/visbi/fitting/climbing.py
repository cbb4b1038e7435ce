"""What a climb knows: of each of F posteriors that are fitted side by side, and of all of them together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from visbi.certificate.modes import find_modes
from visbi.certificate.report import Report
from visbi.certificate.rows import effective_sample_size
from visbi.certificate.weights import resample
from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.explore import Exploration, explore, next_beta
from visbi.fitting.mixture import defended
from visbi.fitting.moves import FIRST, MOVES
from visbi.fitting.pool import Pool, Proposal, Trial
from visbi.fitting.refine import POINTS, ROUNDS, TRIAL
from visbi.fitting.summits import Summits
from visbi.fitting.symmetry import Map
from visbi.fitting.target import Target, log_standard_normal

__all__ = ["ALONE", "NOTHING", "SEARCHED", "SEEN", "SIDE_BY_SIDE", "Answer", "Effort", "Group", "Record"]

SEARCHED = 5
"""Dimensions up to which eight times the draws of the prior meet modes of two thirds the width, or less."""
SEEN = 128
"""Draws of the prior in effect that show where the posterior is as well as particles do."""
NOTHING = 20.0
"""Nats of evidence that make nothing of what has so much less, however well it fits itself."""
_NARROW = 2.0  # draws of the prior in effect: one outweighs all others
_AT_FIRST = 1024  # of them that say where tempering would begin
_FEW_USABLE = 0.1  # share of the prior's draws
_FLOW_DIMENSIONS = 4
_LACKED = 0.05  # nats of evidence by which one q has mass that another lacks


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
        particles: of the explorer; `confirming` of them where a Gaussian already fits, half of these where
            the prior is far too wide, and none where the look's draws bear witness.
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
        flown, regressed: whether a flow, a bend, was tried.
        looked: draws of the prior (N, d) with ell there (N,), -inf where it is not finite: all that is known
            where the climb ends before a q was tried.
        best: the best q so far (F = 1) with its rung and trial.
        answer: the best that has a certificate, with its rung, and
        rank: how good that is; what leaves out mass that was seen elsewhere is worse than what may do so.
        carried: particles that came from the best q.
        lacking: whether a q that fitted where it was lacked mass that was seen elsewhere.
        sought: means of the components beside which hidden modes were sought last, (1, K, d).
        doubted: whether something beside its weights spoke against the q that was certified last.
        bent: whether entries of theta tell of each other what is not linear (`bending`).
        broken: share of the answer's draws at which the potential is NaN or +inf.
    """

    story: list[str] = field(default_factory=list)
    count_modes: Callable[[], int] = lambda: 1
    flown: bool = False
    regressed: bool = False
    looked: tuple[Tensor, Tensor] | None = None
    best: tuple[str, Proposal, Trial] | None = None
    answer: tuple[str, Answer] | None = None
    rank: tuple[int, bool, float] = (-1, False, 0.0)
    carried: Exploration | None = None
    sought: Tensor | None = None
    lacking: bool = False
    doubted: bool = False
    bent: bool = False
    broken: float = 0.0

    def count_among(self, z: Tensor, q: Proposal) -> None:
        """From now on modes are those of q (F = 1) among points z (N, d)."""
        self.count_modes = lambda: len(find_modes(z, lambda z: q.log_prob(z[None])[0]))
        self.__dict__.pop("modes", None)

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
        summit: Gaussians matched at the ends of ascents, where the prior is far too wide or particles did not
            arrive.
        ends: where ascents from the prior's draws ended, and
        tops: those from particles of all temperatures, and
        small: those from small scales (`afar.at_small_scales`).
        maps: symmetries of the posterior of one fit alone, once they were looked for.
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
    summit: Mixture | None = None
    ends: Summits | None = None
    tops: Summits | None = None
    small: Summits | None = None
    maps: list[Map] | None = None

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
            None if self.summit is None else self.summit.of_fits(which),
            None if self.ends is None else self.ends.of_fits(which),
            None if self.tops is None else self.tops.of_fits(which),
            None if self.small is None else self.small.of_fits(which),
            self.maps,
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
        none = self.target.dim < _FLOW_DIMENSIONS or not self.gradient
        return self.where(lambda record: not none and record.modes == 1 and not record.flown)

    def log_z(self) -> Tensor:
        """(F,) log-evidence by the best trials so far."""
        found = [0.0 if r.best is None else float(r.best[2].log_z) for r in self.records]
        return torch.tensor(found, **self.like)  # type: ignore[arg-type]

    def consider(self, rung: str, q: Proposal, trial: Trial) -> None:
        """Keep q where it is the best so far: by its merit, or by what the best so far is known to lack."""
        for i, record in enumerate(self.records):
            one = self.one(i)
            fresh, best = trial.of_fits(one), None if record.best is None else record.best[2]
            more = 0.0 if best is None else float(fresh.log_z - best.log_z)
            lacked = (record.lacking and more > _LACKED) or more > NOTHING
            if best is None or lacked or (more > -NOTHING and float(fresh.merit) > float(best.merit)):
                record.best = rung, q.of_fits(one), fresh

    def of_prior(self) -> Tensor:
        """(F, N) log-weights of the prior's draws that were looked at; N = 0 where none are kept."""
        if self.effort.keep_look:
            return self.pool.proposals[0][1].log_w
        if not self.n_prior:
            return torch.zeros(len(self.records), 0)
        z, ell = self.searched[:, : self.n_prior], self.found[:, : self.n_prior]
        return ell - log_standard_normal(z)

    def far_too_wide(self) -> Tensor:
        """(F,) whether the prior is so wide beside the posterior that one of its draws outweighs all others,
        and tempering begins at less than `FIRST`: particles take long, and may not arrive.
        """
        log_w = self.of_prior()
        if not log_w.shape[1]:
            return ~self.all()
        few = log_w[:, :_AT_FIRST]
        first = next_beta(few, torch.zeros_like(few[:, 0]))
        return (effective_sample_size(log_w) < _NARROW) & (first < FIRST)

    def joined(self) -> tuple[Mixture, Trial]:
        """The last q that lacked mass, with Gaussians where that was found, and a trial of both."""
        assert self.elsewhere is not None
        return self.elsewhere, self.pool.draw(defended(self.elsewhere), self.effort.trial)

    def explore(self, n: int, *, moves: int = MOVES) -> None:
        """Send n particles from the prior to the posterior of every fit; from those of its draws that can be
        used, where these are few. Where so many of its draws lie in the posterior that they stand for it,
        nothing need be sent.
        """
        self.tops = None
        if self.n_prior and self.target.dim <= SEARCHED:
            relative = self.of_prior()
            there = int(effective_sample_size(relative).min())
            if there >= SEEN:
                of_prior = self.searched[:, : self.n_prior]
                self.seen = Exploration.of_draws(of_prior, relative, min(n, there))
                return
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

    def independent(self) -> tuple[Tensor, Tensor] | None:
        """Points (F, N, d) and the target at them (F, N) that are independent of q."""
        if self.seen is not None:
            return self.seen.z, self.seen.ell
        if self.effort.keep_look:
            looked = self.pool.proposals[0][1]
            return looked.z, looked.ell
        return None

    def points(self, some: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All points so far, (F, N, d), and the target at them: draws of proposals, of these only `some` of
        any fit's, (F, M) bool, searched draws of the prior, and particles.
        """
        z, ell = self.pool.z, self.pool.ell
        each = [(z, ell) if some is None else (z[:, some.any(0)], ell[:, some.any(0)])]
        each += [(self.searched, self.found)] if len(self.searched) else []
        each += [] if self.seen is None else [(self.seen.z, self.seen.ell)]
        z, ell = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
        return z, ell

    @property
    def n_searched(self) -> int:
        """Points, for each fit, from which modes were looked for: draws of the prior, and in more than
        `SEARCHED` dimensions, where hardly any draw shows a mode by itself, those that were led uphill.
        """
        if self.tops is not None and self.target.dim > SEARCHED:
            return self.tops.z.shape[1]
        if self.n_prior:
            return self.n_prior
        return self.effort.look if self.effort.keep_look else 0 if self.seen is None else self.seen.z.shape[1]
