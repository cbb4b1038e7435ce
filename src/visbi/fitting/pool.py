r"""Every point at which the potential was evaluated, weighted as draws of all proposals together.

After proposals q_1 .. q_T have been drawn n_1 .. n_T times, each point has the weight

    w = exp(ell) / sum_t (n_t / N) q_t,

whichever proposal it came from (the balance heuristic: Veach, Guibas 1995; kept over adaptation: Cornuet,
Marin, Mira, Robert: Adaptive multiple importance sampling. 2012). Nothing that was paid for is thrown away,
and a bad early proposal does no harm.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visbi.certificate.rows import cleaned, effective_sample_size, pareto_smooth
from visbi.certificate.weights import resample
from visbi.core.logs import log_sum_exp
from visbi.fitting.target import Target, is_usable

__all__ = ["BELIEVED", "DISCOUNT", "UNSOUND", "Pool", "Proposal", "Trial", "thinned"]

BELIEVED, DISCOUNT = 0.7, 0.3
"""k-hat up to which a share of draws in effect is believed, and what it counts beyond."""
_FIRST, _NO_GOOD = 8, 0.02  # of the draws an eighth, and the share in effect below which it is enough
UNSOUND = 0.9
"""k-hat of a trial from which no certificate is worth its draws."""


class Proposal(Protocol):
    """F distributions that can be drawn from and evaluated; `families.gaussians.Mixture` is one."""

    def sample(self, n: int) -> Tensor:
        """(F, n, d)."""
        ...

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(F, n, d) and log q there, (F, n), as exact as the draws themselves: see `FlowProposal.draw`."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """(F, N) for z (F, N, d)."""
        ...

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(F, N) and the gradient (F, N, d) for z (F, N, d)."""
        ...

    def of_fits(self, which: Tensor) -> "Proposal":
        """Those `which`, (F,) bool."""
        ...


@dataclass(frozen=True)
class Trial:
    """How fresh draws of F proposals weigh.

    Attributes:
        z: (F, n, d). ell, log_q: (F, n); ell is -inf where the potential is not finite.
        share: (F,) their effective sample size as a share of n.
        khat: (F,) Pareto shape of their weights.
    """

    z: Tensor
    ell: Tensor
    log_q: Tensor
    share: Tensor
    khat: Tensor

    @staticmethod
    def of(z: Tensor, ell: Tensor, log_q: Tensor) -> "Trial":
        """What draws z (F, n, d) with ell and log q (F, n) say."""
        log_w = cleaned(ell - log_q)
        share = effective_sample_size(log_w) / log_w.shape[1]
        return Trial(z, ell, log_q, share, pareto_smooth(log_w)[1])

    def numbers(self, i: int) -> str:
        """Those of one, in words."""
        return f"k-hat {float(self.khat[i]):.2f} and an effective share of {float(self.share[i]):.2f}"

    @property
    def log_w(self) -> Tensor:
        """(F, n)."""
        return self.ell - self.log_q

    @property
    def smooth(self) -> Tensor:
        """(F, n) log-weights with their tail smoothed."""
        return pareto_smooth(cleaned(self.log_w))[0]

    @property
    def n_effective(self) -> float:
        """Draws of a single proposal (F = 1) in effect."""
        return float(self.share) * self.ell.shape[1]

    @property
    def log_z(self) -> Tensor:
        """(F,) the log-evidence by these draws alone."""
        return log_sum_exp(self.log_w, 1) - math.log(self.ell.shape[1])

    @property
    def merit(self) -> Tensor:
        """(F,) effective share, discounted where the weights' tail is too heavy to believe it."""
        return self.share * torch.where(self.khat < BELIEVED, 1.0, DISCOUNT)

    def of_fits(self, which: Tensor) -> "Trial":
        """Those of the fits `which`, (F,) bool."""
        return Trial(self.z[which], self.ell[which], self.log_q[which], self.share[which], self.khat[which])

    def first(self, n: int) -> "Trial":
        """The first n draws, with what all of them say."""
        return replace(self, z=self.z[:, :n], ell=self.ell[:, :n], log_q=self.log_q[:, :n])

    def with_(self, other: "Trial") -> "Trial":
        """This one with more draws of the same proposals."""
        return Trial.of(
            torch.cat([self.z, other.z], 1),
            torch.cat([self.ell, other.ell], 1),
            torch.cat([self.log_q, other.log_q], 1),
        )

    def better(self, other: "Trial", where: Tensor) -> "Trial":
        """This one, and `other` for the fits `where`, (F,) bool; as many draws as both have."""
        if bool(where.all()) or not bool(where.any()):
            return other if bool(where.all()) else self
        n = min(self.ell.shape[1], other.ell.shape[1])
        first, second = (
            (trial.z, trial.ell, trial.log_q, trial.share, trial.khat)
            for trial in (self.first(n), other.first(n))
        )
        pairs = zip(first, second, strict=True)
        return Trial(*(torch.where(where[(...,) + (None,) * (a.ndim - 1)], b, a) for a, b in pairs))


