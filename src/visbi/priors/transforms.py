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

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from visbi.core.checks import one_of, violation
from visbi.core.devices import map_tensors
from visbi.core.random import seeded
from visbi.core.types import ZScore
from visbi.priors.blocks import AffineBlock, Block
from visbi.priors.build import block_of_transform, blocks_of_prior
from visbi.priors.distributions import as_prior
from visbi.priors.inverse import Inverted
from visbi.priors.supports import bounds, has_support, inside, support_of

__all__ = ["Coordinates", "CoordinatesTransform", "coordinates", "mcmc_transform"]

_DRAWS = 4096  # prior draws from which location and scale are read where no closed form exists
_LARGEST = 0.9  # of what a dtype can hold: as good as all of it
_ROUND_TRIP = 1e-2  # relative to the prior's spread
_RETURN = 0.99  # share of draws that must come back


class Coordinates(nn.Module):
    """The map between theta on the prior's support and z in R^d.

    Attributes:
        dim_theta, dim_z: lengths; they differ on a simplex.
        support: the prior's support, or None.
        dtype: theta's.

    Build it with `coordinates`.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, blocks: list[Block], support: constraints.Constraint | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.support = support
        self.dtype = dtype
        self.dims_theta = [b.dim_theta for b in blocks]
        self.dims_z = [b.dim_z for b in blocks]
        self.dim_theta, self.dim_z = sum(self.dims_theta), sum(self.dims_z)
        low, high = bounds(support if support is not None else constraints.real, self.dim_theta)
        # strictly inside once rounded to theta's own dtype: a density may be zero on the very bound
        infinity = torch.tensor(math.inf, dtype=dtype)
        self.register_buffer("low", torch.nextafter(low.to(dtype), infinity))
        self.register_buffer("high", torch.nextafter(high.to(dtype), -infinity))

    def to_theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """theta (..., D) and log|dtheta/dz| (...) in float64, from z (..., d)."""
        pieces = z.double().split(self.dims_z, -1)
        parts = [b.to_theta(piece) for b, piece in zip(self._blocks(), pieces, strict=True)]
        theta = torch.cat([p[0] for p in parts], dim=-1).to(self.dtype)
        return theta.clamp(self.low, self.high), sum((p[1] for p in parts[1:]), parts[0][1])

    def overflows(self, theta: Tensor) -> Tensor:
        """Where theta (..., D) stands for more than its dtype can hold, (...) bool.

        There theta is the largest number whatever z is, but log|dtheta/dz| goes on rising, and a density over
        z would rise with it.
        """
        return (theta.abs() > _LARGEST * torch.finfo(theta.dtype).max).any(-1)

    def to_z(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., d) in float64 and log|dtheta/dz| (...) at it, from theta (..., D) in the support.

        Raises:
            ValueError: theta of another length than D.
        """
        if theta.shape[-1:] != (self.dim_theta,):
            raise ValueError(violation("theta", f"shape (..., {self.dim_theta})", tuple(theta.shape)))
        pieces = theta.clamp(self.low, self.high).double().split(self.dims_theta, -1)
        parts = [b.to_z(piece) for b, piece in zip(self._blocks(), pieces, strict=True)]
        return torch.cat([p[0] for p in parts], dim=-1), sum((p[1] for p in parts[1:]), parts[0][1])

    def contains(self, theta: Tensor) -> Tensor:
        """Which rows of theta (..., D) are finite and lie in the support, (...) bool."""
        finite = torch.isfinite(theta).all(-1)
        return finite if self.support is None else inside(self.support, theta) & finite

    def transform(self) -> Transform:
        """The same map as a torch Transform, theta -> z."""
        return CoordinatesTransform(self)

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> "Coordinates":
        self.support = map_tensors(self.support, fn)
        return super()._apply(fn, recurse)


class CoordinatesTransform(Transform):
    """theta -> z as a torch Transform."""

    codomain = constraints.real_vector
    bijective = True

    def __init__(self, coords: Coordinates) -> None:
        super().__init__()
        self.coords = coords

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        support = self.coords.support
        if support is None:
            return constraints.real_vector
        return support if support.event_dim else constraints.independent(support, 1)

    @property
    def inv(self) -> Transform:
        return Inverted(self)

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
        ValueError: an unknown `z_score`; a prior that is discrete, holds no numbers (device meta), or has no
            support and there is no `theta_transform`.

    >>> from visbi.priors import BoxUniform
    >>> c = coordinates(BoxUniform(-torch.ones(2), torch.ones(2)))
    >>> theta, ladj = c.to_theta(torch.zeros(1, 2))
    >>> theta.tolist()
    [[0.0, 0.0]]
    """
    one_of("z_score_theta", z_score, ("none", "independent", "structured"))
    prior = as_prior(prior)
    support = support_of(prior) if theta_transform is None or has_support(prior) else None
    draws = _draws(prior)
    if theta_transform is not None:
        blocks = [block_of_transform(theta_transform, draws, z_score)]
    else:
        blocks = blocks_of_prior(prior, draws, z_score)
    coords = Coordinates(blocks, support, draws.dtype).to(draws.device)
    if _round_trips(coords, prior, draws):
        return coords
    warnings.warn(
        "The map between the prior's support and R^d does not return prior draws to where they were; "
        "theta is used as it is. Pass `theta_transform` to choose a map.",
        stacklevel=3,
    )
    dim = draws.shape[-1]
    identity = AffineBlock(torch.zeros(dim), torch.eye(dim))
    return Coordinates([identity], None, draws.dtype).to(draws.device)


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


def _draws(prior: Distribution) -> Tensor:
    """Draws of the prior, (_DRAWS, D), the same every time."""
    with seeded(0):
        draws = prior.sample(torch.Size([_DRAWS]))
    if draws.device.type == "meta":
        raise ValueError(violation("prior", "tensors that hold numbers", "tensors on device meta"))
    if draws.shape != (_DRAWS, *prior.event_shape) or not draws.is_floating_point():
        expected = f"samples of shape (n, {prior.event_shape[0]}) in floating point"
        raise ValueError(violation("prior", expected, f"{tuple(draws.shape)} {draws.dtype} for n = {_DRAWS}"))
    return draws


def _round_trips(coords: Coordinates, prior: Distribution, draws: Tensor) -> bool:
    """Whether draws come back, of those at which the prior has a density (a vague one's own may overflow)."""
    with torch.no_grad():
        back = coords.to_theta(coords.to_z(draws)[0])[0]
    q16, q84 = torch.quantile(draws.double(), torch.tensor([0.16, 0.84]).to(draws.double()), dim=0)
    error = (back - draws).abs().double() / (q84 - q16 + draws.abs().double())
    good = error.nan_to_num(math.inf) < _ROUND_TRIP
    if bool(good.double().mean() > _RETURN):
        return True
    dense = torch.isfinite(prior.log_prob(draws))
    return bool(dense.any()) and bool(good[dense].double().mean() > _RETURN)
