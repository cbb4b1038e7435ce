r"""Coordinates z in R^d for a prior on any support.

A family of distributions lives on R^d; the prior lives on its support. `coordinates` builds the map
between them, theta = link(z), from one of three levels of `z_score`:

none
    the plain bijection of the support (log, logit, stick breaking, identity), nothing rescaled;
independent
    each entry on the scale of its prior. A factor with a cdf goes through it, z = Phi^-1(F(theta)), so that
    z ~ N(0, 1) exactly; a normal or log-normal factor is standardised in closed form, which is the
    same map; any other is bijected and standardised with prior draws;
structured
    the whole vector whitened. For a multivariate normal z = L^-1 (theta - m); otherwise the covariance
    of prior draws in the coordinates above is taken out (nothing to do where the prior factorises).

The Gaussian cdf rather than the logistic one because in its tails a posterior piled against a bound
stays close to normal; with the logit it grows a long exponential tail. All of it runs in float64.
"""

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Transform,
    Uniform,
    constraints,
)

from visbi.core.checks import one_of
from visbi.core.devices import map_tensors
from visbi.core.random import seeded
from visbi.core.types import ZScore
from visbi.priors.distributions import MultipleIndependent, as_prior
from visbi.priors.supports import bijection_to, bounds, inside, support_of

__all__ = ["Coordinates", "coordinates", "mcmc_transform"]

_Z_MAX = 8.1  # beyond it 1 - Phi(z) is lost to float64 rounding
_TINY = 1e-300
_DRAWS = 4096  # prior draws from which location and scale are read where no closed form exists
_ROUND_TRIP = 1e-2  # relative to the prior's spread


class Coordinates(nn.Module):
    """The map between theta on the prior's support and z in R^d.

    Attributes:
        dim_theta, dim_z: lengths; they differ on a simplex.

    Build it with `coordinates`.
    """

    def __init__(self, blocks: list["Block"], support: constraints.Constraint | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.support = support
        self.dtype = dtype
        self.dims_theta = [b.dim_theta for b in blocks]
        self.dims_z = [b.dim_z for b in blocks]
        self.dim_theta, self.dim_z = sum(self.dims_theta), sum(self.dims_z)
        low, high = bounds(support if support is not None else constraints.real, self.dim_theta)
        # strictly inside once rounded to theta's own dtype: a density may be zero on the very bound
        low_in = torch.nextafter(low.to(dtype), torch.tensor(math.inf, dtype=dtype))
        high_in = torch.nextafter(high.to(dtype), torch.tensor(-math.inf, dtype=dtype))
        self.register_buffer("low", torch.where(low.isinf(), low.to(dtype), low_in))
        self.register_buffer("high", torch.where(high.isinf(), high.to(dtype), high_in))

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """theta (..., D) and log|dtheta/dz| (...) in float64, from z (..., d)."""
        parts = [b.to_theta(p) for b, p in zip(self._blocks(), z.double().split(self.dims_z, -1), strict=True)]
        theta = torch.cat([p[0] for p in parts], dim=-1).to(self.dtype)
        return theta.clamp(self.low, self.high), torch.stack([p[1] for p in parts]).sum(0)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., d) in float64 and log|dtheta/dz| (...) at it, from theta (..., D) in the support."""
        theta = theta.clamp(self.low, self.high).double()
        parts = [b.to_z(p) for b, p in zip(self._blocks(), theta.split(self.dims_theta, -1), strict=True)]
        return torch.cat([p[0] for p in parts], dim=-1), torch.stack([p[1] for p in parts]).sum(0)

    def contains(self, theta: Tensor) -> Tensor:
        """Which rows of theta (..., D) lie in the support, (...) bool."""
        if self.support is None:
            return torch.isfinite(theta).all(-1)
        return inside(self.support, theta) & ~theta.isnan().any(-1)

    def transform(self) -> Transform:
        """The same map as a torch Transform, theta -> z."""
        return _CoordinatesTransform(self)

    def _blocks(self) -> list["Block"]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> "Coordinates":
        self.support = map_tensors(self.support, fn)
        return super()._apply(fn, recurse)


class _CoordinatesTransform(Transform):
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, coords: Coordinates) -> None:
        super().__init__()
        self.coords = coords

    @property
    def domain(self) -> constraints.Constraint:
        support = self.coords.support
        if support is None:
            return constraints.real_vector
        return support if support.event_dim else constraints.independent(support, 1)

    def _call(self, x: Tensor) -> Tensor:
        return self.coords.to_z(x)[0].to(x.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.coords.to_theta(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.coords.to_z(x)[1].to(x.dtype)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], self.coords.dim_z])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], self.coords.dim_theta])


class Block(nn.Module):
    """A piece of the map, over consecutive entries of theta and of z."""

    def __init__(self, dim_theta: int, dim_z: int) -> None:
        super().__init__()
        self.dim_theta, self.dim_z = dim_theta, dim_z

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """theta and log|dtheta/dz| from z."""
        raise NotImplementedError

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|dtheta/dz| from theta."""
        raise NotImplementedError