@dataclass
class Pool:
    """Points, their potential, and the proposals they came from, for F fits.

    Each proposal's density at the others' points is found only when weights of all points are asked for.

    Attributes:
        target: the target.
        proposals: those that were drawn from, which must not change afterwards, with the trials of them.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.families.gaussians import Mixture
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> pool = Pool(Target(lambda theta: prior.log_prob(theta) + 3, coordinates(prior)))
    >>> loc, cov = torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None, None]
    >>> trial = pool.draw(Mixture.of(torch.zeros(1, 1).double(), loc, cov), 100)
    >>> trial.share, pool.log_w().mean()
    (tensor([1.], dtype=torch.float64), tensor(3., dtype=torch.float64))
    """

    target: Target
    proposals: list[tuple[Proposal, Trial]] = field(default_factory=list)
    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def draw(self, q: Proposal, n: int) -> Trial:
        """n >= 25 fresh draws of q, evaluated, kept and weighed by themselves.

        Raises:
            BudgetReached: the target's budget has less than n evaluations left.
        """
        return self._kept(q, *self._evaluated(*q.draw(n)))

    def tried(self, q: Proposal, n: int) -> Trial:
        """The same for a q that may be no good: an eighth of the draws where those say so of every fit.

        Raises:
            BudgetReached: the target's budget is used up.
        """
        z, log_q = q.draw(n)
        first = self._evaluated(z[:, : n // _FIRST], log_q[:, : n // _FIRST])
        if bool((Trial.of(*first).share < _NO_GOOD).all()):
            return self._kept(q, *first)
        others = self._evaluated(z[:, n // _FIRST :], log_q[:, n // _FIRST :])
        return self._kept(q, *(torch.cat(parts, 1) for parts in zip(first, others, strict=True)))

    def _evaluated(self, z: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws z with the target, -inf where it is not finite, and log q there."""
        ell = self.target.value(z)
        return z, torch.where(is_usable(ell), ell, -torch.inf), log_q

    def _kept(self, q: Proposal, z: Tensor, ell: Tensor, log_q: Tensor) -> Trial:
        trial = Trial.of(z, ell, log_q)
        number = len(self.proposals)
        self.proposals.append((q, trial))
        self._known[number, number] = log_q
        return trial

    def of_fits(self, which: Tensor) -> "Pool":
        """The pool of the fits `which`, (F,) bool; what is drawn from it later is not in this one."""
        return Pool(
            self.target.only(which),
            [(q.of_fits(which), trial.of_fits(which)) for q, trial in self.proposals],
            {key: log_q[which] for key, log_q in self._known.items()},
        )

    @property
    def z(self) -> Tensor:
        """(F, N, d), all points, in the order in which they were drawn."""
        return torch.cat([trial.z for _, trial in self.proposals], 1)

    @property
    def ell(self) -> Tensor:
        """(F, N), at all points."""
        return torch.cat([trial.ell for _, trial in self.proposals], 1)

    def log_w(self, some: Tensor | None = None) -> Tensor:
        """(F, N) log-weights of all points; their mean is the evidence. Or (F, M), of `some`, (N,) bool."""
        sizes = [trial.z.shape[1] for _, trial in self.proposals]
        blocks = [None] * len(sizes) if some is None else some.split(sizes)
        parts = []
        for block, (where, (_, trial)) in enumerate(zip(blocks, self.proposals, strict=True)):
            each = [
                self._log_q(number, block, where) + math.log(size / sum(sizes))
                for number, size in enumerate(sizes)
            ]
            ell = trial.ell if where is None else trial.ell[:, where]
            parts.append(ell - log_sum_exp(torch.stack(each), 0))
        return torch.cat(parts, 1)

    def _log_q(self, number: int, block: int, some: Tensor | None) -> Tensor:
        """Log-density of one proposal at the points of another; kept, if it is of all of them."""
        known = self._known.get((number, block))
        if known is None:
            q, z = self.proposals[number][0], self.proposals[block][1].z
            if some is not None:
                return q.log_prob(z[:, some])
            known = self._known[number, block] = q.log_prob(z)
        return known if some is None else known[:, some]

    def points(self, most: int, *, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """At most `most` unlike points of each fit (F, M, d) and weights (F, M) that stand for the posterior.

        Where there are more, they are thinned systematically: no point is there twice, so none leaks. All
        weigh alike where none has a finite potential.

        Args:
            most: of each fit.
            least: points in effect that there must be: where there are fewer, the weights are tempered.
        """
        return thinned(self.z, _tempered(self.log_w(), least), most)


def _tempered(log_w: Tensor, least: float) -> Tensor:
    """Log-weights (F, N) times the largest power, at most 1, that leaves `least` of them in effect."""
    low, high = torch.zeros_like(log_w[:, :1]), torch.ones_like(log_w[:, :1])
    clean = cleaned(log_w)
    usable = torch.isfinite(clean)

    def enough(power: Tensor) -> Tensor:
        raised = torch.where(usable, power * clean, -torch.inf)
        return effective_sample_size(raised)[:, None] >= least

    if bool(enough(high).all()):
        return log_w
    for _ in range(20):
        middle = torch.where(enough(high), high, 0.5 * (low + high))
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(usable, torch.where(enough(torch.ones_like(low)), 1.0, low) * clean, -torch.inf)


def thinned(z: Tensor, log_w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Unlike ones of points z (F, N, d), by their smoothed weights, at most `most` of each fit.

    Returns:
        (F, M, d) and weights (F, M) that add up to one; a fit with fewer points than another has some of
        weight zero.
    """
    chosen, counts = [], []
    for row in pareto_smooth(cleaned(log_w))[0]:
        index, count = resample(row, most).unique(return_counts=True)
        chosen.append(index)
        counts.append(count.double() / most)
    index, weights = pad_sequence(chosen, batch_first=True), pad_sequence(counts, batch_first=True)
    return z.gather(1, index[..., None].expand(-1, -1, z.shape[-1])), weights
