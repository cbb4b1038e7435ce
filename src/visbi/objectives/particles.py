r"""Particles: draws of q with their log-weights, the raw material of every objective.

log w_n = log p(theta_n) - log q(theta_n), with log p the potential. Every objective is a weighted sum of
gradients of log w, taken through the path, through the score, or both; so one place draws the particles,
keeps the three gradients apart and deals with potentials that are not finite.

Parameters along which draws have no gradient, such as a mixture's weights, leave their mark in `log_q_choice`
alone. `choice_term` has the gradient by them: with the bound V = -1/r log mean_n w_n^r of N draws (r = 1: the
importance-weighted bound; r -> 0: minus the ELBO) and V_-n that of the others,

    grad E[V] = E[sum_n (V - V_-n + wbar_n - 1/N) grad log q(theta_n)],   wbar = softmax(r log w),

where V_-n is a baseline (Mnih and Rezende 2016), wbar_n is the derivative of V by log q(theta_n), and 1/N
takes out what has mean zero: nothing is left if q is exact.

A particle whose potential is NaN or +-inf gets a weight of zero and sends no gradient; it is counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.types import LogDensity
from visbi.families.base import Draws, Family

__all__ = ["Loss", "Particles", "choice_term", "draw_particles", "log_mean_exp"]

_LARGEST_SHARE = 1.0 - 1e-12  # of the weight that one draw can have: the others' bound stays finite


@dataclass(frozen=True)
class Loss:
    """One estimate of an objective.

    Attributes:
        surrogate: a scalar whose gradient is the estimate of the objective's gradient.
        value: the objective itself, lower is better (minus a bound on the log-evidence, or a divergence).
        excluded: how many particles had a potential that was not finite.
    """

    surrogate: Tensor
    value: float
    excluded: int = 0


@dataclass(frozen=True)
class Particles:
    """Draws of q, their potential, and which of them count.

    Attributes:
        draws: the draws.
        log_p: (N,) float64, differentiable through theta; zero where it was not finite.
        valid: (N,) bool.
    """

    draws: Draws
    log_p: Tensor
    valid: Tensor

    @property
    def excluded(self) -> int:
        """How many particles do not count."""
        return int((~self.valid).sum())

    def log_w(self) -> Tensor:
        """(N,) without gradient, -inf where the potential was not finite."""
        log_w = (self.log_p - self.draws.log_q).detach()
        return torch.where(self.valid, log_w, -torch.inf)

    def through_all(self) -> Tensor:
        """log w (N,) with its total gradient; zero for particles that do not count."""
        return self._masked(self.log_p - self.draws.log_q)

    def through_path(self) -> Tensor:
        """log w (N,) with the gradient of the path alone."""
        if self.draws.log_q_path is None:
            raise ValueError("path gradients need a reparameterised family and draws with path=True")
        return self._masked(self.log_p - self.draws.log_q_path)

    def through_score(self) -> Tensor:
        """log q (N,) with theta held fixed."""
        return self._masked(self.draws.log_q_score)

    def _masked(self, values: Tensor) -> Tensor:
        return torch.where(self.valid, values, torch.zeros_like(values))


def draw_particles(
    family: Family, log_p: LogDensity, n: int, *, path: bool, potential_gradient: bool = True
) -> Particles:
    """Draw `n` particles and evaluate the potential on them.

    Args:
        family: q.
        log_p: the potential, (N, D) -> (N,).
        n: how many.
        path: whether the path part of log q is wanted.
        potential_gradient: whether the objective needs the potential's gradient; without it the potential
            is evaluated on detached draws, which saves its backward pass.
    """
    draws = family.draw(n, path=path)
    theta = draws.theta
    if potential_gradient:
        # the potential may return an inf whose gradient is NaN: gradients of such particles are cut at theta
        values = log_p(theta).double()
        valid = torch.isfinite(values.detach()) & torch.isfinite(draws.log_q.detach())
        if theta.requires_grad and not bool(valid.all()):
            values = log_p(torch.where(valid[:, None], theta, theta.detach())).double()
    else:
        with torch.no_grad():
            values = log_p(theta).double()
        valid = torch.isfinite(values) & torch.isfinite(draws.log_q.detach())
    return Particles(draws, torch.where(valid, values, 0.0), valid)


def choice_term(particles: Particles, *, order: float = 0.0, group: int | None = None) -> Tensor:
    """A scalar with the gradient of minus the bound by what draws do not follow; zero if they follow all.

    Args:
        particles: drawn with the path part.
        order: r; 0 is the ELBO's.
        group: number of draws that the bound is of; the mean over groups is taken. None is all.
    """
    choice = particles.draws.log_q_choice
    if choice is None:
        return particles.log_p.new_zeros(())
    valid = particles.valid if group is None else particles.valid.reshape(-1, group)
    log_w = particles.log_w().reshape(valid.shape)
    if order == 0.0 or valid.shape[-1] == 1:  # of one draw the bound is the ELBO, whatever the order
        log_w = log_w[valid]
        n = max(len(log_w), 2)
        return -((log_w - log_w.mean()) * choice[valid.flatten()]).sum() / (n - 1)
    count = valid.sum(-1, keepdim=True).to(log_w)
    share = torch.softmax(torch.where(valid, order * log_w, -torch.inf), -1)  # order may be negative
    others = torch.log1p(-share.clamp_max(_LARGEST_SHARE)) - torch.log1p(-1.0 / count.clamp_min(2))
    coefficient = torch.where(valid & (count > 1), others / order + share - 1.0 / count, 0.0)
    return (coefficient * choice.reshape(valid.shape)).sum() / (count > 0).sum().clamp_min(1)


def log_mean_exp(values: Tensor, dim: int = -1) -> Tensor:
    """log of the mean of exp, without overflow."""
    return torch.logsumexp(values, dim) - torch.log(torch.tensor(values.shape[dim], dtype=values.dtype))
