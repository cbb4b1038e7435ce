"""Targets on which nobody tunes: what other posteriors look like, and what is known to break such fits."""

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
    wide_normal,
)
from targets_tuning import cut_gaussian

__all__ = [
    "corner",
    "needle",
    "rough",
    "schools",
    "shell",
    "steps",
    "student",
    "wide_gaussian",
    "wide_lognormal",
]


def student() -> Target:
    """The multivariate t with 2 degrees of freedom in ten dimensions: no variance."""
    body = Student(torch.ones(10, dtype=torch.float64), 1.0, 2.0)
    return Target(
        "student_d10",
        10,
        wide_normal(5.0, 10),
        lambda theta, x=None: body.log_prob(theta),
        body.draw,
        0.0,
        "held out",
    )


def needle(dim: int) -> Target:
    """A needle (sd .01, mass .3) beside a haystack (sd 1, mass .7)."""
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    place = 3 / math.sqrt(dim) * torch.ones(dim, dtype=torch.float64)
    parts = [Gaussian(-place, eye), Gaussian(place, 1e-4 * eye)]
    # 60 of its standard deviations hold the needle; of the haystack they hold less than 1e-6
    radius = 0.6
    return Target(
        name=f"needle_d{dim}",
        dim=dim,
        prior=wide_normal(5.0, dim),
        potential=lambda theta, x=None: mixture_log_prob(theta, parts, weights),
        draw=partial(mixture_draws, parts=parts, weights=weights),
        log_evidence=0.0,
        group="held out",
        modes=Modes(lambda theta: ((theta - place.to(theta)).norm(dim=-1) < radius).long(), weights),
        constants=constants_of(parts, weights),
    )


def shell(dim: int, group: Group = "held out") -> Target:
    """All mass near a sphere: exp(-(|theta| - 2)^2 / (2 .1^2)) over the root of 2 pi .1^2."""
    radius, width = 2.0, 0.1

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        length = (theta.square().sum(-1) + 1e-12).sqrt()
        away = (length - radius) / width
        return -0.5 * away.square() - math.log(width) - 0.5 * math.log(2 * math.pi)

    def density(r: Tensor) -> Tensor:
        return r ** (dim - 1) * torch.exp(-0.5 * ((r - radius) / width).square())

    def draw(n: int) -> Tensor:
        highest = radius + 9 * width
        found: list[Tensor] = []
        while sum(map(len, found)) < n:  # N(2, .1^2) for the radius, thinned by r^(D - 1)
            r = radius + width * torch.randn(4 * n + 1000, dtype=torch.float64)
            found.append(r[torch.rand_like(r) < (r.clamp(0, highest) / highest) ** (dim - 1)])
        z = torch.randn(n, dim, dtype=torch.float64)
        return torch.cat(found)[:n, None] * z / z.norm(dim=-1, keepdim=True)

    r = torch.linspace(radius - 10 * width, radius + 10 * width, 20_001, dtype=torch.float64)
    radial = float(torch.trapezoid(density(r), r)) / (width * math.sqrt(2 * math.pi))
    surface = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)
    return Target(
        f"shell_d{dim}", dim, wide_normal(2.0, dim), log_prob, draw, surface + math.log(radial), group
    )


def rough() -> Target:
    """A Gaussian in four dimensions with a ripple of half a nat and wavelength .16: gradients up to 20."""
    dim, height, wave = 4, 0.5, 40.0
    body = Gaussian(torch.zeros(dim, dtype=torch.float64), 0.6 + 0.4 * torch.eye(dim, dtype=torch.float64))

    def ripple(theta: Tensor) -> Tensor:
        return height * (wave * theta).cos().sum(-1)

    def draw(n: int) -> Tensor:
        found: list[Tensor] = []
        while sum(map(len, found)) < n:
            theta = body.draw(8 * n + 1000)
            keep = torch.rand(len(theta), dtype=torch.float64).log() < ripple(theta) - height * dim
            found.append(theta[keep])
        return torch.cat(found)[:n]

    # E exp(h cos(k z)) = I_0(h) up to terms of size exp(-k^2 v / 2), v the smallest eigenvalue, .4
    evidence = dim * math.log(float(torch.special.i0(torch.tensor(height, dtype=torch.float64))))
    return Target(
        "rough_d4",
        dim,
        wide_normal(3.0, dim),
        lambda theta, x=None: body.log_prob(theta) + ripple(theta),
        draw,
        evidence,
        "held out",
        constants=constants_of([body], torch.ones(1)),
    )