class _Affine(Block):
    """theta = loc + L z, optionally followed by exp; L lower triangular or diagonal."""

    def __init__(self, loc: Tensor, scale_tril: Tensor, exp: bool = False) -> None:
        super().__init__(len(loc), len(loc))
        self.register_buffer("loc", loc.detach().double().clone())
        self.register_buffer("scale_tril", scale_tril.detach().double().clone())
        self.exp = exp

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.loc + z @ self.scale_tril.mT
        ladj = self.scale_tril.diagonal().log().sum().expand(z.shape[:-1])
        return (y.exp(), ladj + y.sum(-1)) if self.exp else (y, ladj)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        y = theta.clamp_min(_TINY).log() if self.exp else theta
        z = torch.linalg.solve_triangular(self.scale_tril, (y - self.loc)[..., None], upper=False)[..., 0]
        ladj = self.scale_tril.diagonal().log().sum().expand(theta.shape[:-1])
        return z, ladj + y.sum(-1) if self.exp else ladj


class _Uniform(Block):
    """theta = low + (high - low) Phi(z)."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__(len(low), len(low))
        self.register_buffer("low", low.detach().double().clone())
        self.register_buffer("width", high.detach().double() - low.detach().double())

    def _ladj(self, z: Tensor) -> Tensor:
        return (_log_normal(z) + self.width.log()).sum(-1)

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.low + self.width * torch.special.ndtr(z), self._ladj(z)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        share = ((theta - self.low) / self.width).clamp(_TINY, 1 - 2**-53)
        z = torch.special.ndtri(share)
        return z, self._ladj(z)


class _Cdf(Block):
    """theta = F^-1(Phi(z)) entry by entry; log|dtheta/dz| = log N(z) - log p(theta)."""

    def __init__(self, dist: Distribution, dim: int) -> None:
        super().__init__(dim, dim)
        self.dist = _without_validation(map_tensors(dist, lambda t: t.detach().double()))

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.dist.icdf(torch.special.ndtr(z.clamp(-_Z_MAX, _Z_MAX)))
        return theta, (_log_normal(z) - self.dist.log_prob(theta)).sum(-1)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.special.ndtri(self.dist.cdf(theta).clamp(_TINY, 1 - 2**-53))
        return z, (_log_normal(z) - self.dist.log_prob(theta)).sum(-1)

    def _apply(self, fn: Any, recurse: bool = True) -> "_Cdf":
        self.dist = map_tensors(self.dist, fn)
        return super()._apply(fn, recurse)


class _Bijection(Block):
    """theta = T(loc + L z) for a torch Transform T from R^d to the support."""

    def __init__(self, transform: Transform, dim_theta: int, dim_z: int, inverted: bool = False) -> None:
        super().__init__(dim_theta, dim_z)
        # torch drops the wrapped transform when an inverse is pickled, so the forward one is kept
        self.torch_transform, self.inverted = transform, inverted
        self.register_buffer("loc", torch.zeros(dim_z, dtype=torch.float64))
        self.register_buffer("scale_tril", torch.eye(dim_z, dtype=torch.float64))

    def standardise(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the affine part."""
        self.loc, self.scale_tril = loc.detach().clone(), scale_tril.detach().clone()

    def _link(self) -> Transform:
        return self.torch_transform.inv if self.inverted else self.torch_transform

    def _ladj(self, y: Tensor, theta: Tensor) -> Tensor:
        ladj = self._link().log_abs_det_jacobian(y, theta)
        ladj = ladj.sum(-1) if ladj.ndim == y.ndim else ladj
        return ladj + self.scale_tril.diagonal().log().sum()

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.loc + z @ self.scale_tril.mT
        theta = self._link()(y)
        return theta, self._ladj(y, theta)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        y = self._link().inv(theta)
        z = torch.linalg.solve_triangular(self.scale_tril, (y - self.loc)[..., None], upper=False)[..., 0]
        return z, self._ladj(y, theta)

    def _apply(self, fn: Any, recurse: bool = True) -> "_Bijection":
        self.torch_transform = map_tensors(self.torch_transform, fn)
        return super()._apply(fn, recurse)


