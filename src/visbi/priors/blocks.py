r"""The pieces that coordinates are made of: maps theta <-> z over consecutive entries, with log|dtheta/dz|.

    AffineBlock      theta = loc + L z, or its exponential: a normal or log-normal prior
    UniformBlock     theta = low + (high - low) Phi(z)
    CdfBlock         theta = F^-1(Phi(z)) for any prior with a cdf F and its inverse
    BijectionBlock   theta = T(loc + L z) for a torch transform T of R^d onto the support

The first three make z exactly standard normal under their prior. All of it runs in float64.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from visbi.core.devices import map_tensors
from visbi.priors.inverse import lasting

__all__ = ["AffineBlock", "BijectionBlock", "Block", "CdfBlock", "UniformBlock", "in_double", "ndtr"]

_Z_MAX = 8.1  # beyond it 1 - Phi(z) is lost to float64 rounding
_U_MIN = 0.5 * math.erfc(_Z_MAX / math.sqrt(2))
_U_MAX = 1 - 2**-53
_TINY = 1e-300
_LOG_MAX = 709.78  # exp of more is infinite in float64


class Block(nn.Module):
    """A piece of the map, over consecutive entries of theta and of z.

    Attributes:
        dim_theta, dim_z: how many entries it takes; they differ on a simplex.
    """

    def __init__(self, dim_theta: int, dim_z: int) -> None:
        super().__init__()
        self.dim_theta, self.dim_z = dim_theta, dim_z

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """theta (..., dim_theta) and log|dtheta/dz| (...) from z (..., dim_z)."""
        raise NotImplementedError

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., dim_z) and log|dtheta/dz| (...) at it, from theta (..., dim_theta)."""
        raise NotImplementedError


class AffineBlock(Block):
    """theta = loc + L z, optionally followed by exp.

    Args:
        loc: (D,).
        scale_tril: L, (D, D), lower triangular with a positive diagonal.
        exp: whether theta is the exponential of that.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor, exp: bool = False) -> None:
        super().__init__(len(loc), len(loc))
        self.register_buffer("loc", loc.detach().double().clone())
        self.register_buffer("scale_tril", scale_tril.detach().double().clone())
        self.exp = exp

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.loc + z @ self.scale_tril.mT
        ladj = _log_det(self.scale_tril).expand(z.shape[:-1])
        return (y.clamp_max(_LOG_MAX).exp(), ladj + y.sum(-1)) if self.exp else (y, ladj)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        y = theta.clamp_min(_TINY).log() if self.exp else theta
        ladj = _log_det(self.scale_tril).expand(theta.shape[:-1])
        return _whiten(y - self.loc, self.scale_tril), ladj + y.sum(-1) if self.exp else ladj


class UniformBlock(Block):
    """theta = low + (high - low) Phi(z), for corners low and high, (D,)."""

    low: Tensor
    width: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__(len(low), len(low))
        self.register_buffer("low", low.detach().double().clone())
        self.register_buffer("width", high.detach().double() - low.detach().double())

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.low + self.width * ndtr(z), self._ladj(z)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.special.ndtri(((theta - self.low) / self.width).clamp(_TINY, _U_MAX))
        return z, self._ladj(z)

    def _ladj(self, z: Tensor) -> Tensor:
        return (_log_normal(z) + self.width.log()).sum(-1)


class CdfBlock(Block):
    """theta = F^-1(Phi(z)) entry by entry; log|dtheta/dz| = log N(z) - log p(theta).

    A cdf rounds to one where Phi does, so z ends at +-8.1 and theta at the quantiles there.

    Args:
        dist: univariate distributions of batch_shape (D,) with `cdf` and `icdf`.
    """

    def __init__(self, dist: Distribution) -> None:
        super().__init__(dist.batch_shape[0], dist.batch_shape[0])
        self.dist = lasting(in_double(dist), caching=False)

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.dist.icdf(ndtr(z.clamp(-_Z_MAX, _Z_MAX)))
        return theta, self._ladj(z, theta)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.special.ndtri(self.dist.cdf(theta).clamp(_U_MIN, _U_MAX))
        return z, self._ladj(z, theta)

    def _ladj(self, z: Tensor, theta: Tensor) -> Tensor:
        return (_log_normal(z) - self.dist.log_prob(theta)).sum(-1)

    def _apply(self, fn: Any, recurse: bool = True) -> "CdfBlock":
        self.dist = map_tensors(self.dist, fn)
        return super()._apply(fn, recurse)


class BijectionBlock(Block):
    """theta = T(loc + L z); loc = 0 and L = I until `standardise` sets them.

    Args:
        link: T, from R^d to the support.
        dim_theta, dim_z: lengths of theta and of z.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, link: Transform, dim_theta: int, dim_z: int) -> None:
        super().__init__(dim_theta, dim_z)
        self.link: Any = lasting(link, caching=False)
        self.register_buffer("loc", torch.zeros(dim_z, dtype=torch.float64))
        self.register_buffer("scale_tril", torch.eye(dim_z, dtype=torch.float64))

    def standardise(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the affine part."""
        self.loc, self.scale_tril = loc.detach().clone(), scale_tril.detach().clone()

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.loc + z @ self.scale_tril.mT
        theta = self.link(y)
        return theta, self._ladj(y, theta)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        y = self.link.inv(theta)
        return _whiten(y - self.loc, self.scale_tril), self._ladj(y, theta)

    def _ladj(self, y: Tensor, theta: Tensor) -> Tensor:
        ladj = self.link.log_abs_det_jacobian(y, theta)
        return (ladj.sum(-1) if ladj.ndim == y.ndim else ladj) + _log_det(self.scale_tril)

    def _apply(self, fn: Any, recurse: bool = True) -> "BijectionBlock":
        self.link = map_tensors(self.link, fn)
        return super()._apply(fn, recurse)


def ndtr(z: Tensor) -> Tensor:
    """Phi(z), right to rounding in the lower tail, where torch's own is one less something near one.

    There a density with a pole at a box's lower corner lives.

    >>> 1e89 * ndtr(torch.tensor([-20.0]).double())
    tensor([2.7536], dtype=torch.float64)
    """
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)


def in_double(dist: Any) -> Any:
    """A copy of a distribution in float64 that does not check values: z decides what is in the support."""
    return _without_validation(map_tensors(dist, lambda t: t.detach().double()))


def _without_validation(dist: Any) -> Any:
    dist = copy.copy(dist)
    dist._validate_args = False
    if "base_dist" in vars(dist):
        dist.base_dist = _without_validation(dist.base_dist)
    return dist


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)


def _log_det(scale_tril: Tensor) -> Tensor:
    return scale_tril.diagonal().log().sum()


def _whiten(y: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(scale_tril, y[..., None], upper=False)[..., 0]
