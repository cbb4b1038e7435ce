r"""A potential kept to where its network has been trained.

A learned likelihood is an extrapolation wherever no theta was simulated, and a sampler will find the places
where the extrapolation is high. The fence is an ellipsoid around the training thetas, in the prior's
coordinates z:

    U_fenced(theta) = U(theta) - (s max(0, m(z) - r))^2 / 2

with m(z) the Mahalanobis distance from the training set, r the radius that holds a given share of it, s = 20.

Inside it nothing changes. A posterior that leans on the fence has not been simulated far enough.
"""

import copy

import torch
from torch import Tensor

from visbi.core.checks import in_interval, violation
from visbi.potentials.base import BasePotential
from visbi.priors.transforms import Coordinates

__all__ = ["Fence", "FencedPotential"]

_STEEPNESS = 20.0


class Fence:
    """An ellipsoid in coordinates that holds a share of a training set.

    Args:
        coords: coordinates of the prior.
        theta: (N, D), the training set.
        share: of it that lies inside, in (0, 1].

    Raises:
        ValueError: `share` out of range, or too few thetas to span an ellipsoid.

    >>> from visbi.priors import BoxUniform, coordinates
    >>> prior = BoxUniform(torch.zeros(2), torch.ones(2))
    >>> fence = Fence(coordinates(prior), prior.sample((1000,)), share=0.9)
    >>> round(float(fence.inside(prior.sample((1000,))).double().mean()), 1)
    0.9
    """

    def __init__(self, coords: Coordinates, theta: Tensor, *, share: float = 0.99) -> None:
        in_interval("share", share, 0.0, 1.0, closed="r")
        self.coords = coords
        z = coords.to_z(theta)[0]
        if len(z) <= z.shape[1]:
            raise ValueError(violation("theta", f"more than {z.shape[1]} rows", len(z)))
        cov = torch.cov(z.mT).reshape(z.shape[1], z.shape[1])
        ridge = 1e-9 * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
        self.loc, self.tril = z.mean(0), torch.linalg.cholesky(cov + ridge)
        self.radius = float(self.distance(theta).quantile(share))

    def distance(self, theta: Tensor) -> Tensor:
        """Mahalanobis distance from the training set, (N,)."""
        centred = (self.coords.to_z(theta)[0] - self.loc).mT
        return torch.linalg.solve_triangular(self.tril, centred, upper=False).norm(dim=0)

    def inside(self, theta: Tensor) -> Tensor:
        """Which of theta (N, D) lie inside, (N,) bool."""
        return self.distance(theta) <= self.radius

    def to(self, device: str | torch.device) -> "Fence":
        """Move it to `device`, with coordinates of its own; returns self."""
        self.coords = copy.deepcopy(self.coords).to(device)
        self.loc, self.tril = self.loc.to(device), self.tril.to(device)
        return self

    def penalty(self, theta: Tensor) -> Tensor:
        """What the fence takes off the potential, (N,): zero inside."""
        return 0.5 * (_STEEPNESS * (self.distance(theta) - self.radius).clamp_min(0.0)).square()


class FencedPotential(BasePotential):
    """A potential with a fence around it.

    Args:
        inner: the potential.
        fence: where it can be trusted.
    """

    def __init__(self, inner: BasePotential, fence: Fence) -> None:
        super().__init__(inner.prior, inner.return_x_o(), inner.device, inner.x_is_iid)
        self.inner, self.fence = inner, fence

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        values = self.inner.evaluate(theta, self._x_o if x is None else x, x_is_iid)
        return values - self.fence.penalty(theta).to(values.dtype)

    def to(self, device: str | torch.device) -> "FencedPotential":
        self.inner.to(device)
        self.fence.to(device)
        super().to(device)
        return self
