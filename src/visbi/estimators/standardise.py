r"""Standardisation: data to mean 0 and scale 1, as an affine map with a known Jacobian.

    z = W ((y - m) / s),    log|det dz/dy| = log|det W| - sum_i log s_i

m and s are the mean and standard deviation of each entry. `independent` has W = I. `structured` removes
what the entries share: for vectors W = L^-1 with L L' the correlation matrix, so that z has identity
covariance (Cholesky keeps the order of the entries: z_i depends on y_1..y_i, which suits time series); for
arrays of two or more axes, whose neighbourhoods an embedding wants to see, all entries share one m and one
s. Statistics are computed in float64. An entry that does not vary is only shifted.
"""

import torch
from torch import Tensor, nn

from visbi.core.checks import one_of, violation
from visbi.core.types import Shape, ZScore

__all__ = ["Z_SCORES", "Standardise"]

Z_SCORES = ("none", "independent", "structured")
"""Kinds of standardisation."""

_FLOOR = 1e-6  # of a correlation matrix's eigenvalues: keeps W within what float32 can undo


class Standardise(nn.Module):
    """An invertible affine map fitted to data; the identity until `fit`.

    Args:
        event_shape: shape of one row of the data.
        kind: "none", "independent" or "structured".

    >>> y = torch.tensor([[0.0, 10.0], [2.0, 10.0]])
    >>> Standardise((2,), "independent").fit(y)(y)
    tensor([[-0.7071,  0.0000],
            [ 0.7071,  0.0000]])
    """

    loc: Tensor
    scale: Tensor
    whitening: Tensor | None
    log_abs_det: Tensor
    """log|det dz/dy|, a scalar."""

    def __init__(self, event_shape: Shape, kind: ZScore) -> None:
        super().__init__()
        self.kind = one_of("z_score", kind, Z_SCORES)
        n = event_shape[0] if kind == "structured" and len(event_shape) == 1 else 0
        self.register_buffer("loc", torch.zeros(event_shape))
        self.register_buffer("scale", torch.ones(event_shape))
        self.register_buffer("whitening", torch.eye(n) if n > 1 else None)
        self.register_buffer("log_abs_det", torch.zeros(()))

    def fit(self, data: Tensor) -> "Standardise":
        """Set the map from rows of data (N, *event_shape); returns self.

        Raises:
            ValueError: fewer rows than entries, where these are to be whitened.
        """
        if self.kind == "none":
            return self
        eps = torch.finfo(data.dtype).eps
        data = data.detach().to("cpu", torch.float64)  # some devices have no float64
        dims = 0 if self.kind == "independent" or data.dim() == 2 else tuple(range(data.dim()))
        loc = data.mean(dims).expand(self.loc.shape)
        scale = data.sub(loc).square().sum(0 if dims == 0 else dims)
        scale = (scale / max(1, data.shape[0] - 1 if dims == 0 else data.numel() - 1)).sqrt()
        varies = scale > 10 * eps * loc.abs()
        scale = torch.where(varies, scale, torch.ones_like(scale)).expand(self.loc.shape)
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        log_abs_det = -self.scale.cpu().double().log().sum()
        if self.whitening is not None:
            factor = _inverse_cholesky((data - loc) / scale)
            self.whitening.copy_(factor)
            log_abs_det = log_abs_det + self.whitening.cpu().double().diagonal().log().sum()
        self.log_abs_det.copy_(log_abs_det)
        return self

    def forward(self, y: Tensor) -> Tensor:
        """z for y (..., *event_shape), in the map's own dtype."""
        # subtracted in the wider of both dtypes: float64 data far from 0 keep their digits
        z = ((y - self.loc) / self.scale).to(self.loc.dtype)
        return z if self.whitening is None else z @ self.whitening.mT

    def inverse(self, z: Tensor) -> Tensor:
        """y for z (..., *event_shape)."""
        if self.whitening is not None:
            z = torch.linalg.solve_triangular(self.whitening, z.unsqueeze(-1), upper=False).squeeze(-1)
        return z * self.scale + self.loc


def _inverse_cholesky(z: Tensor) -> Tensor:
    """L^-1 of the correlation matrix L L' of rows z (N, n) that have mean 0 and sd 1."""
    n_rows, n = z.shape
    if n_rows <= n:
        message = violation(
            "z_score", f"more than {n} rows for 'structured', which whitens {n} entries", n_rows
        )
        raise ValueError(message)
    covariance = z.mT @ z / (n_rows - 1)
    covariance = covariance + torch.diag((covariance.diagonal() == 0).to(z.dtype))  # entries that do not vary
    values, vectors = torch.linalg.eigh(covariance)
    covariance = (vectors * values.clamp_min(_FLOOR)) @ vectors.mT
    factor = torch.linalg.cholesky(covariance)
    eye = torch.eye(n, dtype=z.dtype, device=z.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False)
