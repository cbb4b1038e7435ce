"""Mixtures of Gaussians to test with."""

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from visbi.families.gaussians import Mixture
from visbi.fitting.target import Target
from visbi.priors import coordinates


def covariances(fits: int, k: int, dim: int) -> Tensor:
    root = torch.randn(fits, k, dim, dim, dtype=torch.float64)
    return root @ root.mT / dim + 0.3 * torch.eye(dim, dtype=torch.float64)


def some(fits: int = 1, k: int = 3, dim: int = 2, spread: float = 2.0) -> Mixture:
    """Nothing special about it."""
    loc = spread * torch.randn(fits, k, dim, dtype=torch.float64)
    return Mixture.of(torch.randn(fits, k, dtype=torch.float64), loc, covariances(fits, k, dim))


def known(weights: list[float], centres: list[list[float]], sd: float = 0.5) -> Mixture:
    loc = torch.tensor(centres, dtype=torch.float64)[None]
    cov = sd**2 * torch.eye(loc.shape[-1], dtype=torch.float64).expand(1, loc.shape[1], -1, -1)
    return Mixture.of(torch.tensor(weights, dtype=torch.float64)[None].log(), loc, cov)


def of_mixture(q: Mixture, shift: float = 0.0) -> Target:
    """q times exp(shift), in coordinates that are the prior's own."""
    standard = Independent(Normal(torch.zeros(q.loc.shape[-1]).double(), 1.0), 1)
    return Target(lambda theta: q.log_prob(theta[None])[0] + shift, coordinates(standard))


CENTRES = [[-1.5, -1.5], [-1.2, 1.5], [1.5, 1.2], [0.8, -1.7]]
FOUR = known([0.4, 0.3, 0.2, 0.1], CENTRES, 0.15)


def reference(q: Mixture, fit: int) -> MixtureSameFamily:
    components = MultivariateNormal(q.loc[fit], q.cov[fit])
    return MixtureSameFamily(Categorical(logits=q.log_weights[fit]), components)


def even(z: Tensor) -> Tensor:
    return torch.full(z.shape[:2], 1.0 / z.shape[1], dtype=torch.float64)
