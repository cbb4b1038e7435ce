r"""The pieces that coordinates are made of: maps theta <-> z over consecutive entries, with log|dtheta/dz|.

    AffineBlock      theta = loc + L z, or its exponential: a normal or log-normal prior
    UniformBlock     theta = low + (high - low) Phi(z)
    CdfBlock         theta = F^-1(Phi(z)) for any prior with a cdf F and its inverse
    GammaBlock       the same for gamma priors and inverse gamma ones, by a spline of log theta
    BijectionBlock   theta = T(loc + L z) for a torch transform T of R^d onto the support

The first three make z exactly standard normal under their prior, the fourth nearly. All runs in float64.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from visbi.core.devices import map_tensors
from visbi.priors.inverse import lasting

__all__ = [
    "AffineBlock",
    "BijectionBlock",
    "Block",
    "CdfBlock",
    "GammaBlock",
    "UniformBlock",
    "in_double",
    "ndtr",
]

_Z_MAX = 8.1  # beyond it 1 - Phi(z) is lost to float64 rounding
_U_MIN = 0.5 * math.erfc(_Z_MAX / math.sqrt(2))
_U_MAX = 1 - 2**-53
_TINY = 1e-300
_Z_END, _CELLS = 8.2, 820  # of a spline's nodes, and how many lie between them
_CELL = 2 * _Z_END / _CELLS
_SMALL = -40.0  # log of what is as good as zero beside one
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


class GammaBlock(Block):
    """log theta = S(z) entry by entry, S the monotone rational-quadratic spline of a gamma's quantiles.

    Its values and slopes at the nodes are exact (splines: Gregory, Delbourgo 1982). A vague gamma, of shape
    .001, lies between e^-35000 and e^10: where theta is nothing, or too large, for its dtype it stays at the
    last number, and log|dtheta/dz| is what makes that prior N(0, 1), so that none of its mass is lost.

    Args:
        concentration, rate: (D,).
        inverse: whether 1 / theta has the gamma distribution.
    """

    concentration: Tensor
    rate: Tensor
    y: Tensor
    slope: Tensor

    def __init__(self, concentration: Tensor, rate: Tensor, inverse: bool = False) -> None:
        super().__init__(len(concentration), len(concentration))
        self.dtype, self.inverse = concentration.dtype, inverse
        self.register_buffer("concentration", concentration.detach().double().clone())
        self.register_buffer("rate", rate.detach().double().clone())
        y, slope = _log_gamma_quantiles(self.concentration)
        y = y - self.rate.log()[:, None]
        self.register_buffer("y", -y.flip(1) if inverse else y)
        self.register_buffer("slope", slope.flip(1) if inverse else slope)

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        cell, along = self._cell(z)
        (y, high, d, e), s = self._at(cell)
        both = along * (1 - along)
        bottom = s + (d + e - 2 * s) * both
        log_theta = y + (high - y) * (s * along.square() + d * both) / bottom
        steep = s.square() * (e * along.square() + 2 * s * both + d * (1 - along).square()) / bottom.square()
        low, high = self._range
        theta = log_theta.clamp(low, high)
        there = (log_theta > low) & (log_theta < high) & (z.abs() < _Z_END)
        ladj = torch.where(there, theta + (steep / _CELL).log(), _log_normal(z) - self._log_prob(theta))
        return theta.exp(), ladj.sum(-1)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        log_theta = theta.clamp_min(_TINY).log().clamp(*self._range)
        entries = log_theta.movedim(-1, 0)
        index = torch.searchsorted(self.y, entries.reshape(len(self.y), -1).contiguous())
        cell = index.reshape(entries.shape).movedim(0, -1).sub(1).clamp(0, _CELLS - 1)
        (y, high, d, e), s = self._at(cell)
        up = (log_theta - y) / (high - y)
        bend = up * (d + e - 2 * s)
        a, b, c = s - d + bend, d - bend, -s * up
        along = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0.0).sqrt())
        z = -_Z_END + _CELL * (cell + along.clamp(0.0, 1.0))
        return z, self.to_theta(z)[1]

    @property
    def _range(self) -> tuple[float, float]:
        """Of log theta, in its dtype; torch's inverse gamma takes theta^2."""
        info = torch.finfo(self.dtype)
        return math.log(info.tiny), math.log(0.5 * info.max) * (0.5 if self.inverse else 1.0)

    def _cell(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Which cell z is in, and how far along; beyond the ends it is at them."""
        along = ((z + _Z_END) / _CELL).clamp(0.0, float(_CELLS))
        cell = along.detach().long().clamp_max(_CELLS - 1)
        return cell, along - cell

    def _at(self, cell: Tensor) -> tuple[list[Tensor], Tensor]:
        """log theta and slopes, by a cell's width, at both ends of cells (..., D), and the slope between."""
        flat = cell.reshape(-1, len(self.y)).mT
        ends = [t.gather(1, flat + k).mT.reshape(cell.shape) for t in (self.y, self.slope) for k in (0, 1)]
        return ends, ends[1] - ends[0]

    def _log_prob(self, log_theta: Tensor) -> Tensor:
        """Of the prior, at theta = exp(log_theta), entry by entry."""
        a, b, sign = self.concentration, self.rate, -1.0 if self.inverse else 1.0
        return a * b.log() - torch.lgamma(a) + (sign * a - 1) * log_theta - b * (sign * log_theta).exp()


def _log_gamma_quantiles(concentration: Tensor) -> tuple[Tensor, Tensor]:
    """log of quantiles of Gamma(a, 1) at the nodes, (D, nodes), and slopes there, by a cell's width."""
    from scipy import special  # on use: most priors have no gamma

    z = -_Z_END + _CELL * torch.arange(_CELLS + 1, dtype=torch.float64)
    a = concentration.cpu()[:, None]
    below, above = ndtr(z).numpy(), ndtr(-z).numpy()
    number = a.numpy()
    x = torch.where(
        z < 0,
        torch.from_numpy(special.gammaincinv(number, below)),
        torch.from_numpy(special.gammainccinv(number, above)),
    )
    # of numbers that small the cdf is x^a / Gamma(a + 1)
    small = (torch.special.log_ndtr(z) + torch.lgamma(a + 1)) / a
    y = torch.where(small < _SMALL, small, x.clamp_min(_TINY).log())
    slope = (_log_normal(z) - a * y + y.exp() + torch.lgamma(a)).exp() * _CELL
    return y.to(concentration.device), slope.to(concentration.device)


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
