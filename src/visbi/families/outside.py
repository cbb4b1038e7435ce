r"""A learnt Gaussian outside of something else: z = m + L y.

It takes out location, scale and correlation, which flows approach slowly, so that what is inside shapes the
rest. With v_y the score of y, that of z is v_z = L^{-T} v_y.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from visbi.families.base import Body, path_part
from visbi.families.gaussian import GaussianBody

__all__ = ["OutsideBody"]


class OutsideBody(Body):
    """The Gaussian map, at first the identity and float64, around y that a subclass draws.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.place = GaussianBody(dim)

    @abstractmethod
    def draw_inside(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """y (n, d), log q(y) (n,) and, if `path`, d log q / dy (n, d) without gradient."""

    @abstractmethod
    def log_prob_inside(self, y: Tensor) -> Tensor:
        """log q(y) (N,) for y (N, d) in float64."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64  # z is centred before it is rounded to what works inside

    def placed(self, loc: Tensor, scale_tril: Tensor) -> "OutsideBody":
        self.place.set_(loc, scale_tril)
        return self

    def outward(self, y: Tensor) -> Tensor:
        """z (N, d), float64, from y (N, d)."""
        return self.place.loc + y.double() @ self.place.scale_tril.mT

    def inward(self, z: Tensor) -> Tensor:
        """y (N, d), float64, from z (N, d)."""
        centred = (z.double() - self.place.loc).mT
        return torch.linalg.solve_triangular(self.place.scale_tril, centred, upper=False).mT

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self.draw(n, path=False)[:2]

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        y, log_q, score = self.draw_inside(n, path=path and torch.is_grad_enabled())
        scale_tril = self.place.scale_tril
        z = self.place.loc + y.double() @ scale_tril.mT
        log_q = log_q.double() - self.place.log_diag.sum()
        if score is None:
            return z, log_q, None
        back = torch.linalg.solve_triangular(scale_tril.detach(), score.double(), upper=False, left=False)
        return z, log_q, path_part(log_q, z, back)

    def log_prob(self, z: Tensor) -> Tensor:
        log_q = self.log_prob_inside(self.inward(z)).double() - self.place.log_diag.sum()
        return torch.where(log_q.isnan(), -torch.inf, log_q)  # so far out that it cannot be told
