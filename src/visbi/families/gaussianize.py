r"""One entry of a Gaussianization flow (Chen and Gopinath 2000; Meng et al. 2020).

It carries data to noise by the cdf of a mixture,

    f(x) = Phi^-1(F(x)),   F(x) = 1/K sum_k Phi(s_k x + b_k),
    f'(x) = 1/K sum_k s_k phi(s_k x + b_k) / phi(f(x)).

Both tails of F are kept as logarithms, so f is one-to-one from R to R however far out x lies; computed from
F itself it would end where F rounds to one, and draws beyond would have false densities.

The inverse is found in the logit of F, which needs no Phi^-1, by Newton steps between bounds that are known
to hold it. A step that would leave the bounds, or is not half as long as the one before, halves the interval
instead. The last step is differentiable, which is the implicit derivative.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from visbi.core.zuko_import import zuko

__all__ = ["Gaussianize", "gaussianization_flow"]

_MAX_STEPS = 100
_TOLERANCE = 1e-9  # of the steps before the last, which squares what is left
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def gaussianization_flow(dim: int, context: int = 0, **options: Any) -> Any:
    """zuko's Gaussianization flow, rotations and all, with our entries; float64."""
    flow: Any = zuko.flows.GF(dim, context, **options).double()
    for layer in flow.transform.transforms:
        if hasattr(layer, "univariate"):
            layer.univariate = Gaussianize
    return flow


class Gaussianize(Transform):
    """x -> f(x) as an elementwise transform, for float64.

    Args:
        shift: b, (..., K).
        scale: log s, (..., K).

    >>> f = Gaussianize(torch.randn(1, 4).double(), torch.zeros(1, 4).double())
    >>> x = torch.tensor([[-30.0], [0.3], [30.0]]).double()
    >>> bool(torch.allclose(f.inv(f(x)), x))
    True
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.shift, self.log_scale = shift, scale

    @property
    def sign(self) -> int:
        """+1, increasing."""
        return 1

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and log f'(x), entry by entry."""
        t = self._components(x)
        low, high = _log_tails(t)
        y = _normal_quantile(low, high)
        log_density = torch.logsumexp(self.log_scale - 0.5 * t.square(), -1) - math.log(t.shape[-1])
        return y, log_density + 0.5 * y.square()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        # the logit of a mean of cdfs lies between those of its parts: so does the point where it is y's
        target = torch.special.log_ndtr(y) - torch.special.log_ndtr(-y)
        x = self._root(y.detach(), target.detach())
        logit, slope = self._logit(x)
        return x - (logit - target) / slope.detach()

    @torch.no_grad()
    def _root(self, y: Tensor, target: Tensor) -> Tensor:
        """Where the logit of F is `target`, to a relative error of `_TOLERANCE`."""
        alone = (y[..., None] - self.shift) * torch.exp(-self.log_scale)
        below, above = alone.amin(-1), alone.amax(-1)
        x, length = 0.5 * (below + above), above - below
        for _ in range(_MAX_STEPS):
            logit, slope = self._logit(x)
            less = logit < target
            below, above = torch.where(less, x, below), torch.where(less, above, x)
            move = (target - logit) / slope
            newton = x + move
            # false where the slope vanishes between components far apart
            good = (newton >= below) & (newton <= above) & (2.0 * move.abs() <= length)
            there = move.abs() <= _TOLERANCE * (1.0 + x.abs())
            if bool(there.all()):
                break
            new = torch.where(good | there, newton, 0.5 * (below + above))
            x, length = new, (new - x).abs()
        return x

    def _components(self, x: Tensor) -> Tensor:
        return x[..., None] * self.log_scale.exp() + self.shift

    def _logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log F / (1 - F) and its derivative in x."""
        t = self._components(x)
        low, high = _log_tails(t)
        log_density = (
            torch.logsumexp(self.log_scale - 0.5 * t.square(), -1) - math.log(t.shape[-1]) - _HALF_LOG_2PI
        )
        return low - high, torch.exp(log_density - low) + torch.exp(log_density - high)


def _log_tails(t: Tensor) -> tuple[Tensor, Tensor]:
    """log F and log (1 - F) from the components' arguments (..., K)."""
    count = math.log(t.shape[-1])
    return (torch.logsumexp(torch.special.log_ndtr(side), -1) - count for side in (t, -t))  # type: ignore[return-value]


def _normal_quantile(low: Tensor, high: Tensor) -> Tensor:
    """Phi^-1 of F from both logarithms: Newton on the smaller tail, the last step differentiable."""
    lower = low.detach() < high.detach()
    tail = torch.where(lower, low, high)
    with torch.no_grad():
        # the leading term of the tail, good to a few percent, where exp(tail) is too small for ndtri
        far = tail.clamp_max(-20.0)
        first = -torch.sqrt(-2.0 * far - torch.log(4.0 * math.pi * -far))
        u = torch.where(tail < -20.0, first, torch.special.ndtri(tail.exp().clamp(1e-300, 0.5)))
        for _ in range(3):
            u = u - _excess(u, tail)
    u = u - _excess(u, tail)
    return torch.where(lower, u, -u)


def _excess(u: Tensor, log_tail: Tensor) -> Tensor:
    """Newton's step for log Phi(u) = log_tail."""
    log_ndtr = torch.special.log_ndtr(u)
    return (log_ndtr - log_tail) * torch.exp(log_ndtr + 0.5 * u.square() + _HALF_LOG_2PI)
