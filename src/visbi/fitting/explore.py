r"""Tempered sequential Monte Carlo: particles carried from the prior to the posterior.

Del Moral, Doucet, Jasra: Sequential Monte Carlo samplers. JRSS B 2006.

The path is p_beta(z) ~ N(z; 0, I) exp(beta L(z)), beta from 0 to 1. Each step is as long as leaves an
effective sample size of half the particles; then they are resampled (systematically) and moved by a few
rounds of Hamiltonian Monte Carlo whose mass is the inverse covariance of the particles, with a jittered step
size that follows the acceptance rate.

Its use is to find where the mass is, all modes of it. Every particle of every temperature is kept: together
they are a sample from a known mixture of tempered densities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.fitting.target import Target, log_standard_normal

__all__ = ["Exploration", "explore"]

_ESS = 0.5
_LEAPFROG = 5
_ACCEPTANCE = 0.8
_MIN_MOVES, _MAX_MOVES = 3, 12
_CORRELATION = 0.5  # moves go on until lag-one correlation falls below
_MAX_TEMPERATURES = 200


@dataclass(frozen=True)
class Exploration:
    """What the explorer saw.

    Attributes:
        z: (N, d) particles at beta = 1, equally weighted.
        relative: (N,) L at them.
        history_z, history_relative: (T, N, d) and (T, N), particles of every temperature.
        betas: (T,) the temperatures.
        log_evidence: the usual estimate of log Z; finds modes, is not to be trusted in high dimension.
        acceptance: mean acceptance of the moves at beta = 1.
    """

    z: Tensor
    relative: Tensor
    history_z: Tensor
    history_relative: Tensor
    betas: Tensor
    log_evidence: float
    acceptance: float

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of the final particles."""
        return self.z.mean(0), _covariance(self.z)


def explore(target: Target, n: int = 512) -> Exploration:
    """Carry `n` particles from the prior to the posterior.

    Args:
        target: ell in coordinates where the prior is near N(0, I).
        n: number of particles.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    >>> target = Target(prior.log_prob, coordinates(prior))  # the posterior is the prior
    >>> found = explore(target, 64)
    >>> found.betas.tolist(), round(found.log_evidence, 4) + 0.0
    ([0.0, 1.0], 0.0)
    """
    z = torch.randn(n, target.dim, dtype=torch.float64, device=target.device)
    ell, gradient = target.value_and_gradient(z)
    beta, log_z, step, acceptance = 0.0, 0.0, 0.5 / target.dim**0.25, 1.0
    betas, seen, values = [0.0], [z], [ell - log_standard_normal(z)]
    while beta < 1.0:
        relative = ell - log_standard_normal(z)
        new = _next_beta(relative, beta) if len(betas) < _MAX_TEMPERATURES else 1.0
        increments = (new - beta) * relative
        log_z += float(torch.logsumexp(increments, 0)) - math.log(n)
        index = _resample(increments)
        z, ell, gradient, beta = z[index], ell[index], gradient[index], new
        z, ell, gradient, step, acceptance = _move(target, z, ell, gradient, beta, step)
        betas.append(beta)
        seen.append(z)
        values.append(ell - log_standard_normal(z))
    return Exploration(
        z=z,
        relative=values[-1],
        history_z=torch.stack(seen),
        history_relative=torch.stack(values),
        betas=torch.tensor(betas, dtype=torch.float64),
        log_evidence=log_z,
        acceptance=acceptance,
    )


def _resample(log_w: Tensor) -> Tensor:
    """As many indices as weights, drawn in proportion to them, systematically (one uniform for all)."""
    edges = torch.softmax(log_w, 0).cumsum(0)
    steps = torch.arange(len(log_w), dtype=log_w.dtype, device=log_w.device)
    points = (torch.rand_like(log_w[:1]) + steps) / len(log_w)
    return torch.searchsorted(edges, points * edges[-1]).clamp_max(len(log_w) - 1)


def _next_beta(relative: Tensor, beta: float) -> float:
    """The temperature at which the weights are worth `_ESS` of the particles, by bisection; at most 1."""

    def share(new: float) -> float:
        w = (new - beta) * relative
        w = w - w.max()  # all of them may be huge and equal
        return float(torch.exp(2 * torch.logsumexp(w, 0) - torch.logsumexp(2 * w, 0))) / len(w)

    if share(1.0) >= _ESS:
        return 1.0
    low, high = beta, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= _ESS else (low, middle)
    return max(0.5 * (low + high), beta * (1 + 1e-9) + 1e-12)


def _move(
    target: Target, z: Tensor, ell: Tensor, gradient: Tensor, beta: float, step: float
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Rounds of HMC at one temperature, until the particles have forgotten where they were."""
    scale = _root(_covariance(z))
    start, rate = z, 1.0
    for done in range(1, _MAX_MOVES + 1):
        z, ell, gradient, rate = _hmc(target, z, ell, gradient, beta, step, scale)
        step = min(max(step * math.exp(rate - _ACCEPTANCE), 1e-4), 2.0)
        if done >= _MIN_MOVES and _correlation(start, z) < _CORRELATION:
            break
    return z, ell, gradient, step, rate


def _hmc(
    target: Target, z: Tensor, ell: Tensor, gradient: Tensor, beta: float, step: float, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """One round in coordinates y = scale^-1 z, where the particles have unit covariance."""
    size = step * torch.empty(len(z), 1, dtype=z.dtype, device=z.device).uniform_(0.6, 1.4)
    momentum = torch.randn_like(z)
    log_p = _tempered(ell, z, beta)
    energy = log_p - 0.5 * momentum.square().sum(-1)
    new, new_ell, new_gradient = z, ell, gradient
    for _ in range(_LEAPFROG):
        momentum = momentum + 0.5 * size * (_tempered_gradient(new_gradient, new, beta) @ scale)
        new = new + size * (momentum @ scale.mT)
        new_ell, new_gradient = target.value_and_gradient(new)
        momentum = momentum + 0.5 * size * (_tempered_gradient(new_gradient, new, beta) @ scale)
    new_energy = _tempered(new_ell, new, beta) - 0.5 * momentum.square().sum(-1)
    probability = (new_energy - energy).clamp(max=0.0).exp().nan_to_num(0.0)
    accept = torch.rand_like(probability) < probability
    z = torch.where(accept[:, None], new, z)
    gradient = torch.where(accept[:, None], new_gradient, gradient)
    return z, torch.where(accept, new_ell, ell), gradient, float(probability.mean())


def _tempered(ell: Tensor, z: Tensor, beta: float) -> Tensor:
    return beta * ell + (1.0 - beta) * log_standard_normal(z)


def _tempered_gradient(gradient: Tensor, z: Tensor, beta: float) -> Tensor:
    return beta * gradient - (1.0 - beta) * z


def _covariance(z: Tensor) -> Tensor:
    cov = torch.cov(z.mT).reshape(z.shape[-1], z.shape[-1])
    ridge = 1e-9 * cov.diagonal().mean().clamp_min(1e-300)
    return cov + ridge * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)


def _root(cov: Tensor) -> Tensor:
    tril, info = torch.linalg.cholesky_ex(cov)
    return tril if int(info) == 0 else cov.diagonal().sqrt().diag()


def _correlation(before: Tensor, after: Tensor) -> float:
    """Largest correlation, over coordinates, between particles before and after the moves."""
    a, b = before - before.mean(0), after - after.mean(0)
    norm = (a.square().sum(0) * b.square().sum(0)).sqrt().clamp_min(1e-300)
    return float(((a * b).sum(0) / norm).max())
