r"""A body placed elsewhere: z = loc + L y with y from another body, loc and L fixed.

A flow that starts near the identity then starts as the Gaussian N(loc, L L').
"""

import torch
from torch import Tensor

from visbi.families.base import Body

__all__ = ["AffineBody"]


class AffineBody(Body):
    """An inner body in its own location and scale.

    Args:
        inner: a body over y in R^d.
        loc: (d,). scale_tril: (d, d), lower triangular.

    >>> from visbi.families.gaussian import GaussianBody
    >>> body = AffineBody(GaussianBody(2), torch.ones(2), 0.1 * torch.eye(2))
    >>> z, log_q = body.rsample_and_log_prob(5)
    >>> bool(torch.allclose(body.log_prob(z), log_q))
    True
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, inner: Body, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(inner.dim)
        self.inner = inner
        self.register_buffer("loc", loc.detach().double().clone())
        self.register_buffer("scale_tril", scale_tril.detach().double().clone())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64  # z is centred before it is rounded to what the inner body works in

    def _log_volume(self) -> Tensor:
        return self.scale_tril.diagonal().log().sum()

    def _outward(self, y: Tensor) -> Tensor:
        return self.loc + y.double() @ self.scale_tril.mT

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        y, log_q = self.inner.rsample_and_log_prob(n)
        return self._outward(y), log_q.double() - self._log_volume()

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        y, log_q, log_q_path = self.inner.draw(n, path=path)
        shift = self._log_volume()  # constant, so the path part of log q is that of the inner body
        moved = None if log_q_path is None else log_q_path.double() - shift
        return self._outward(y), log_q.double() - shift, moved

    def _inward(self, z: Tensor) -> Tensor:
        centred = (z.double() - self.loc).mT
        return torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).mT.to(self.inner.dtype)

    def log_prob_by_choice(self, z: Tensor) -> Tensor | None:
        return self.inner.log_prob_by_choice(self._inward(z))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.inner.log_prob(self._inward(z)).double() - self._log_volume()

    def placed(self, loc: Tensor, scale_tril: Tensor) -> Body:
        return AffineBody(self.inner, loc, scale_tril)
