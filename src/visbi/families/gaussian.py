r"""Gaussian bodies: z = m + L u, u ~ N(0, I), with L lower triangular or diagonal.

log q(z) = -sum_i log L_ii - |u|^2 / 2 - (d/2) log 2 pi,  d log q / dz = -L^{-T} u. Parameters and algebra are
float64: covariances decide.
"""

import math

import torch
from torch import Tensor, nn

from visbi.families.base import Body

__all__ = ["UNIT", "GaussianBody"]

# Parameters are kept in tenths of what they stand for: an optimiser tuned for the weights of networks then
# moves a mean or a log-scale by .01 a step at the learning rate of .001, and reaches a posterior e^-8 times
# its prior's width.
UNIT = 10.0


class GaussianBody(Body):
    """N(m, L L') with L = diag(s) (I + strictly lower triangle), or diagonal.

    Args:
        dim: d.
        diagonal: whether only the diagonal of L is free.

    >>> body = GaussianBody(2)
    >>> z, log_q = body.rsample_and_log_prob(3)
    >>> bool(torch.allclose(body.log_prob(z), log_q))
    True
    """

    def __init__(self, dim: int, *, diagonal: bool = False) -> None:
        super().__init__(dim)
        self.raw_loc = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.raw_log_diag = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        below = dim * (dim - 1) // 2
        self.raw_below = None if diagonal else nn.Parameter(torch.zeros(below, dtype=torch.float64))

    @property
    def loc(self) -> Tensor:
        """m, (d,)."""
        return UNIT * self.raw_loc

    @property
    def log_diag(self) -> Tensor:
        """Logarithm of L's diagonal, (d,)."""
        return UNIT * self.raw_log_diag

    @property
    def scale_tril(self) -> Tensor:
        """L, (d, d)."""
        scale = self.log_diag.exp()
        if self.raw_below is None:
            return scale.diag_embed()
        i, j = torch.tril_indices(self.dim, self.dim, -1, device=scale.device)
        unit = torch.eye(self.dim, dtype=scale.dtype, device=scale.device)
        return scale[:, None] * unit.index_put((i, j), UNIT * self.raw_below)

    def placed(self, loc: Tensor, scale_tril: Tensor) -> "GaussianBody":
        if self.raw_below is None:
            # the diagonal Gaussian nearest in reverse KL has the conditional variances
            scale_tril = torch.cholesky_inverse(scale_tril).diagonal().rsqrt().diag()
        self.set_(loc, scale_tril)
        return self

    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Overwrite m and L in place."""
        with torch.no_grad():
            self.raw_loc.copy_(loc / UNIT)
            self.raw_log_diag.copy_(scale_tril.diagonal().log() / UNIT)
            if self.raw_below is not None:
                i, j = torch.tril_indices(self.dim, self.dim, -1)
                unit = scale_tril / scale_tril.diagonal()[:, None]
                self.raw_below.copy_(unit[i, j] / UNIT)

    def _log_prob_of(self, u: Tensor) -> Tensor:
        return -0.5 * u.square().sum(-1) - self.log_diag.sum() - 0.5 * self.dim * math.log(2 * math.pi)

    def _affine(self, u: Tensor) -> Tensor:
        if self.raw_below is None:
            return self.loc + u * self.log_diag.exp()
        return self.loc + u @ self.scale_tril.mT

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        u = torch.randn(n, self.dim, dtype=self.raw_loc.dtype, device=self.raw_loc.device)
        return self._affine(u), self._log_prob_of(u)

    def log_prob(self, z: Tensor) -> Tensor:
        centred = z.double() - self.loc
        if self.raw_below is None:
            return self._log_prob_of(centred / self.log_diag.exp())
        return self._log_prob_of(torch.linalg.solve_triangular(self.scale_tril, centred.mT, upper=False).mT)

    def score_at_draws(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            centred = z.double() - self.loc
            if self.raw_below is None:
                return -centred * (-2 * self.log_diag).exp()
            tril = self.scale_tril
            u = torch.linalg.solve_triangular(tril, centred.mT, upper=False)
            return -torch.linalg.solve_triangular(tril.mT, u, upper=True).mT
