"""What targets are made of: the record `Target`, and densities that come with exact draws.

Every density is written once for the potential, in theta's own dtype, and every sampler by construction
(mixtures, conditionals, quadrature in one dimension, rejection), never by a Markov chain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Chi2, Distribution, Independent, Normal, Uniform

from visbi.core.random import seeded

__all__ = [
    "Gaussian",
    "Group",
    "Modes",
    "OneFactor",
    "Student",
    "Target",
    "box",
    "constants_of",
    "inside",
    "mixture_draws",
    "mixture_log_prob",
    "modes_by_centre",
    "rotated_covariance",
    "wide_normal",
]

Group = Literal["tuning", "held out", "hard"]
_MASS_DRAWS = 400_000  # behind mode masses that have no closed form: standard error below .001


@dataclass(frozen=True, eq=False)
class Modes:
    """Parts of a target whose masses are scored.

    Attributes:
        assign: theta (N, D) -> index of its part (N,).
        weights: exact masses of the parts, (M,).
    """

    assign: Callable[[Tensor], Tensor]
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """An unnormalised density whose draws, and mostly whose evidence, are known.

    Attributes:
        name: short, for tables and files.
        dim: D.
        prior: torch distribution with event_shape (D,): the support, and the scale before the data.
        potential: (theta (N, D), x) -> (N,), differentiable where the target is; x is ignored. It contains
            the prior, if the target has one, and is -inf outside the prior's support.
        draw: n -> exact draws (n, D), float64, from torch's global generator.
        log_evidence: log of the integral of exp(potential) over the support; None where unknown.
        group: "tuning" (looked at while the method was made), "held out" (not) or "hard" (made to break it).
        modes: parts with known masses, or None.
        constants: numbers that the density needs and that `targets_jax` cannot make itself.
    """

    name: str
    dim: int
    prior: Distribution
    potential: Callable[..., Tensor]
    draw: Callable[[int], Tensor]
    log_evidence: float | None
    group: Group
    modes: Modes | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)

    def sample(self, n: int, seed: int) -> Tensor:
        """Exact draws (n, D), float64, the same for the same seed."""
        with seeded(seed):
            return self.draw(n)


def box(low: Tensor, high: Tensor) -> Independent:
    """The uniform prior on a box, corners (D,)."""
    return Independent(Uniform(low.float(), high.float()), 1)


def wide_normal(scale: float | Tensor, dim: int) -> Independent:
    """Independent N(0, scale^2) in D dimensions: coordinates for a density that has no prior."""
    return Independent(Normal(torch.zeros(dim), torch.ones(dim) * scale), 1)


def inside(potential: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Callable[..., Tensor]:
    """The potential within a box and -inf outside."""

    def bounded(theta: Tensor, x: Tensor | None = None) -> Tensor:
        within = ((theta >= low.to(theta)) & (theta <= high.to(theta))).all(-1)
        return torch.where(within, potential(theta), -math.inf)

    return bounded


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance), (D,) and (D, D)."""

    mean: Tensor
    covariance: Tensor
    factor: Tensor = field(init=False)
    inverse: Tensor = field(init=False)

    def __post_init__(self) -> None:
        factor = torch.linalg.cholesky(self.covariance.double())
        eye = torch.eye(len(factor), dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, "inverse", inverse)

    def standardised(self, theta: Tensor) -> Tensor:
        """theta (N, D) in coordinates where this is N(0, I)."""
        return (theta - self.mean.to(theta)) @ self.inverse.to(theta).T

    def log_prob(self, theta: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        dim = len(self.mean)
        constant = -0.5 * dim * math.log(2 * math.pi) - float(self.factor.diagonal().log().sum())
        return constant - 0.5 * self.standardised(theta).square().sum(-1)

    def draw(self, n: int) -> Tensor:
        """(n, D)."""
        return self.mean.double() + torch.randn(n, len(self.mean), dtype=torch.float64) @ self.factor.T


@dataclass(frozen=True, eq=False)
class Student:
    """The multivariate t: centre (D,), scale^2 I, degrees of freedom."""

    centre: Tensor
    scale: float
    df: float

    def log_prob(self, theta: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        dim, df = len(self.centre), self.df
        constant = math.lgamma((df + dim) / 2) - math.lgamma(df / 2)
        constant -= 0.5 * dim * math.log(df * math.pi) + dim * math.log(self.scale)
        square = ((theta - self.centre.to(theta)) / self.scale).square().sum(-1)
        return constant - 0.5 * (df + dim) * torch.log1p(square / df)

    def draw(self, n: int) -> Tensor:
        """(n, D): a normal over the root of an independent chi-squared."""
        normal = torch.randn(n, len(self.centre), dtype=torch.float64)
        chi = Chi2(torch.tensor(self.df, dtype=torch.float64)).sample((n, 1))
        return self.centre.double() + self.scale * normal * (self.df / chi).sqrt()


@dataclass(frozen=True, eq=False)
class OneFactor:
    """A Gaussian with theta_i = mean_i + sd_i (sqrt(rho) u + sqrt(1 - rho) e_i), cut off at the box [0, 1]^D.

    Given u the coordinates are independent truncated normals. u itself has the density
    phi(u) prod_i P(0 < theta_i < 1 | u), in one dimension, tabulated on 40,001 points.
    """

    mean: Tensor
    sd: Tensor
    rho: float

    def covariance(self) -> Tensor:
        """Of the Gaussian before it is cut off, (D, D)."""
        dim = len(self.mean)
        correlation = self.rho + (1 - self.rho) * torch.eye(dim, dtype=torch.float64)
        return self.sd[:, None] * correlation * self.sd

    def _edges(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P(e_i below the box), P(e_i below its upper edge), (K, D) each, given u (K,)."""
        loc = self.mean + self.sd * math.sqrt(self.rho) * u[:, None]
        scale = self.sd * math.sqrt(1 - self.rho)
        return torch.special.ndtr(-loc / scale), torch.special.ndtr((1 - loc) / scale)

    def _table(self) -> tuple[Tensor, Tensor]:
        u = torch.linspace(-9, 9, 40_001, dtype=torch.float64)
        low, high = self._edges(u)
        return u, (-0.5 * u.square() + (high - low).clamp_min(1e-300).log().sum(-1)).exp()

    def log_mass(self) -> float:
        """Log of the Gaussian's mass within the box."""
        u, density = self._table()
        return math.log(float(torch.trapezoid(density, u)) / math.sqrt(2 * math.pi))

    def draw(self, n: int) -> Tensor:
        """(n, D)."""
        u, density = self._table()
        steps = torch.cumulative_trapezoid(density, u)
        cumulative = torch.cat([steps.new_zeros(1), steps])
        level = torch.rand(n, dtype=torch.float64) * cumulative[-1]
        right = torch.searchsorted(cumulative, level).clamp(1, len(u) - 1)
        share = (level - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
        factor = u[right - 1] + share * (u[right] - u[right - 1])
        low, high = self._edges(factor)
        e = torch.special.ndtri(low + torch.rand_like(low) * (high - low))
        theta = self.mean + self.sd * (math.sqrt(self.rho) * factor[:, None] + math.sqrt(1 - self.rho) * e)
        return theta.clamp(0.0, 1.0)


def rotated_covariance(eigenvalues: Tensor, seed: int) -> Tensor:
    """A covariance with these eigenvalues (D,) along directions fixed by the seed."""
    with seeded(seed):
        basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return basis * eigenvalues.double() @ basis.T


def mixture_log_prob(theta: Tensor, parts: list[Gaussian] | list[Student], weights: Tensor) -> Tensor:
    """Log-density of a mixture at theta (N, D), (N,)."""
    each = torch.stack([part.log_prob(theta) for part in parts], -1)
    return torch.logsumexp(each + weights.log().to(theta), -1)


def mixture_draws(n: int, parts: list[Gaussian] | list[Student], weights: Tensor) -> Tensor:
    """Draws of a mixture, (n, D)."""
    which = torch.multinomial(weights.double(), n, replacement=True)
    draws = torch.stack([part.draw(n) for part in parts])
    return draws[which, torch.arange(n)]


def constants_of(parts: list[Gaussian], weights: Tensor) -> dict[str, Tensor]:
    """A mixture of Gaussians as arrays: weights (M,), means (M, D), inverse Cholesky factors (M, D, D)."""
    return {
        "weights": weights,
        "means": torch.stack([part.mean for part in parts]),
        "inverses": torch.stack([part.inverse for part in parts]),
    }


def modes_by_centre(centres: Tensor, draw: Callable[[int], Tensor]) -> Modes:
    """Parts by the nearest of the centres (M, D); their masses counted over many exact draws."""

    def assign(theta: Tensor) -> Tensor:
        return torch.cdist(theta.double(), centres.double()).argmin(-1)

    with seeded(0):
        counts = torch.zeros(len(centres), dtype=torch.float64)
        for _ in range(20):
            counts += torch.bincount(assign(draw(_MASS_DRAWS // 20)), minlength=len(centres))
    return Modes(assign, counts / counts.sum())
