r"""The gated update of inverse autoregressive flows (Kingma, Salimans, Jozefowicz, Chen, et al. 2016).

    f(x) = x sigma(a + b) / sigma(b) + (1 - sigma(a + b)) m,   b = 2,

between x and the network's m. Kingma et al. have no sigma(b); with it m = a = 0 gives the identity. A gate
cannot stretch by more than 1 / sigma(b) = 1.14 however large a becomes, so that long stacks stay stable where
exp(a) x + m does not; what has to be stretched, a Gaussian outside stretches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import functional

__all__ = ["GATED_SHAPES", "Gate"]

GATED_SHAPES: list[tuple[int, ...]] = [(), ()]
"""Shapes of m and a per entry."""

_BIAS = 2.0


class Gate(Transform):
    """The update as an elementwise transform.

    Args:
        target: m, (...).
        logit: a, (...).

    >>> gate = Gate(torch.randn(4), torch.randn(4))
    >>> x = torch.randn(4)
    >>> bool(torch.allclose(gate.inv(gate(x)), x, atol=1e-5))
    True
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def __init__(self, target: Tensor, logit: Tensor) -> None:
        super().__init__()
        floor: Any = functional.softplus(torch.tensor(-_BIAS, dtype=logit.dtype))  # -log sigma(b)
        self.log_scale = functional.logsigmoid(logit + _BIAS) + floor
        self.shift = torch.sigmoid(-logit - _BIAS) * target

    @property
    def sign(self) -> int:
        """+1, increasing."""
        return 1

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx, entry by entry."""
        return x * self.log_scale.exp() + self.shift, self.log_scale.expand(x.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_scale.expand(x.shape)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-self.log_scale).exp()
