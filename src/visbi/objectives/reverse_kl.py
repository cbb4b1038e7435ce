r"""Reverse KL: minus the ELBO, -E_q[log p(theta) - log q(theta)].

With theta = f_phi(u) its gradient can leave out the score of q, which has mean zero ("sticking the landing",
Roeder, Wu, Duvenaud 2017): then the estimate's variance vanishes when q is exact. Without reparameterisation
the gradient is that of half the variance of log w (Richter et al. 2020), which is the score estimator with a
leave-one-out baseline.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from visbi.core.types import LogDensity
from visbi.families.base import Family
from visbi.objectives.particles import Loss, choice_term, draw_particles

__all__ = ["reverse_kl", "reverse_kl_rows"]


def reverse_kl(family: Family, log_p: LogDensity, n: int, *, stick_the_landing: bool = True) -> Loss:
    """Minus the ELBO from `n` draws of q.

    Args:
        family: q.
        log_p: the potential, (N, D) -> (N,).
        n: number of particles.
        stick_the_landing: leave the score of q out of the gradient.

    >>> import torch
    >>> from visbi.families import named_family
    >>> from visbi.priors import BoxUniform, coordinates
    >>> q = named_family("gaussian", coordinates(BoxUniform(torch.zeros(1), torch.ones(1))))
    >>> loss = reverse_kl(q, lambda theta: torch.zeros(len(theta)), 8)  # the uniform prior itself
    >>> abs(round(loss.value, 6))
    0.0
    """
    path = stick_the_landing and family.reparameterised
    particles = draw_particles(family, log_p, n, path=path, potential_gradient=family.reparameterised)
    log_w = particles.log_w()[particles.valid]
    value = -float(log_w.mean())  # NaN if none is left
    if not family.reparameterised:
        chosen = particles.through_all()[particles.valid]
        # a single draw has no variance: no gradient then
        surrogate = 0.5 * chosen.var() if len(chosen) > 1 else 0.0 * chosen.sum()
        return Loss(surrogate, value, particles.excluded)
    through = particles.through_path() if path else particles.through_all()
    surrogate = choice_term(particles) - through.sum() / max(len(log_w), 1)
    return Loss(surrogate, value, particles.excluded)


def reverse_kl_rows(
    log_p: Callable[[Tensor], Tensor], theta: Tensor, log_q: Tensor, log_q_path: Tensor, choice: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of F q side by side, each with draws and a potential of its own, sticking the landing.

    Args:
        log_p: (F, N, D) -> (F, N), each row by its own potential.
        theta: draws (F, N, D), with their gradient.
        log_q, log_q_path, choice: as in `Draws`, (F, N).

    Returns:
        Surrogates (F,), losses (F,), NaN where no draw counts, and how many do not count (F,).

    >>> theta = torch.zeros(2, 3, 1)
    >>> flat = torch.zeros(2, 3)
    >>> less = torch.tensor([[1.0], [torch.inf]])
    >>> reverse_kl_rows(lambda theta: theta[..., 0] - less, theta, flat, flat, None)[1:]
    (tensor([1., nan]), tensor([0, 3]))
    """
    values = log_p(theta).to(log_q)
    valid = torch.isfinite(values.detach()) & torch.isfinite(log_q.detach())
    if not bool(valid.all()):  # as in `draw_particles`: an inf may have a gradient of NaN
        values = log_p(torch.where(valid[..., None], theta, theta.detach())).to(log_q)
    count = valid.sum(1)
    log_w = torch.where(valid, (values - log_q).detach(), 0.0)
    mean = torch.where(count > 0, log_w.sum(1) / count, torch.nan)
    surrogate = -torch.where(valid, values - log_q_path, 0.0).sum(1) / count.clamp_min(1)
    if choice is not None:
        off = torch.where(valid, log_w - mean[:, None], 0.0)
        surrogate = surrogate - (off * torch.where(valid, choice, 0.0)).sum(1) / (count.clamp_min(2) - 1)
    return surrogate, -mean, theta.shape[1] - count
