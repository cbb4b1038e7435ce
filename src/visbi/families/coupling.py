r"""Coupling flows: z = m + L f(u), u ~ N(0, I), f coupling layers (`families.coupling_layers`).

The Gaussian outside takes out location, scale and correlation, which coupling layers approach slowly; the
layers shape what is left. Sampling and log q at any point cost one pass each, and the score that path
gradients need is carried along while sampling.
"""

import torch
from torch import Tensor

from visbi.core.checks import positive_int
from visbi.families.base import Body, log_standard_normal, path_part
from visbi.families.coupling_layers import CouplingLayers
from visbi.families.gaussian import GaussianBody

__all__ = ["CouplingBody"]


class CouplingBody(Body):
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
        self.place = GaussianBody(dim)
        self.layers = CouplingLayers(
            dim,
            num_transforms=positive_int("num_transforms", num_transforms),
            hidden_features=positive_int("hidden_features", hidden_features),
            spline=spline,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64  # z is centred before it is rounded to what the layers work in

    def placed(self, loc: Tensor, scale_tril: Tensor) -> "CouplingBody":
        self.place.set_(loc, scale_tril)
        return self

    def _passed(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = self.layers.last_bias
        u = torch.randn(n, self.dim, dtype=weight.dtype, device=weight.device)
        y, ladj, score = self.layers(u, -u if path else None)
        scale_tril = self.place.scale_tril
        z = self.place.loc + y.double() @ scale_tril.mT
        log_q = log_standard_normal(u).double() - ladj.double() - self.place.log_diag.sum()
        if score is None:
            return z, log_q, None
        back = torch.linalg.solve_triangular(scale_tril.detach(), score.double(), upper=False, left=False)
        return z, log_q, path_part(log_q, z, back)

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self._passed(n, path=False)[:2]

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._passed(n, path=path and torch.is_grad_enabled())

    def log_prob(self, z: Tensor) -> Tensor:
        centred = (z.double() - self.place.loc).mT
        y = torch.linalg.solve_triangular(self.place.scale_tril, centred, upper=False).mT
        u, ladj = self.layers.inverse(y.to(self.layers.last_bias.dtype))
        log_q = log_standard_normal(u).double() - ladj.double() - self.place.log_diag.sum()
        return torch.where(log_q.isnan(), -torch.inf, log_q)  # so far out that it cannot be told

    def push(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, d) and log|det dz/du| (N,), float64, from noise u (N, d)."""
        y, ladj, _ = self.layers(u.to(self.layers.last_bias.dtype))
        z = self.place.loc + y.double() @ self.place.scale_tril.mT
        return z, ladj.double() + self.place.log_diag.sum()

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, d) and log|det dz/du| (N,) at it, float64, from z (N, d)."""
        centred = (z.double() - self.place.loc).mT
        y = torch.linalg.solve_triangular(self.place.scale_tril, centred, upper=False).mT
        u, ladj = self.layers.inverse(y.to(self.layers.last_bias.dtype))
        return u.double(), ladj.double() + self.place.log_diag.sum()
