r"""Renyi's alpha divergence through its variational bound (Li and Turner 2016):

    L_alpha = 1/(1 - alpha) log E_q[w^(1 - alpha)],

which is the ELBO for alpha -> 1 and the log-evidence for alpha = 0. With wbar = softmax((1 - alpha) log w)
over the particles the gradient estimators are

    total      -sum_n wbar_n d log w_n
    sticking   -sum_n wbar_n (path of log w_n)
    DReG       -sum_n (alpha wbar_n + (1 - alpha) wbar_n^2) (path of log w_n)

The last comes from writing the score term as a path term again: the derivative of wbar_n by log w_n is
(1 - alpha) wbar_n (1 - wbar_n). It joins the two known cases, wbar^2 at alpha = 0 and 1/n at alpha = 1.
"""

import torch

from visbi.core.checks import violation
from visbi.core.types import LogDensity
from visbi.families.base import Family
from visbi.objectives.particles import Loss, choice_term, draw_particles, log_mean_exp

__all__ = ["renyi"]


def renyi(
    family: Family,
    log_p: LogDensity,
    n: int,
    *,
    alpha: float = 0.5,
    stick_the_landing: bool = False,
    dreg: bool = True,
) -> Loss:
    """Minus the Renyi bound from `n` draws of q.

    Args:
        family: q; must be reparameterised.
        log_p: the potential, (N, D) -> (N,).
        n: number of particles.
        alpha: the order, >= 0; 1 is the reverse KL.
        stick_the_landing: leave the score of q out of the gradient.
        dreg: the doubly reparameterised gradient; has precedence over `stick_the_landing`.

    Raises:
        ValueError: q cannot be reparameterised.

    >>> import torch
    >>> from visbi.families import named_family
    >>> from visbi.priors import BoxUniform, coordinates
    >>> q = named_family("gaussian", coordinates(BoxUniform(torch.zeros(1), torch.ones(1))))
    >>> loss = renyi(q, lambda theta: torch.full((len(theta),), 2.0), 8)  # evidence e^2
    >>> round(loss.value, 6)
    -2.0
    """
    if not family.reparameterised:
        expected = "a reparameterised family for vi_method 'alpha'"
        raise ValueError(violation("q", expected, "one without rsample"))
    path = dreg or stick_the_landing
    particles = draw_particles(family, log_p, n, path=path)
    log_w = particles.log_w()[particles.valid]
    through = (particles.through_path() if path else particles.through_all())[particles.valid]
    order = 1.0 - alpha
    weights = torch.softmax(order * log_w, 0)
    # near alpha = 1 the quotient is 0/0; its limit is the mean. Of no particles either is NaN
    value = -float(log_mean_exp(order * log_w) / order) if abs(order) > 1e-8 else -float(log_w.mean())
    weights = alpha * weights + order * weights.square() if dreg else weights
    surrogate = choice_term(particles, order=0.0 if abs(order) <= 1e-8 else order) - (weights * through).sum()
    return Loss(surrogate, value, particles.excluded)
