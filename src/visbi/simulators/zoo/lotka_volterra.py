"""Lotka-Volterra dynamics in log-populations, batched and differentiable, one state a year.

    du/dt = (alpha - beta v) u,    dv/dt = (-gamma + delta u) v

With p = log(delta u) and q = log(beta v) this is dp/dt = alpha - e^q, dq/dt = -gamma + e^p: positive by
construction, and Hamiltonian with the separable energy H(p, q) = e^p - gamma p + e^q - alpha q. Each half
can be solved exactly while the other stands still, so the integrator is a composition of such kicks:
symmetric, sixth order, ten stages (S. Blanes and P. C. Moan, J. Comput. Appl. Math. 142, 2002, 313-330).
It does not drift in energy, and a kick is three operations, which is what counts for autograd.

The energy also gives, ahead of time, the fastest rate a row will ever see: along the orbit e^p is at most
the larger root of r - gamma log r = H - alpha + alpha log alpha, and e^q likewise. Rows up to 3 per year
take 2 steps a year, all others 8; the choice depends on a row's own theta and on nothing else. Rates above
24 per year are held at 24, which keeps every state finite (it touches one prior draw in 800 of the
lynx-hare model). Parameters are read inside [1e-6, 1e4].

Largest error of a log-population within 20 years, measured on 6000 prior draws of the lynx-hare model
against an adaptive method of order eight: 8e-5 up to rate 3, 2e-4 up to 12, 1.5e-2 up to 24.
"""

import math

import torch
from torch import Tensor

from visbi.simulators.zoo.task import check_theta

__all__ = ["fastest_rate", "log_populations"]

_BOUNDS = (1e-6, 1e4)
_CALM_RATE, _CALM_STEPS = 3.0, 2
_WILD_RATE, _WILD_STEPS = 24.0, 8

_P_HALF = (0.050262764400392, 0.413514300428344, 0.0450798897943977, -0.188054853819569, 0.541960678450780)
_Q_HALF = (0.148816447901042, -0.132385865767784, 0.067307604692185, 0.432666402578175)
_P_KICKS = (*_P_HALF, 1 - 2 * sum(_P_HALF), *reversed(_P_HALF))
_Q_KICKS = (*_Q_HALF, 0.5 - sum(_Q_HALF), 0.5 - sum(_Q_HALF), *reversed(_Q_HALF))


def log_populations(theta: Tensor, years: int) -> Tensor:
    """log u and log v at the years 0, 1, ..., `years`.

    Args:
        theta: (N, 6): alpha, beta, gamma, delta (per year), u_0, v_0; positive.
        years: how many years to integrate.

    Returns:
        (N, years + 1, 2) in float64, finite for finite theta, differentiable in theta.

    Raises:
        ValueError: theta has another shape.

    >>> equilibrium = torch.tensor([[0.5, 0.02, 0.8, 0.04, 20.0, 25.0]])
    >>> log_populations(equilibrium, 3).exp().round()[0].tolist()
    [[20.0, 25.0], [20.0, 25.0], [20.0, 25.0], [20.0, 25.0]]
    """
    check_theta(theta, 6)
    alpha, beta, gamma, delta, u, v = theta.double().clamp(*_BOUNDS).unbind(-1)
    p, q = (delta * u).log(), (beta * v).log()
    wild = fastest_rate(alpha, gamma, p, q) > _CALM_RATE
    order, parts = [], []
    for rows, steps, cap in ((~wild, _CALM_STEPS, math.inf), (wild, _WILD_STEPS, _WILD_RATE)):
        chosen = rows.nonzero().squeeze(-1)
        if len(chosen):
            order.append(chosen)
            parts.append(_integrate([value[chosen] for value in (alpha, gamma, p, q)], years, steps, cap))
    if not parts:
        return theta.new_zeros(0, years + 1, 2, dtype=torch.float64)
    states = torch.cat(parts)[torch.cat(order).argsort()]
    return states - torch.stack([delta.log(), beta.log()], -1)[:, None]


@torch.no_grad()
def fastest_rate(alpha: Tensor, gamma: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The larger of max e^p and max e^q along the orbit through (p, q), (N,), per year."""
    energy = p.exp() - gamma * p + q.exp() - alpha * q

    def larger_root(level: Tensor, rate: Tensor) -> Tensor:
        r = 2 * (level + rate * ((2 * rate).log() - 1))  # log r <= r / (2 rate) + log(2 rate) - 1
        for _ in range(6):  # falls to the root from above
            r = level + rate * r.log()
        return r

    highest_p = larger_root(energy - alpha + alpha * alpha.log(), gamma)
    return torch.maximum(highest_p, larger_root(energy - gamma + gamma * gamma.log(), alpha))


def _integrate(start: list[Tensor], years: int, steps: int, cap: float) -> Tensor:
    """p and q at the whole years, (N, years + 1, 2), from alpha, gamma, p and q at the start."""
    alpha, gamma, p, q = start
    h = 1 / steps
    drift_p, drift_q = (
        [rate * (h * kick) for kick in kicks] for rate, kicks in ((alpha, _P_KICKS), (gamma, _Q_KICKS))
    )
    drift_join = alpha * (2 * h * _P_KICKS[0])
    log_cap = math.log(cap)

    def rate(z: Tensor) -> Tensor:
        return z.exp() if cap == math.inf else z.clamp(max=log_cap).exp()

    states = [torch.stack([p, q], -1)]
    for _ in range(years):
        p = torch.add(p + drift_p[0], rate(q), alpha=-h * _P_KICKS[0])
        for step in range(steps):
            for i, kick in enumerate(_Q_KICKS):
                q = torch.add(q - drift_q[i], rate(p), alpha=h * kick)
                # within a year the last kick of a step and the first of the next are one
                join = i + 1 == len(_Q_KICKS) and step + 1 < steps
                drift, weight = (drift_join, 2 * _P_KICKS[0]) if join else (drift_p[i + 1], _P_KICKS[i + 1])
                p = torch.add(p + drift, rate(q), alpha=-h * weight)
        states.append(torch.stack([p, q], -1))
    return torch.stack(states, 1)
