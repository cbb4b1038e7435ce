"""Priors to test: every kind of support, with and without a closed form."""

import math
from dataclasses import dataclass

import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Pareto,
    SigmoidTransform,
    StudentT,
    TransformedDistribution,
    VonMises,
    Weibull,
)

from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal

__all__ = ["PRIORS", "Z_SCORES", "PriorCase"]

Z_SCORES = ("none", "independent", "structured")


@dataclass(frozen=True)
class PriorCase:
    """A prior, and for which `z_score` its z is exactly standard normal."""

    prior: Distribution
    exact: tuple[str, ...] = ()


def _joint(factor: Distribution) -> Independent:
    return Independent(factor, 1)


ANY_SCALE = ("independent", "structured")
LOW, HIGH = torch.tensor([-1.0, 0.0, 100.0]), torch.tensor([1.0, 1e-3, 101.0])
ONES, SHAPES = torch.ones(2), torch.tensor([0.7, 3.0])
TRIL = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 0.5, 0.0], [0.3, 0.2, 4.0]])
MEANS = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
HALF_OPEN = (torch.tensor([0.0, 0.0, -math.inf]), torch.tensor([math.inf, math.inf, 2.0]))

PRIORS = {
    "normal": PriorCase(_joint(Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))), ANY_SCALE),
    "normal float64": PriorCase(
        _joint(Normal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))), Z_SCORES
    ),
    "multivariate normal": PriorCase(
        MultivariateNormal(torch.tensor([1.0, -2.0, 3.0]), scale_tril=TRIL), ("structured",)
    ),
    "log-normal": PriorCase(_joint(LogNormal(torch.tensor([0.0, 2.0]), SHAPES)), ANY_SCALE),
    "gamma": PriorCase(_joint(Gamma(torch.tensor([0.5, 4.0]), ONES)), ANY_SCALE),
    "inverse gamma": PriorCase(_joint(InverseGamma(torch.tensor([0.5, 4.0]), ONES)), ANY_SCALE),
    "von Mises": PriorCase(_joint(VonMises(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 2.0])))),
    "entrywise mixture": PriorCase(
        _joint(MixtureSameFamily(Categorical(torch.ones(2, 2)), Normal(MEANS, torch.ones(2, 2))))
    ),
    "exponential": PriorCase(_joint(Exponential(SHAPES)), ANY_SCALE),
    "half-cauchy": PriorCase(_joint(HalfCauchy(torch.tensor([1.0, 20.0]))), ANY_SCALE),
    "half-normal": PriorCase(_joint(HalfNormal(SHAPES)), ANY_SCALE),
    "weibull": PriorCase(_joint(Weibull(ONES, SHAPES)), ANY_SCALE),
    "pareto": PriorCase(_joint(Pareto(ONES, SHAPES)), ANY_SCALE),
    "cauchy": PriorCase(_joint(Cauchy(ONES, SHAPES)), ANY_SCALE),
    "laplace": PriorCase(_joint(Laplace(ONES, SHAPES)), ANY_SCALE),
    "gumbel": PriorCase(_joint(Gumbel(ONES, SHAPES)), ANY_SCALE),
    "student t": PriorCase(_joint(StudentT(3 * ONES))),
    "box": PriorCase(BoxUniform(LOW, HIGH), ANY_SCALE),
    "box of one": PriorCase(BoxUniform(torch.zeros(1), torch.ones(1)), ANY_SCALE),
    "box float64": PriorCase(BoxUniform(LOW.double(), HIGH.double()), ANY_SCALE),
    "beta": PriorCase(_joint(Beta(torch.tensor([0.5, 4.0]), SHAPES))),
    "sigmoid of a normal": PriorCase(
        TransformedDistribution(_joint(Normal(0 * ONES, ONES)), [SigmoidTransform()])
    ),
    "dirichlet": PriorCase(Dirichlet(torch.tensor([0.5, 1.0, 3.0]))),
    "dirichlet in the corners": PriorCase(Dirichlet(torch.full((5,), 0.1))),
    "truncated normal": PriorCase(_joint(TruncatedNormal(torch.ones(3), 0.5, *HALF_OPEN)), ANY_SCALE),
    "truncated normal far out": PriorCase(
        _joint(
            TruncatedNormal(torch.zeros(2), 1.0, torch.tensor([45.0, -50.0]), torch.tensor([50.0, -45.0]))
        ),
        ANY_SCALE,
    ),
    "mixture": PriorCase(
        MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), _joint(Normal(MEANS, torch.ones(2, 2))))
    ),
    "positive mixture": PriorCase(
        MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), _joint(LogNormal(MEANS, torch.ones(2, 2))))
    ),
    "mixed": PriorCase(
        MultipleIndependent(
            [
                Normal(torch.zeros(1), 2 * torch.ones(1)),
                HalfCauchy(torch.ones(2)),
                BoxUniform(torch.zeros(1), torch.ones(1)),
                MultivariateNormal(torch.tensor([1.0, -2.0, 3.0]), scale_tril=TRIL),
            ]
        ),
        ("structured",),
    ),
    "mixed with a simplex": PriorCase(
        MultipleIndependent(
            [Gamma(ONES, ONES), Dirichlet(torch.ones(3)), Normal(torch.zeros(1), torch.ones(1))]
        )
    ),
}