def steps() -> Target:
    """A correlated Gaussian likelihood of theta rounded to a grid: no gradient anywhere, 12^3 cells."""
    dim, cells, side = 3, 12, 0.5
    low, high = torch.full((dim,), -3.0), torch.full((dim,), 3.0)
    covariance = 0.5 * (0.6 + 0.4 * torch.eye(dim, dtype=torch.float64))
    body = Gaussian(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64), covariance)

    def log_joint(theta: Tensor) -> Tensor:
        cell = ((theta + 3) / side).floor().clamp(0, cells - 1)
        return body.log_prob((cell + 0.5) * side - 3) - dim * math.log(6)

    corners = side * torch.arange(cells, dtype=torch.float64) - 3
    lows = torch.cartesian_prod(corners, corners, corners)
    mass = log_joint(lows + side / 2) + dim * math.log(side)

    def draw(n: int) -> Tensor:
        which = torch.multinomial(mass.softmax(0), n, replacement=True)
        return lows[which] + side * torch.rand(n, dim, dtype=torch.float64)

    return Target(
        "steps_d3",
        dim,
        box(low, high),
        inside(log_joint, low, high),
        draw,
        float(mass.logsumexp(0)),
        "held out",
        constants=constants_of([body], torch.ones(1)),
    )


def corner() -> Target:
    """A correlated Gaussian whose centre lies outside [0, 1]^6, beyond one corner."""
    mean = torch.tensor([-0.05, -0.1, -0.15, -0.2, -0.3, -0.4], dtype=torch.float64)
    return cut_gaussian("corner_d6", OneFactor(mean, torch.full_like(mean, 0.2), 0.3), "held out")


def wide_gaussian() -> Target:
    """A correlated Gaussian, scales from 1e-2 to 1e2, priors a thousand times wider."""
    scales = torch.logspace(-2, 2, 5, dtype=torch.float64)
    correlation = 0.7 + 0.3 * torch.eye(5, dtype=torch.float64)
    offsets = torch.tensor([400.0, -700.0, 100.0, 900.0, -300.0], dtype=torch.float64)
    body = Gaussian(offsets * scales, scales[:, None] * correlation * scales)
    return Target(
        "wide_gaussian_d5",
        5,
        wide_normal(1e3 * scales.float(), 5),
        lambda theta, x=None: body.log_prob(theta),
        body.draw,
        0.0,
        "held out",
        constants=constants_of([body], torch.ones(1)),
    )


def wide_lognormal() -> Target:
    """Correlated lognormals, scales from 1e-2 to 1e2, under uniform priors a thousand times wider."""
    scales = torch.logspace(-2, 2, 5, dtype=torch.float64)
    spread = 0.6
    covariance = spread**2 * (0.5 + 0.5 * torch.eye(5, dtype=torch.float64))
    body = Gaussian(torch.zeros(5, dtype=torch.float64), covariance)
    low, high = torch.zeros(5), 1e3 * scales.float()

    def log_prob(theta: Tensor) -> Tensor:
        log_theta = theta.clamp_min(torch.finfo(theta.dtype).tiny).log()
        z = log_theta - scales.log().to(theta)
        return body.log_prob(z) - log_theta.sum(-1)

    # the upper edge is 11 standard deviations away
    return Target(
        "wide_lognormal_d5",
        5,
        box(low, high),
        inside(log_prob, low, high),
        lambda n: scales * body.draw(n).exp(),
        0.0,
        "held out",
        constants=constants_of([body], torch.ones(1)),
    )


