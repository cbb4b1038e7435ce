"""Targets that were looked at while the automatic fit was made."""

import math
from functools import partial

import torch
from torch import Tensor

from target_parts import (
    Gaussian,
    Group,
    Modes,
    OneFactor,
    Student,
    Target,
    box,
    constants_of,
    inside,
    mixture_draws,
    mixture_log_prob,
    modes_by_centre,
    rotated_covariance,
    wide_normal,
)
from visbi.core.random import seeded
from visbi.simulators.zoo import slcp as slcp_task
from visbi.simulators.zoo import two_moons as moons_task

__all__ = [
    "banana",
    "edge",
    "funnel",
    "gaussian",
    "mixture40",
    "mixture4",
    "slcp",
    "student_pair",
    "two_moons",
]

# by Gauss-Legendre quadrature over the three shape parameters and one coordinate of the mean, 160 x 120 x 160
# x 48 points; 100 x 80 x 100 x 32 points give -14.62907
SLCP_LOG_EVIDENCE = -14.62909


def two_moons() -> Target:
    """Two moons of the SBI benchmark at x_o = (0, 0): two crescents of equal mass."""
    task = moons_task.task()
    posterior = moons_task.TwoMoonsPosterior(torch.zeros(2, dtype=torch.float64))

    def log_joint(theta: Tensor) -> Tensor:
        return moons_task.log_likelihood(theta, torch.zeros(2).to(theta)) - math.log(4)

    return Target(
        name="two_moons",
        dim=2,
        prior=task.prior,
        potential=inside(log_joint, -torch.ones(2), torch.ones(2)),
        draw=lambda n: posterior.sample((n,)),
        log_evidence=math.log(0.5),
        group="tuning",
        modes=Modes(lambda theta: (theta.sum(-1) > 0).long(), torch.tensor([0.5, 0.5])),
    )