def coordinates(
    prior: Distribution,
    *,
    z_score: ZScore = "independent",
    theta_transform: Transform | None = None,
) -> Coordinates:
    """Coordinates for `prior`; see the module's text for what `z_score` chooses.

    Args:
        prior: a Distribution with `event_shape` (D,).
        z_score: "none", "independent" or "structured".
        theta_transform: a map of one's own from the support to R^d; standardised with prior draws.

    Raises:
        ValueError: no support and no `theta_transform`, or an unknown `z_score`.

    >>> from visbi.priors import BoxUniform
    >>> c = coordinates(BoxUniform(-torch.ones(2), torch.ones(2)))
    >>> theta, ladj = c.to_theta(torch.zeros(1, 2))
    >>> theta.tolist()
    [[0.0, 0.0]]
    """
    one_of("z_score_theta", z_score, ("none", "independent", "structured"))
    prior = as_prior(prior)
    with seeded(0):
        draws = prior.sample(torch.Size([_DRAWS]))
    if theta_transform is not None:
        blocks: list[Block] = [_given(theta_transform, draws, z_score)]
        support = getattr(prior, "support", None) if _has_support(prior) else None
    else:
        support = support_of(prior)
        blocks = _blocks(prior, draws, z_score)
    coords = Coordinates(blocks, support, draws.dtype)
    if draws.device.type != "meta" and not _round_trips(coords, draws):
        warnings.warn(
            "The map between the prior's support and R^d does not return prior draws to where they were; "
            "theta is used as it is. Pass `theta_transform` to choose a map.",
            stacklevel=3,
        )
        dim = draws.shape[-1]
        return Coordinates([_Affine(torch.zeros(dim), torch.eye(dim))], None, draws.dtype).to(draws.device)
    return coords.to(draws.device)


def mcmc_transform(
    prior: Distribution,
    num_prior_samples_for_zscoring: int | None = 1000,
    enable_transform: bool = True,
    device: str | torch.device = "cpu",
) -> Transform:
    """A torch Transform from the prior's support to unconstrained, standardised space.

    Args:
        prior: a Distribution with `event_shape` (D,).
        num_prior_samples_for_zscoring: None leaves the coordinates unscaled; a number scales them by the
            prior (in closed form where it has one, so the number itself does not matter).
        enable_transform: False returns the identity.
        device: where the transform works.

    >>> from visbi.priors import BoxUniform
    >>> t = mcmc_transform(BoxUniform(torch.zeros(2), torch.ones(2)))
    >>> t.inv(t(torch.full((1, 2), 0.5))).tolist()
    [[0.5, 0.5]]
    """
    if not enable_transform:
        return torch.distributions.transforms.identity_transform
    z_score: ZScore = "none" if num_prior_samples_for_zscoring is None else "independent"
    return coordinates(prior, z_score=z_score).to(device).transform()


def _blocks(prior: Distribution, draws: Tensor, z_score: ZScore) -> list[Block]:
    """One block per independent factor of the prior."""
    factors = getattr(prior, "dists", None)
    if isinstance(prior, MultipleIndependent) or (factors is not None and isinstance(factors, list | tuple)):
        dims = [d.event_shape[0] if len(d.event_shape) else d.batch_shape.numel() for d in factors or ()]
        parts = zip(factors or (), draws.split(dims, -1), strict=True)
        return [block for d, part in parts for block in _blocks(as_prior(d) if len(d.event_shape) else Independent(d, 1), part, z_score)]
    block = None if z_score == "none" else _closed_form(prior, z_score)
    if block is not None:
        return [block]
    link = bijection_to(support_of(prior))
    dim = draws.shape[-1]
    dim_z = link.inverse_shape(torch.Size([dim]))[-1]
    generic = _Bijection(link, dim, dim_z)
    _standardise(generic, draws, z_score)
    return [generic]


