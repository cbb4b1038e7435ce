r"""Monotone rational-quadratic splines (Gregory and Delbourgo 1982; as flow layers: Durkan et al. 2019).

Between knots (x0, y0) and (x1, y1) with slopes d0 and d1, s = (y1 - y0)/(x1 - x0) and t = (x - x0)/(x1 - x0),

    y     = y0 + (y1 - y0) (s t^2 + d0 t (1 - t)) / (s + (d0 + d1 - 2 s) t (1 - t))
    dy/dx = s^2 (2 s t (1 - t) + d0 (1 - t)^2 + d1 t^2) / (s + (d0 + d1 - 2 s) t (1 - t))^2,

and the identity outside [-bound, bound]. Widths and heights of the bins are normalised exponentials of
parameters that are softly clipped, so no bin vanishes and no maximum has to be subtracted. Both axes go
through every operation together: the networks here are small and the number of operations is what a step
costs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import functional

__all__ = ["RationalQuadraticSpline", "spline_flow", "spline_shapes"]

_BOUND = 5.0
_CLIP = -math.log(1e-3)  # log-ratios of widths, heights and slopes stay within


def spline_shapes(bins: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters per entry: widths and heights together, and inner slopes."""
    return [(2, bins), (bins - 1,)]


def spline_flow(dim: int, context: int = 0, *, bins: int = 8, **options: Any) -> Any:
    """zuko's masked autoregressive flow with these splines as its entries; other options are zuko's."""
    from visbi.core.zuko_import import zuko  # coupling flows do without it

    return zuko.flows.MAF(
        dim, context, univariate=RationalQuadraticSpline, shapes=spline_shapes(bins), **options
    )


class RationalQuadraticSpline(Transform):
    """The spline as an elementwise transform; parameters of zero give the identity.

    Args:
        sizes: (..., 2, K), widths and heights of the K bins before normalisation.
        slopes: (..., K - 1), logarithms of the slopes at the inner knots, before clipping.

    >>> spline = RationalQuadraticSpline(torch.randn(2, 2, 4), torch.randn(2, 3))
    >>> x = torch.tensor([0.3, -1.2])
    >>> bool(torch.allclose(spline.inv(spline(x)), x, atol=1e-5))
    True
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def __init__(self, sizes: Tensor, slopes: Tensor) -> None:
        super().__init__()
        share = torch.exp(sizes / (1.0 + (2.0 / _CLIP) * sizes.abs()))
        share = share * (2.0 * _BOUND / share.sum(-1, keepdim=True))
        self._knots = functional.pad(share.cumsum(-1) - _BOUND, (1, 0), value=-_BOUND)
        self._slopes = functional.pad(torch.exp(slopes / (1.0 + slopes.abs() / _CLIP)), (1, 1), value=1.0)

    @property
    def sign(self) -> int:
        """+1, increasing."""
        return 1

    def _bin(self, value: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The bin that holds `value` on the axis: its corners and slopes."""
        with torch.no_grad():
            left = (self._knots[..., axis, 1:-1] <= value[..., None]).sum(-1, keepdim=True)
            index = torch.cat([left, left + 1], -1)
        shape = index.shape[:-1]
        knots = self._knots.expand(*shape, *self._knots.shape[-2:])
        corners = knots.gather(-1, index[..., None, :].expand(*shape, 2, 2))
        slopes = self._slopes.expand(*shape, self._slopes.shape[-1]).gather(-1, index)
        (x0, y0), (x1, y1) = (corners[..., i].unbind(-1) for i in (0, 1))
        return x0, y0, x1 - x0, y1 - y0, slopes[..., 0], slopes[..., 1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx, entry by entry."""
        inside = x.detach().abs() < _BOUND
        x0, y0, width, height, d0, d1 = self._bin(x, 0)
        t = torch.where(inside, (x - x0) / width, 0.5)
        s = height / width
        product, square = t * (1.0 - t), t * t
        below = s + (d0 + d1 - 2.0 * s) * product
        y = y0 + height * (s * square + d0 * product) / below
        slope = s * s * (2.0 * s * product + d0 * (1.0 - t).square() + d1 * square) / (below * below)
        return torch.where(inside, y, x), torch.where(inside, slope, 1.0).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        inside = y.detach().abs() < _BOUND
        x0, y0, width, height, d0, d1 = self._bin(y, 1)
        s = height / width
        rise = torch.where(inside, y - y0, 0.5 * height)
        bend = rise * (d0 + d1 - 2.0 * s)
        a, b, c = height * (s - d0) + bend, height * d0 - bend, -s * rise
        # the root in [0, 1], in the form that does not cancel
        t = 2.0 * c / (-b - (b * b - 4.0 * a * c).clamp_min(0.0).sqrt())
        return torch.where(inside, x0 + t * width, y)
