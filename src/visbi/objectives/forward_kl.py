r"""Forward KL: KL(p || q) up to a constant, by self-normalised importance sampling with q as proposal.

grad = -sum_n wbar_n grad_phi log q_phi(theta_n) at fixed theta_n, wbar = softmax(log w). It covers mass,
where the reverse KL seeks modes. The reported value is the estimate of KL(p || q) itself,
sum_n wbar_n log w_n - log Zhat, which needs no normalised potential and is never negative.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from visbi.core.types import LogDensity
from visbi.families.base import Family
from visbi.objectives.particles import Loss, draw_particles, log_mean_exp

__all__ = ["forward_kl"]


def forward_kl(
    family: Family,
    log_p: LogDensity,
    n: int,
    *,
    weight_transform: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """KL(p || q) from `n` weighted draws of q.

    Args:
        family: q.
        log_p: the potential, (N, D) -> (N,).
        n: number of particles.
        weight_transform: applied to the weights (N,), scaled to mean 1, before they are normalised; for
            example `lambda w: w.clamp(max=10)`.

    >>> import torch
    >>> from visbi.families import named_family
    >>> from visbi.priors import BoxUniform, coordinates
    >>> q = named_family("gaussian", coordinates(BoxUniform(torch.zeros(1), torch.ones(1))))
    >>> loss = forward_kl(q, lambda theta: torch.zeros(len(theta)), 8)  # q is the target, up to a constant
    >>> abs(round(loss.value, 6))
    0.0
    """
    particles = draw_particles(family, log_p, n, path=family.reparameterised, potential_gradient=False)
    log_w = particles.log_w()
    if not bool(particles.valid.any()):
        return Loss(particles.through_score().sum(), float("nan"), particles.excluded)  # a sum of zeros
    weights = torch.softmax(log_w, 0)
    finite = torch.where(particles.valid, log_w, torch.zeros_like(log_w))
    value = float((weights * finite).sum() - log_mean_exp(log_w))
    if weight_transform is not None:
        weights = weight_transform(weights * n)
        weights = weights / weights.sum()
    return Loss(-(weights.detach() * particles.through_score()).sum(), value, particles.excluded)
