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

__all__ = ["Pool", "Proposal", "Trial"]


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

    Attributes:
        target: the target.
        proposals: with the number of draws of each.
    """

    target: Target
    proposals: list[tuple[Proposal, int]] = field(default_factory=list)
    z: Tensor | None = None
    ell: Tensor | None = None
    log_mean: Tensor | None = None  # log of sum_t n_t q_t at every point

    def draw(self, q: Proposal, n: int) -> Trial:
        """n fresh draws of q, evaluated, kept and weighed by themselves."""
        z = q.sample(n)
        ell, log_q = self.target.value(z)[0], q.log_prob(z)[0]
        ell = torch.where(is_usable(ell), ell, -torch.inf)
        total = log_q + math.log(n)
        for other, count in self.proposals:
            total = torch.logaddexp(total, other.log_prob(z)[0] + math.log(count))
        if self.z is None or self.ell is None or self.log_mean is None:
            self.z, self.ell, self.log_mean = z[0], ell, total
        else:
            earlier = torch.logaddexp(self.log_mean, q.log_prob(self.z[None])[0] + math.log(n))
            self.z, self.ell = torch.cat([self.z, z[0]]), torch.cat([self.ell, ell])
            self.log_mean = torch.cat([earlier, total])
        self.proposals.append((q, n))
        log_w = ell - log_q
        khat = pareto_smooth(log_w)[1]
        return Trial(z[0], ell, log_q, effective_sample_size(log_w) / n, khat)

    def log_w(self) -> Tensor:
        """(N,) log-weights of all points; their mean is the evidence."""
        assert self.z is not None and self.ell is not None and self.log_mean is not None
        return self.ell - self.log_mean + math.log(len(self.ell))

    def points(self, most: int) -> tuple[Tensor, Tensor]:
        """At most `most` unlike points (M, d) and weights (M,) that stand for the posterior.

        Where there are more, they are thinned systematically: no point is there twice, so none leaks.
        """
        assert self.z is not None
        smooth = pareto_smooth(self.log_w())[0]
        chosen, counts = resample(smooth, most).unique(return_counts=True)
        return self.z[chosen], counts.double() / most