def mixture4(dim: int) -> Target:
    """Four Gaussians of masses .4, .3, .2, .1, each with its own shape, far apart."""
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    centres = 3 * signs.repeat(1, dim // 2)
    spread = torch.logspace(math.log10(0.15), math.log10(0.5), dim, dtype=torch.float64)
    parts = [Gaussian(c, rotated_covariance(spread.square(), 10 + i)) for i, c in enumerate(centres)]
    draw = partial(mixture_draws, parts=parts, weights=weights)
    return Target(
        name=f"mixture4_d{dim}",
        dim=dim,
        prior=wide_normal(4.0, dim),
        potential=lambda theta, x=None: mixture_log_prob(theta, parts, weights),
        draw=draw,
        log_evidence=0.0,
        group="tuning",
        modes=modes_by_centre(centres, draw),
        constants=constants_of(parts, weights),
    )


def mixture40() -> Target:
    """Forty unit Gaussians of equal mass in [-40, 40]^2, at least six standard deviations from the edge."""
    with seeded(40):
        centres = 68 * torch.rand(40, 2, dtype=torch.float64) - 34
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    parts = [Gaussian(centre, eye) for centre in centres]
    corner = torch.full((2,), 40.0)

    def log_prob(theta: Tensor) -> Tensor:
        square = (theta[:, None] - centres.to(theta)).square().sum(-1)
        return torch.logsumexp(-0.5 * square, -1) - math.log(2 * math.pi * 40)

    draw = partial(mixture_draws, parts=parts, weights=weights)
    return Target(
        name="mixture40",
        dim=2,
        prior=box(-corner, corner),
        potential=inside(log_prob, -corner, corner),
        draw=draw,
        log_evidence=0.0,
        group="tuning",
        modes=modes_by_centre(centres, draw),
        constants=constants_of(parts, weights),
    )


def _slcp_marginal(shape: Tensor, scatter: Tensor) -> Tensor:
    """Log of the likelihood with the mean integrated over the plane, up to a constant; shape (N, 3).

    With n points of mean m and scatter matrix A about it, and covariance S of each,
    integral prod_i N(y_i; mu, S) dmu  ~  |S|^(-(n - 1) / 2) exp(-tr(S^-1 A) / 2).
    """
    s_1, s_2, rho = shape[:, 0] ** 2, shape[:, 1] ** 2, shape[:, 2].tanh()
    rest = 1 - rho**2
    a, b, c = scatter[0, 0] / s_1**2, scatter[0, 1] / (s_1 * s_2), scatter[1, 1] / s_2**2
    log_det = 2 * (s_1.log() + s_2.log()) + rest.log()
    return -1.5 * log_det - 0.5 * (a - 2 * rho * b + c) / rest


def slcp_proposals(n: int, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Proposals from the prior of (theta_3, theta_4, theta_5), and which become draws: theta (n, 5), (n,).

    `x` (8,) is the observation; None is the zoo's.

    Given them the mean is N(m, S / 4), so a rejection of the three shape parameters, whose likelihood is
    largest at S = A / 3, and a rejection of means outside the box make an exact draw.
    """
    points = (slcp_task.task().x_o if x is None else x).double().view(4, 2)
    mean = points.mean(0)
    scatter = (points - mean).T @ (points - mean)
    best = scatter / 3
    ceiling = -1.5 * float(torch.logdet(best)) - 3.0
    shape = 6 * torch.rand(n, 3, dtype=torch.float64) - 3
    accepted = torch.rand(n, dtype=torch.float64).log() < _slcp_marginal(shape, scatter) - ceiling
    s_1, s_2, rho = shape[:, 0] ** 2, shape[:, 1] ** 2, shape[:, 2].tanh()
    e = torch.randn(n, 2, dtype=torch.float64) / 2
    first = mean[0] + s_1 * e[:, 0]
    second = mean[1] + s_2 * (rho * e[:, 0] + (1 - rho**2).sqrt() * e[:, 1])
    accepted &= (first.abs() <= 3) & (second.abs() <= 3)
    return torch.cat([first[:, None], second[:, None], shape], -1), accepted


def _slcp_draw(n: int) -> Tensor:
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        theta, accepted = slcp_proposals(1_000_000)
        found.append(theta[accepted])
    return torch.cat(found)[:n]


def slcp() -> Target:
    """SLCP, the exact likelihood: four modes by the signs of theta_3 and theta_4, cut off by the box."""
    task = slcp_task.task()
    corner = torch.full((5,), 3.0)

    def log_joint(theta: Tensor) -> Tensor:
        return slcp_task.log_likelihood(theta, task.x_o.to(theta)) - 5 * math.log(6)

    return Target(
        name="slcp",
        dim=5,
        prior=task.prior,
        potential=inside(log_joint, -corner, corner),
        draw=_slcp_draw,
        log_evidence=SLCP_LOG_EVIDENCE,
        group="tuning",
        modes=Modes(
            lambda theta: (theta[:, 2] > 0).long() + 2 * (theta[:, 3] > 0).long(), torch.full((4,), 0.25)
        ),
        constants={"points": task.x_o.double().view(4, 2)},
    )


def banana(dim: int, group: Group) -> Target:
    """a ~ N(0, 9), b | a ~ N(-.1 (a^2 - 9), .3^2), the others standard normal."""

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        a, b, rest = theta[:, 0], theta[:, 1], theta[:, 2:]
        square = (a / 3).square() + ((b + 0.1 * (a.square() - 9)) / 0.3).square() + rest.square().sum(-1)
        return -0.5 * square - 0.5 * dim * math.log(2 * math.pi) - math.log(3 * 0.3)

    def draw(n: int) -> Tensor:
        z = torch.randn(n, dim, dtype=torch.float64)
        a = 3 * z[:, :1]
        return torch.cat([a, -0.1 * (a.square() - 9) + 0.3 * z[:, 1:2], z[:, 2:]], -1)

    return Target(f"banana_d{dim}", dim, wide_normal(5.0, dim), log_prob, draw, 0.0, group)


def funnel(dim: int, group: Group) -> Target:
    """v ~ N(0, 3^2), x_i | v ~ N(0, e^v) with the variance e^v."""

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        v, rest = theta[:, 0], theta[:, 1:]
        square = (v / 3).square() + rest.square().sum(-1) * (-v).exp() + (dim - 1) * v
        return -0.5 * square - 0.5 * dim * math.log(2 * math.pi) - math.log(3)

    def draw(n: int) -> Tensor:
        z = torch.randn(n, dim, dtype=torch.float64)
        v = 3 * z[:, :1]
        return torch.cat([v, (v / 2).exp() * z[:, 1:]], -1)

    return Target(f"funnel_d{dim}", dim, wide_normal(10.0, dim), log_prob, draw, 0.0, group)


def gaussian(dim: int, condition: float, group: Group) -> Target:
    """A Gaussian with eigenvalues from 1 / condition to 1 in directions of its own."""
    eigenvalues = torch.logspace(-math.log10(condition), 0, dim, dtype=torch.float64)
    body = Gaussian(torch.linspace(-1, 1, dim, dtype=torch.float64), rotated_covariance(eigenvalues, dim))
    return Target(
        f"gaussian_d{dim}",
        dim,
        wide_normal(3.0, dim),
        lambda theta, x=None: body.log_prob(theta),
        body.draw,
        0.0,
        group,
        constants=constants_of([body], torch.ones(1)),
    )


def student_pair() -> Target:
    """Two t clusters with 3 degrees of freedom in five dimensions, at 3 and -3, masses .7 and .3."""
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    centres = torch.tensor([[3.0], [-3.0]], dtype=torch.float64).expand(2, 5)
    parts = [Student(centre, 1.0, 3.0) for centre in centres]
    draw = partial(mixture_draws, parts=parts, weights=weights)
    return Target(
        name="student_pair_d5",
        dim=5,
        prior=wide_normal(10.0, 5),
        potential=lambda theta, x=None: mixture_log_prob(theta, parts, weights),
        draw=draw,
        log_evidence=0.0,
        group="tuning",
        modes=modes_by_centre(centres, draw),
    )


def edge() -> Target:
    """A correlated Gaussian on [0, 1]^10 that the edge cuts off in the first five dimensions."""
    mean = torch.tensor([-0.1] * 5 + [0.5] * 5, dtype=torch.float64)
    return cut_gaussian("edge_d10", OneFactor(mean, torch.full_like(mean, 0.1), 0.5), "tuning")


def cut_gaussian(name: str, body: OneFactor, group: Group) -> Target:
    """A one-factor Gaussian cut off at the unit box."""
    dim = len(body.mean)
    plain = Gaussian(body.mean, body.covariance())
    low, high = torch.zeros(dim), torch.ones(dim)
    return Target(
        name,
        dim,
        box(low, high),
        inside(plain.log_prob, low, high),
        body.draw,
        body.log_mass(),
        group,
        constants=constants_of([plain], torch.ones(1)),
    )
