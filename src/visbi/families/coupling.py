r"""Coupling flows: z = m + L f(u), u ~ N(0, I), f coupling layers (`families.coupling_layers`).

Sampling and log q at any point cost one pass each, and the score that path gradients need is carried along
while sampling.
"""

import torch
from torch import Tensor

from visbi.core.checks import positive_int
from visbi.families.base import log_standard_normal
from visbi.families.coupling_layers import CouplingLayers
from visbi.families.outside import OutsideBody

__all__ = ["CouplingBody"]


class CouplingBody(OutsideBody):
    """Coupling layers inside a Gaussian; at the start N(0, I).

    The Gaussian is float64, the layers have torch's default dtype.

    Args:
        dim: d. With one entry the layers are splines without a network.
        num_transforms: number of layers; two of them move every entry once.
        hidden_features: width of the two hidden layers of each network.
        spline: rational-quadratic splines in place of affine layers, for several modes.

    Raises:
        ValueError: a number below 1.

    >>> body = CouplingBody(3, num_transforms=2, hidden_features=8)
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> bool(torch.allclose(body.log_prob(z), log_q, atol=1e-5))
    True
    """

    def __init__(
        self, dim: int, num_transforms: int = 6, hidden_features: int = 64, spline: bool = False
    ) -> None:
        super().__init__(dim)
        self.layers = CouplingLayers(
            dim,
            num_transforms=positive_int("num_transforms", num_transforms),
            hidden_features=positive_int("hidden_features", hidden_features),
            spline=spline,
        )

    def draw_inside(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = self.layers.last_bias
        u = torch.randn(n, self.dim, dtype=weight.dtype, device=weight.device)
        y, ladj, score = self.layers(u, -u if path else None)
        return y, log_standard_normal(u) - ladj, score

    def log_prob_inside(self, y: Tensor) -> Tensor:
        u, ladj = self.layers.inverse(y.to(self.layers.last_bias.dtype))
        return log_standard_normal(u) - ladj

    def push(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, d) and log|det dz/du| (N,), float64, from noise u (N, d)."""
        y, ladj, _ = self.layers(u.to(self.layers.last_bias.dtype))
        return self.outward(y), ladj.double() + self.place.log_diag.sum()

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, d) and log|det dz/du| (N,) at it, float64, from z (N, d)."""
        u, ladj = self.layers.inverse(self.inward(z).to(self.layers.last_bias.dtype))
        return u.double(), ladj.double() + self.place.log_diag.sum()
