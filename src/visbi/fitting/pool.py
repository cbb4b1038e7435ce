r"""Every point at which the potential was evaluated, weighted as draws of all proposals together.

After proposals q_1 .. q_T have been drawn n_1 .. n_T times, each point has the weight

    w = exp(ell) / sum_t (n_t / N) q_t,

whichever proposal it came from (the balance heuristic: Veach, Guibas 1995; kept over adaptation: Cornuet,
Marin, Mira, Robert: Adaptive multiple importance sampling. 2012). Nothing that was paid for is thrown away,
and a bad early proposal does no harm.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from visbi.certificate.weights import effective_sample_size, pareto_smooth, resample
from visbi.fitting.target import Target, is_usable

__all__ = ["Pool", "Proposal", "Trial", "thinned"]


class Proposal(Protocol):
    """Something that can be drawn from and evaluated; `fitting.mixture.Mixture` is one (F = 1)."""

    def sample(self, n: int) -> Tensor:
        """(1, n, d)."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """(1, N) for z (1, N, d)."""
        ...


@dataclass(frozen=True)
class Trial:
    """How fresh draws of a proposal weigh.

    Attributes:
        z: (n, d). ell, log_q: (n,); ell is -inf where the potential is not finite.
        share: their effective sample size as a share of n.
        khat: Pareto shape of their weights.
    """

    z: Tensor
    ell: Tensor
    log_q: Tensor
    share: float
    khat: float

    @property
    def log_w(self) -> Tensor:
        """(n,)."""
        return self.ell - self.log_q


@dataclass
class Pool:
    """Points, their potential, and the proposals they came from.

    Each proposal's density at the others' points is found only when weights of all points are asked for.

    Attributes:
        target: the target.
        proposals: those that were drawn from, which must not change afterwards, with the trials of them.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.fitting.mixture import Mixture
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> pool = Pool(Target(lambda theta: prior.log_prob(theta) + 3, coordinates(prior)))
    >>> loc, cov = torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None, None]
    >>> trial = pool.draw(Mixture.of(torch.zeros(1, 1).double(), loc, cov), 100)
    >>> trial.share, pool.log_w().mean()
    (1.0, tensor(3., dtype=torch.float64))
    """

    target: Target
    proposals: list[tuple[Proposal, Trial]] = field(default_factory=list)
    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def draw(self, q: Proposal, n: int) -> Trial:
        """n >= 25 fresh draws of q, evaluated, kept and weighed by themselves.

        Raises:
            BudgetReached: the target's budget has less than n evaluations left.
        """
        z = q.sample(n)
        ell, log_q = self.target.value(z)[0], q.log_prob(z)[0]
        ell = torch.where(is_usable(ell), ell, -torch.inf)
        log_w = ell - log_q
        trial = Trial(z[0], ell, log_q, effective_sample_size(log_w) / n, pareto_smooth(log_w)[1])
        number = len(self.proposals)
        self.proposals.append((q, trial))
        self._known[number, number] = log_q
        return trial

    @property
    def z(self) -> Tensor:
        """(N, d), all points, in the order in which they were drawn."""
        return torch.cat([trial.z for _, trial in self.proposals])

    def log_w(self) -> Tensor:
        """(N,) log-weights of all points; their mean is the evidence."""
        total = sum(len(trial.z) for _, trial in self.proposals)
        parts = []
        for block, (_, trial) in enumerate(self.proposals):
            each = [
                self._log_q(number, block) + math.log(len(other.z) / total)
                for number, (_, other) in enumerate(self.proposals)
            ]
            parts.append(trial.ell - torch.logsumexp(torch.stack(each), 0))
        return torch.cat(parts)

    def _log_q(self, number: int, block: int) -> Tensor:
        """Log-density of one proposal at the points of another."""
        if (number, block) not in self._known:
            q, z = self.proposals[number][0], self.proposals[block][1].z
            self._known[number, block] = q.log_prob(z[None])[0]
        return self._known[number, block]

    def points(self, most: int) -> tuple[Tensor, Tensor]:
        """At most `most` unlike points (M, d) and weights (M,) that stand for the posterior.

        Where there are more, they are thinned systematically: no point is there twice, so none leaks. All
        weigh alike where none has a finite potential.
        """
        return thinned(self.z, self.log_w(), most)


def thinned(z: Tensor, log_w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` unlike ones (M, d) of points z (N, d), by their smoothed weights; and weights (M,)."""
    chosen, counts = resample(pareto_smooth(log_w)[0], most).unique(return_counts=True)
    return z[chosen], counts.double() / most
