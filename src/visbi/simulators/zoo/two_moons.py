"""Two moons: a crescent of noise, and an absolute value that makes two of it.

    p = (r cos a + 0.25, r sin a),   a ~ U(-pi/2, pi/2),   r ~ N(0.1, 0.01)
    x = p + (-|theta_1 + theta_2|, -theta_1 + theta_2) / sqrt(2),   theta ~ U([-1, 1]^2)

Since z = x - p's shift has the polar coordinates (r, a) with a signed radius rho = sign(z_1) |z|, the
likelihood is N(rho; 0.1, 0.01) / (pi |rho|), exactly and for every z. The map from p to theta is a
rotation with two signs, so the posterior can be drawn directly, and p(x) = 1/2 where it fits into the box.

Source: D. Greenberg, M. Nonnenmacher and J. Macke, ICML 2019, in the form of J.-M. Lueckmann et al.,
"Benchmarking simulation-based inference", AISTATS 2021.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal

from visbi.core.checks import violation
from visbi.core.types import Shape
from visbi.priors import BoxUniform
from visbi.simulators.zoo.task import Task, check_theta, paired

__all__ = ["TwoMoonsPosterior", "log_likelihood", "simulator", "task"]

_RADIUS, _SPREAD, _CENTRE = 0.1, 0.01, 0.25
_HALF_ROOT = math.sqrt(0.5)
_TINY = 1e-12  # radius below which the density counts as constant


def task() -> Task:
    """Two moons, observed at x = (0, 0).

    >>> moons = task()
    >>> moons.posterior(moons.x_o).sample((5,)).shape
    torch.Size([5, 2])
    """
    return Task(
        name="two moons",
        theta_names=("theta_1", "theta_2"),
        prior=BoxUniform(-torch.ones(2), torch.ones(2)),
        simulator=simulator,
        x_o=torch.zeros(2),
        log_likelihood=log_likelihood,
        posterior=TwoMoonsPosterior,
        log_evidence=_log_evidence,
    )


@torch.no_grad()
def simulator(theta: Tensor) -> Tensor:
    """theta (N, 2) -> x (N, 2)."""
    check_theta(theta, 2)
    return _noise(theta) + _shift(theta)


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """log p(x | theta), (N,), for theta (N, 2) and x (2,) or (N, 2)."""
    theta, x = paired(theta, x, 2, 2)
    z = x - _shift(theta)
    z_1, z_2 = z[:, 0] - _CENTRE, z[:, 1]
    radius = (z_1**2 + z_2**2).clamp(min=_TINY**2).sqrt()
    signed = torch.where(z_1 < 0, -radius, radius)
    return Normal(_RADIUS, _SPREAD).log_prob(signed) - (math.pi * radius).log()


@dataclass(frozen=True, eq=False)
class TwoMoonsPosterior:
    """The exact posterior given one x.

    Attributes:
        x: the observation, (2,), such that both crescents lie within the prior's box.

    Raises:
        ValueError: they do not, and the posterior is not the simple one.
    """

    x: Tensor

    def __post_init__(self) -> None:
        # the crescents with ten standard deviations to spare, in coordinates rotated by 45 degrees
        low_1, high_1 = _CENTRE - self.x[0], _CENTRE + _RADIUS + 10 * _SPREAD - self.x[0]
        high_2 = self.x[1].abs() + _RADIUS + 10 * _SPREAD
        if low_1 < 0 or high_1 + high_2 > math.sqrt(2):
            raise ValueError(
                violation("x", "a point whose posterior lies within the box, near (0, 0)", self.x.tolist())
            )

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of theta, (*sample_shape, 2)."""
        p = _noise(self.x.expand(*sample_shape, 2))
        side = torch.where(torch.rand_like(p[..., 0]) < 0.5, -1.0, 1.0)
        total, difference = side * (p[..., 0] - self.x[0]), self.x[1] - p[..., 1]
        return torch.stack([total - difference, total + difference], -1) * _HALF_ROOT

    def log_prob(self, theta: Tensor) -> Tensor:
        """Normalised log-density of theta (N, 2), (N,)."""
        inside = (theta.abs() <= 1).all(-1)
        # prior 1/4 over evidence 1/2
        return torch.where(inside, log_likelihood(theta, self.x) - math.log(2), -math.inf)


def _log_evidence(x: Tensor) -> Tensor:
    return TwoMoonsPosterior(x).x.new_tensor(0.5).log()


def _noise(like: Tensor) -> Tensor:
    """p, (..., 2)."""
    angle = math.pi * (torch.rand_like(like[..., 0]) - 0.5)
    radius = _RADIUS + _SPREAD * torch.randn_like(angle)
    return torch.stack([radius * angle.cos() + _CENTRE, radius * angle.sin()], -1)


def _shift(theta: Tensor) -> Tensor:
    total, difference = theta[..., 0] + theta[..., 1], theta[..., 1] - theta[..., 0]
    return torch.stack([-total.abs(), difference], -1) * _HALF_ROOT
