r"""Gaussians with few correlated directions: covariance S (I + U U') S, S diagonal, U (d, r).

    z = m + S y,   y = e + U f,   e ~ N(0, I_d),   f ~ N(0, I_r),
    log q(z) = -log|S| - log|C| - (|y|^2 - |C^{-1} U' y|^2) / 2 - (d/2) log 2 pi,   C C' = I_r + U' U,

by the matrix determinant lemma and the Woodbury identity (Ong, Nott, Smith 2018): O(d r^2) for the r x r
matrix and O(d r) a draw, and never a d x d matrix, which is what d of some hundreds needs. The score is
-S^{-1} (y - U C^{-T} C^{-1} U' y). Everything is float64.
"""

import math

import torch
from torch import Tensor, nn

from visbi.core.checks import positive_int
from visbi.families.base import Body, log_standard_normal, path_part
from visbi.families.gaussian import UNIT

__all__ = ["LowRankBody", "default_rank"]

_START = 0.1  # length of U's columns at the start: of zero they would have no gradient


def default_rank(dim: int) -> int:
    """ceil(sqrt(d)): then O(d r^2) is d^2, what one product with a dense factor costs for one draw.

    >>> tuple(default_rank(dim) for dim in (1, 2, 5, 50, 1000))
    (1, 2, 3, 8, 32)
    """
    return math.isqrt(dim - 1) + 1


class LowRankBody(Body):
    """N(m, S (I + U U') S); at the start nearly N(0, I).

    Args:
        dim: d.
        rank: r, at most d; None is `default_rank`.

    Raises:
        ValueError: a rank below 1.

    >>> body = LowRankBody(50, rank=3)
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> bool(torch.allclose(body.log_prob(z), log_q)), body.cov.shape
    (True, torch.Size([50, 50]))
    """

    def __init__(self, dim: int, rank: int | None = None) -> None:
        super().__init__(dim)
        self.rank = min(dim, default_rank(dim) if rank is None else positive_int("rank", rank))
        double = torch.float64
        self.raw_loc = nn.Parameter(torch.zeros(dim, dtype=double))
        self.raw_log_diag = nn.Parameter(torch.zeros(dim, dtype=double))
        start = _START / (UNIT * dim**0.5)
        self.raw_factor = nn.Parameter(start * torch.randn(dim, self.rank, dtype=double))

    @property
    def loc(self) -> Tensor:
        """m, (d,)."""
        return UNIT * self.raw_loc

    @property
    def log_diag(self) -> Tensor:
        """Logarithm of S's diagonal, (d,)."""
        return UNIT * self.raw_log_diag

    @property
    def factor(self) -> Tensor:
        """U, (d, r)."""
        return UNIT * self.raw_factor

    @property
    def cov(self) -> Tensor:
        """The covariance, (d, d)."""
        scaled = self.log_diag.exp()[:, None] * self.factor
        return scaled @ scaled.mT + (2 * self.log_diag).exp().diag()

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self.draw(n, path=False)[:2]

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        noise = torch.randn(n, self.dim + self.rank, dtype=self.raw_loc.dtype, device=self.raw_loc.device)
        e, f = noise.split([self.dim, self.rank], 1)
        y = e + f @ self.factor.mT
        z = self.loc + y * self.log_diag.exp()
        log_q, score = self._log_prob_and_score(y)
        if not (path and torch.is_grad_enabled()):
            return z, log_q, None
        return z, log_q, path_part(log_q, z, score)

    def log_prob(self, z: Tensor) -> Tensor:
        return self._log_prob_and_score((z.double() - self.loc) * (-self.log_diag).exp())[0]

    def score_at_draws(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self._log_prob_and_score((z.double() - self.loc) * (-self.log_diag).exp())[1]

    def _log_prob_and_score(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """log q (N,) and d log q / dz (N, d), the latter without gradient, at y (N, d)."""
        factor = self.factor
        unit = torch.eye(self.rank, dtype=factor.dtype, device=factor.device)
        root = torch.linalg.cholesky(unit + factor.mT @ factor)
        inner = torch.linalg.solve_triangular(root, (y @ factor).mT, upper=False)  # (r, N)
        log_q = log_standard_normal(y) + 0.5 * inner.square().sum(0)
        log_q = log_q - self.log_diag.sum() - root.diagonal().log().sum()
        with torch.no_grad():
            explained = torch.linalg.solve_triangular(root.mT, inner, upper=True).mT @ factor.mT
            score = (explained - y) * (-self.log_diag).exp()
        return log_q, score