SCHOOLS_Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SCHOOLS_SD = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def _schools_table() -> tuple[Tensor, Tensor]:
    """Grid over log tau (K,) and the log of p(log tau, y) there; mu and all effects are integrated out.

    y_j | tau ~ N(mu, v_j) with v_j = sd_j^2 + tau^2 and mu ~ N(0, 5^2): y is Gaussian given tau.
    """
    log_tau = torch.linspace(-12, 9, 20_001, dtype=torch.float64)
    variance = SCHOOLS_SD.square() + log_tau.exp()[:, None].square()
    precision = 1 / variance
    total, weighted = precision.sum(-1) + 1 / 25, (precision * SCHOOLS_Y).sum(-1)
    square = (precision * SCHOOLS_Y.square()).sum(-1) - weighted.square() / total
    log_det = variance.log().sum(-1) + (25 * total).log()
    likelihood = -0.5 * (square + log_det + 8 * math.log(2 * math.pi))
    return log_tau, likelihood + _log_half_cauchy(log_tau)


def _log_half_cauchy(log_tau: Tensor) -> Tensor:
    """Density of log tau where tau is half-Cauchy with scale 5."""
    return math.log(2 / (5 * math.pi)) - torch.log1p((log_tau.exp() / 5).square()) + log_tau


def schools(*, centred: bool) -> Target:
    """Eight schools (Rubin 1981) over (mu, log tau, effects): mu ~ N(0, 5^2), tau ~ half-Cauchy(5).

    Centred: theta_j ~ N(mu, tau^2), a funnel. Otherwise: theta_j = mu + tau eta_j with eta_j ~ N(0, 1).
    """

    def log_joint(theta: Tensor, x: Tensor | None = None) -> Tensor:
        mu, log_tau, rest = theta[:, :1], theta[:, 1], theta[:, 2:]
        tau = log_tau.exp()[:, None]
        eta = (rest - mu) / tau if centred else rest
        effect = rest if centred else mu + tau * eta
        away = (SCHOOLS_Y.to(theta) - effect) / SCHOOLS_SD.to(theta)
        square = (mu[:, 0] / 5).square() + eta.square().sum(-1) + away.square().sum(-1)
        constant = math.log(5) + float(SCHOOLS_SD.log().sum()) + 8.5 * math.log(2 * math.pi)
        value = -0.5 * square - constant + _log_half_cauchy(log_tau)
        return value - 8 * log_tau if centred else value

    def draw(n: int) -> Tensor:
        log_taus, log_p = _schools_table()
        steps = torch.cumulative_trapezoid((log_p - log_p.max()).exp(), log_taus)
        cumulative = torch.cat([steps.new_zeros(1), steps])
        level = torch.rand(n, dtype=torch.float64) * cumulative[-1]
        right = torch.searchsorted(cumulative, level).clamp(1, len(log_taus) - 1)
        share = (level - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
        log_tau = log_taus[right - 1] + share * (log_taus[right] - log_taus[right - 1])
        tau = log_tau.exp()[:, None]
        precision = 1 / (SCHOOLS_SD.square() + tau.square())
        total = precision.sum(-1) + 1 / 25
        mu = (precision * SCHOOLS_Y).sum(-1) / total + torch.randn_like(total) / total.sqrt()
        # eta_j given mu and tau: precision 1 + tau^2 / sd^2
        own = 1 + tau.square() / SCHOOLS_SD.square()
        mean = tau * (SCHOOLS_Y - mu[:, None]) / SCHOOLS_SD.square() / own
        eta = mean + torch.randn_like(mean) / own.sqrt()
        rest = mu[:, None] + tau * eta if centred else eta
        return torch.cat([mu[:, None], log_tau[:, None], rest], -1)

    log_tau, log_p = _schools_table()
    evidence = float(log_p.max()) + math.log(float(torch.trapezoid((log_p - log_p.max()).exp(), log_tau)))
    prior_sd = torch.tensor([5.0, 3.0] + [20.0 if centred else 1.0] * 8)
    name = "schools_centred" if centred else "schools_noncentred"
    return Target(name, 10, wide_normal(prior_sd, 10), log_joint, draw, evidence, "held out")
