"""Coordinates: their blocks, or, where a block is made of a user's own code, what to make them from again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from visbi.core.checks import violation
from visbi.core.encoding import Given, Kind, WrongGiven
from visbi.core.random import seeded
from visbi.core.types import ZScore
from visbi.priors import as_prior, coordinates
from visbi.priors.blocks import AffineBlock, BijectionBlock, CdfBlock, GammaBlock, UniformBlock
from visbi.priors.transforms import Coordinates, CoordinatesTransform
from visbi.saving.modules import weights_of, with_weights

__all__ = ["COORDINATES", "CoordinatesOfPrior"]

_PROBES = 64
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class CoordinatesOfPrior:
    """In the place of coordinates that are made of a user's own code: what to call `coordinates` with.

    Attributes:
        prior: as it is stored or given.
        theta_transform: given, or None.
        z_score: as for `coordinates`.
        weights: of the coordinates.
        z, theta: (64, d) and (64, D), corresponding points, by which to see that the result is the same.
    """

    prior: Any
    theta_transform: Any
    z_score: ZScore
    weights: dict[str, Any]
    z: Tensor
    theta: Tensor

    @classmethod
    def of(
        cls, coords: Coordinates, prior: Distribution, z_score: ZScore, transform: Given
    ) -> "CoordinatesOfPrior":
        """What is stored of `coords`."""
        with seeded(0):
            z = torch.randn(_PROBES, coords.dim_z, dtype=torch.float64).to(coords.low.device)
        return cls(prior, transform, z_score, weights_of(coords), z, coords.to_theta(z)[0].detach())


def _of_prior(**fields: Any) -> Coordinates:
    stored = CoordinatesOfPrior(**fields)
    transform: Transform | None = stored.theta_transform
    try:
        coords = coordinates(as_prior(stored.prior), z_score=stored.z_score, theta_transform=transform)
        theta = with_weights(coords, stored.weights).to_theta(stored.z)[0]
        tolerance = _TOLERANCE * float(stored.theta.std())
        if not torch.allclose(theta, stored.theta, rtol=_TOLERANCE, atol=tolerance):
            raise ValueError("they lead to other coordinates of theta")
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        expected = "those that the posterior was saved with"
        raise WrongGiven(violation("prior` and `theta_transform", expected, f"others ({error})")) from error
    return coords


def _uniform(low: Tensor, width: Tensor) -> UniformBlock:
    block = UniformBlock(low, low + width)
    block.width = width
    return block


def _gamma(concentration: Tensor, rate: Tensor, inverse: bool, dtype: torch.dtype) -> GammaBlock:
    return GammaBlock(concentration.to(dtype), rate, inverse)


def _bijection(
    link: Transform, dim_theta: int, dim_z: int, loc: Tensor, scale_tril: Tensor
) -> BijectionBlock:
    block = BijectionBlock(link, dim_theta, dim_z)
    block.standardise(loc, scale_tril)
    return block


def _coordinates(
    blocks: list[Any], support: Any, dtype: torch.dtype, low: Tensor, high: Tensor
) -> Coordinates:
    coords = Coordinates(blocks, support, dtype)
    coords.low, coords.high = low, high
    return coords


def _kind(cls: type, build: Any, *names: str) -> Kind:
    return Kind(cls.__name__, cls, lambda value: {name: getattr(value, name) for name in names}, build)


COORDINATES = (
    _kind(AffineBlock, AffineBlock, "loc", "scale_tril", "exp"),
    _kind(UniformBlock, _uniform, "low", "width"),
    _kind(CdfBlock, CdfBlock, "dist"),
    _kind(GammaBlock, _gamma, "concentration", "rate", "inverse", "dtype"),
    _kind(BijectionBlock, _bijection, "link", "dim_theta", "dim_z", "loc", "scale_tril"),
    Kind(
        "Coordinates",
        Coordinates,
        lambda c: {
            "blocks": list(c.blocks),
            "support": c.support,
            "dtype": c.dtype,
            "low": c.low,
            "high": c.high,
        },
        _coordinates,
    ),
    _kind(CoordinatesTransform, CoordinatesTransform, "coords"),
    _kind(CoordinatesOfPrior, _of_prior, "prior", "theta_transform", "z_score", "weights", "z", "theta"),
)
"""Kinds of coordinates and of what they are made of."""