def _closed_form(prior: Distribution, z_score: ZScore) -> Block | None:
    """The block that makes z exactly standard normal, where the prior is one we know how to invert."""
    if isinstance(prior, MultivariateNormal):
        tril = prior.scale_tril if z_score == "structured" else prior.variance.sqrt().diag()
        return _Affine(prior.mean, tril)
    if not (isinstance(prior, Independent) and prior.reinterpreted_batch_ndims == 1):
        return None
    base: Any = prior.base_dist
    if len(base.event_shape):
        return _closed_form(base, z_score) if base.batch_shape.numel() == 1 and len(base.batch_shape) == 0 else None
    if isinstance(base, Normal):
        return _Affine(base.loc, base.scale.diag())
    if isinstance(base, LogNormal):
        return _Affine(base.loc, base.scale.diag(), exp=True)
    if isinstance(base, Uniform):
        return _Uniform(base.low, base.high)
    return _Cdf(base, base.batch_shape[0]) if _invertible(base) else None


def _invertible(base: Any) -> bool:
    """Whether the univariate distribution has a cdf and an icdf that undo each other."""
    u = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)[:, None]
    try:
        dist = _without_validation(map_tensors(base, lambda t: t.detach().double()))
        back = dist.cdf(dist.icdf(u.to(_device_of(base)).expand(-1, *base.batch_shape)))
    except (NotImplementedError, AttributeError, RuntimeError, ValueError):
        return False
    return back.device.type == "meta" or bool(((back.cpu() - u).abs() < 1e-7 + 1e-3 * torch.minimum(u, 1 - u)).all())


def _device_of(dist: Distribution) -> torch.device:
    found: list[torch.device] = []
    map_tensors(dist, lambda t: (found.append(t.device), t)[1])
    return found[0] if found else torch.device("cpu")


def _given(transform: Transform, draws: Tensor, z_score: ZScore) -> Block:
    inner = getattr(transform, "_inv", None)
    wrapped = type(transform).__name__ in ("_InverseTransform", "Inverse") and isinstance(inner, Transform)
    dim_z = transform.forward_shape(draws.shape[-1:])[-1]
    block = _Bijection(inner, draws.shape[-1], dim_z) if wrapped else _Bijection(transform, draws.shape[-1], dim_z, True)  # type: ignore[arg-type]
    _standardise(block, draws, z_score)
    return block


def _standardise(block: _Bijection, draws: Tensor, z_score: ZScore) -> None:
    """Location and scale from prior draws; quantiles for the scale, so that heavy tails do not set it."""
    if z_score == "none" or draws.device.type == "meta":
        return
    z, _ = block.to_z(draws.double())
    z = z[torch.isfinite(z).all(-1)]
    if len(z) < _DRAWS // 2:
        return
    q16, q50, q84 = torch.quantile(z, torch.tensor([0.16, 0.5, 0.84], dtype=z.dtype, device=z.device), dim=0)
    scale = ((q84 - q16) / 2).clamp_min(1e-12)
    tril = scale.diag()
    if z_score == "structured":
        u = ((z - q50) / scale).clamp(-4, 4)
        cov = torch.cov(u.mT).reshape(len(scale), len(scale))
        tril = scale[:, None] * torch.linalg.cholesky(cov + 1e-9 * torch.eye(len(scale), dtype=z.dtype, device=z.device))
    block.standardise(q50, tril)


def _round_trips(coords: Coordinates, draws: Tensor) -> bool:
    with torch.no_grad():
        back = coords.to_theta(coords.to_z(draws)[0])[0]
    spread = torch.quantile(draws.double(), 0.84, dim=0) - torch.quantile(draws.double(), 0.16, dim=0)
    error = (back - draws).abs().double() / (spread + draws.abs().double())
    return bool((error.nan_to_num(math.inf) < _ROUND_TRIP).double().mean() > 0.99)


def _has_support(prior: Distribution) -> bool:
    try:
        return prior.support is not None
    except (NotImplementedError, AttributeError):
        return False


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)


def _without_validation(dist: Any) -> Any:
    dist = copy.copy(dist)
    dist._validate_args = False
    for name in ("base_dist",):
        if name in vars(dist):
            setattr(dist, name, _without_validation(vars(dist)[name]))
    return dist
