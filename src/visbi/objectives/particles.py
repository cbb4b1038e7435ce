r"""Particles: draws of q with their log-weights, the raw material of every objective.

log w_n = log p(theta_n) - log q(theta_n), with log p the potential. Every objective is a weighted sum of
gradients of log w, taken through the path, through the score, or both; so one place draws the particles,
keeps the three gradients apart and deals with potentials that are not finite.

A particle whose potential is NaN or +-inf gets a weight of zero and sends no gradient; it is counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.types import LogDensity
from visbi.families.base import Draws, Family

__all__ = ["Loss", "Particles", "draw_particles", "log_mean_exp"]


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
            fallback = theta.detach()[valid][:1] if bool(valid.any()) else theta.detach()
            safe = torch.where(valid[:, None], theta, fallback)
            values = torch.where(valid, log_p(safe).double(), 0.0)
    else:
        with torch.no_grad():
            values = log_p(theta).double()
        valid = torch.isfinite(values) & torch.isfinite(draws.log_q.detach())
    return Particles(draws, torch.where(valid, values, 0.0), valid)


def log_mean_exp(values: Tensor, dim: int = -1) -> Tensor:
    """log of the mean of exp, without overflow."""
    return torch.logsumexp(values, dim) - torch.log(torch.tensor(values.shape[dim], dtype=values.dtype))
