r"""A flow whose noise has heavier tails: z = f(u), u ~ sum_b a_b N(0, s_b^2 I).

A flow trained by the reverse KL is right where its draws fell and too low beyond. Wider noise reaches further
along the directions that it has learnt, into the neck and the mouth of a funnel, and costs nothing: f,
trained with standard noise, is kept as it is, and log q(z) = log base(f^-1(z)) - log|det df/du| has its
other base.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.families.base import Body
from visbi.families.coupling import CouplingBody

__all__ = ["WidenedBody", "log_wide_normal", "wide_score"]


class WidenedBody(Body):
    """A coupling flow with noise from a mixture of centred normals; drawn from and evaluated, not trained.

    Args:
        inner: the flow.
        scales: standard deviations of the noise. shares: their shares, which add up to one.

    Raises:
        ValueError: numbers of scales and shares that differ, or that are not positive.

    >>> body = WidenedBody(CouplingBody(2), scales=(1.0, 1.5), shares=(0.9, 0.1))
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> bool(torch.allclose(body.log_prob(z), log_q, atol=1e-4))
    True
    """

    scales: Tensor
    shares: Tensor

    def __init__(self, inner: CouplingBody, *, scales: Sequence[float], shares: Sequence[float]) -> None:
        super().__init__(inner.dim)
        if not 0 < len(scales) == len(shares) or not all(value > 0 for value in (*scales, *shares)):
            expected = "as many positive numbers as each other"
            raise ValueError(violation("scales` and `shares", expected, f"{scales} and {shares}"))
        self.inner = inner
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float64))
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float64) / sum(shares))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        which = torch.bucketize(torch.rand(n).to(self.shares), self.shares.cumsum(0)[:-1])
        u = self.scales[which, None] * torch.randn(
            n, self.dim, dtype=torch.float64, device=self.scales.device
        )
        z, ladj = self.inner.push(u)
        return z, log_wide_normal(u, self.scales, self.shares) - ladj

    def log_prob(self, z: Tensor) -> Tensor:
        u, ladj = self.inner.pull(z)
        log_q = log_wide_normal(u, self.scales, self.shares) - ladj
        return torch.where(log_q.isnan(), -torch.inf, log_q)


def log_wide_normal(u: Tensor, scales: Tensor, shares: Tensor) -> Tensor:
    """log sum_b a_b N(u; 0, s_b^2 I), (...), for u (..., d), scales (B,) and shares (B,)."""
    return torch.logsumexp(_each(u, scales, shares), -1)


def wide_score(u: Tensor, scales: Tensor, shares: Tensor) -> Tensor:
    """Its gradient (..., d)."""
    part = torch.softmax(_each(u, scales, shares), -1)
    return -u * (part / scales.square()).sum(-1, keepdim=True)


def _each(u: Tensor, scales: Tensor, shares: Tensor) -> Tensor:
    quadratic = -0.5 * u.square().sum(-1, keepdim=True) / scales.square()
    return quadratic + shares.log() - u.shape[-1] * (scales.log() + 0.5 * math.log(2 * math.pi))
