r"""Importance-weighted bound: -E[log (1/K) sum_k w_k] over groups of K draws.

Burda, Grosse, Salakhutdinov: Importance weighted autoencoders. ICLR 2016.

Gradient estimators, wbar = softmax of log w within a group:

    total             -sum_k wbar_k  d log w_k           (path and score)
    sticking          -sum_k wbar_k  (path of log w_k)   biased for K > 1, low variance
    DReG              -sum_k wbar_k^2 (path of log w_k)  unbiased (Tucker, Lawson, Gu, Maddison 2019)

With K = 1 all three are those of the reverse KL.
"""

import torch

from visbi.core.checks import violation
from visbi.core.types import LogDensity
from visbi.families.base import Family
from visbi.objectives.particles import Loss, choice_term, draw_particles, log_mean_exp

__all__ = ["importance_weighted"]


def importance_weighted(
    family: Family,
    log_p: LogDensity,
    n: int,
    *,
    K: int = 8,  # noqa: N803
    stick_the_landing: bool = False,
    dreg: bool = True,
) -> Loss:
    """Minus the importance-weighted bound from `n` groups of `K` draws.

    Args:
        family: q; must be reparameterised.
        log_p: the potential, (N, D) -> (N,).
        n: number of groups.
        K: draws in a group.
        stick_the_landing: leave the score of q out of the gradient.
        dreg: the doubly reparameterised gradient; has precedence over `stick_the_landing`.

    Raises:
        ValueError: q cannot be reparameterised.

    >>> import torch
    >>> from visbi.families import named_family
    >>> from visbi.priors import BoxUniform, coordinates
    >>> q = named_family("gaussian", coordinates(BoxUniform(torch.zeros(1), torch.ones(1))))
    >>> loss = importance_weighted(q, lambda theta: torch.full((len(theta),), 2.0), 8)  # evidence e^2
    >>> round(loss.value, 6)
    -2.0
    """
    if not family.reparameterised:
        expected = "a reparameterised family for vi_method 'IW'"
        raise ValueError(violation("q", expected, "one without rsample"))
    path = dreg or stick_the_landing
    particles = draw_particles(family, log_p, n * K, path=path)
    log_w = particles.log_w().reshape(n, K)
    alive = torch.isfinite(log_w).any(1)
    value = -float(log_mean_exp(log_w[alive]).mean())  # NaN if none is left
    weights = torch.softmax(torch.where(alive[:, None], log_w, torch.zeros_like(log_w)), 1)
    weights = weights.square() if dreg else weights
    through = (particles.through_path() if path else particles.through_all()).reshape(n, K)
    surrogate = -(weights * through).sum() / max(int(alive.sum()), 1)
    surrogate = surrogate + choice_term(particles, order=1.0, group=K)
    return Loss(surrogate, value, particles.excluded)
