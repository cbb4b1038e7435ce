r"""Reverse KL: minus the ELBO, -E_q[log p(theta) - log q(theta)].

With theta = f_phi(u) its gradient can leave out the score of q, which has mean zero ("sticking the landing",
Roeder, Wu, Duvenaud 2017): then the estimate's variance vanishes when q is exact. Without reparameterisation
the gradient is that of half the variance of log w (Richter et al. 2020), which is the score estimator with a
leave-one-out baseline.
"""

from visbi.core.types import LogDensity
from visbi.families.base import Family
from visbi.objectives.particles import Loss, choice_term, draw_particles

__all__ = ["reverse_kl"]


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
