"""Families to test: every name, on every kind of prior, with weights that are nowhere near their start."""

import torch
from torch.distributions import (
    Dirichlet,
    Distribution,
    Gamma,
    HalfCauchy,
    Independent,
    MultivariateNormal,
    Normal,
)

from visbi.families import LinkedFamily, named_family
from visbi.families.flows import GaussianizationBody
from visbi.priors import BoxUniform, MultipleIndependent, coordinates

DIMS = (1, 2, 3, 5, 20)
AUTOREGRESSIVE = ("maf", "nsf", "naf", "unaf", "sospf", "iaf")


def box_prior(dim: int, dtype: torch.dtype = torch.float64) -> Distribution:
    return BoxUniform(-torch.ones(dim, dtype=dtype), torch.arange(1.0, dim + 1, dtype=dtype))


def real_prior(dim: int, dtype: torch.dtype = torch.float64) -> Distribution:
    cov = 0.5 * torch.eye(dim, dtype=dtype) + 0.5
    return MultivariateNormal(torch.arange(dim, dtype=dtype), cov)


def positive_prior(dim: int, dtype: torch.dtype = torch.float64) -> Distribution:
    return Independent(Gamma(torch.full((dim,), 2.0, dtype=dtype), torch.ones(dim, dtype=dtype)), 1)


def mixed_prior(dtype: torch.dtype = torch.float64) -> Distribution:
    one = torch.ones(1, dtype=dtype)
    return MultipleIndependent([BoxUniform(0 * one, 3 * one), HalfCauchy(one), Normal(5 * one, 2 * one)])


def simplex_prior(dim: int = 3, dtype: torch.dtype = torch.float64) -> Distribution:
    return Dirichlet(torch.arange(2.0, dim + 2, dtype=dtype))


PRIORS = {"box": box_prior, "real": real_prior, "positive": positive_prior}


def roughened(family: LinkedFamily, amount: float | None = None) -> LinkedFamily:
    """Noise on every weight, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, p in family.body.named_parameters():
        # a Gaussian's parameters stand for ten times their value, and one matrix sums over all entries, as
        # does that which leads straight through a coupling layer; those of Gaussianization stand for four
        # times theirs
        usual = 0.05 / family.body.dim**0.5 if "raw_" in name else 0.15
        usual = 0.15 / family.body.dim**0.5 if name.endswith("direct") else usual
        # of many components one gets three times the noise: its draws shall not reach where box edges round
        usual = 0.5 * usual if "raw_" in name and p.ndim > 1 else usual
        if isinstance(family.body, GaussianizationBody) and ".phi." in name:
            usual /= 4
        scale = usual if amount is None else amount
        with torch.no_grad():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return family


def rough_family(name: str, prior: Distribution, *, num_transforms: int = 2) -> LinkedFamily:
    """A small family in float64."""
    family = named_family(name, coordinates(prior), num_transforms=num_transforms, hidden_features=8)
    return roughened(family.double())


def gradients(values: torch.Tensor, family: LinkedFamily) -> list[torch.Tensor]:
    """d values / d parameter for each of the family's; zero where there is none."""
    parameters = family.trainable()
    found = torch.autograd.grad(values, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
