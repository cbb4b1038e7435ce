"""Draws of a fitted q with the weights that make them draws of the posterior: drawn, pooled, resampled.

The weights are w = p / q. A fit keeps a pool of weighted draws for later calls; it grows where more corrected
draws are asked for than it can give without giving the same one twice. The pool of an automatic fit that is
not good does not: more draws would mend nothing, and a budget may have ended it. How draws are taken from a
pool, and from which paper: `visbi.certificate.correction`.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.report import GOOD
from visbi.certificate.weights import MIN_DRAWS
from visbi.core.random import seeded
from visbi.core.types import LogDensity
from visbi.fitting.state import AmortizedFit, AutoFit, SingleFit

__all__ = ["POOL", "corrected", "fell", "grown", "in_pieces", "pool", "pool_for", "weighted_draws"]

POOL = 16_384
"""Draws that corrected ones are taken from, at least."""
_FALLEN = 0.5  # of the effective sample size of the first draws: that is no chance
_BATCH = 16_384  # potentials are evaluated in pieces of this many theta


def weighted_draws(fit: SingleFit | AutoFit | AmortizedFit, log_p: LogDensity, n: int) -> WeightedDraws:
    """n fresh draws of q at the one observation that `fit` is looked at in.

    Args:
        fit: the fit.
        log_p: the potential at that observation.
        n: how many.
    """
    with torch.no_grad():
        theta, log_q = fit.family.sample_and_log_prob(n)
        return WeightedDraws(theta, in_pieces(log_p, theta).double(), log_q)


def pool(fit: SingleFit | AutoFit, log_p: LogDensity, n: int = POOL) -> WeightedDraws:
    """At least n draws: those that `fit` keeps and, if they are too few, new ones after them."""
    there = 0 if fit.draws is None else len(fit.draws.theta)
    if fit.draws is not None and n <= there:
        return fit.draws
    more = weighted_draws(fit, log_p, max(n - there, MIN_DRAWS))
    return more if fit.draws is None else fit.draws.with_(more)


def pool_for(n: int, fit: SingleFit | AutoFit, log_p: LogDensity, seed: int) -> WeightedDraws:
    """A pool that n corrected draws can be taken from.

    A first one and what it grows by have a seed each, and so has `corrected`: equal seeds give equal draws,
    whether or not the pool grows.

    Warns:
        UserWarning: all draws are worth less than half of what the first ones alone are. It grows no further
            then, and so it is at every call.
    """
    if isinstance(fit, AutoFit) and fit.report.status not in GOOD:
        return fit.draws
    with seeded(seed):
        draws = pool(fit, log_p)
    with seeded(seed + 1):
        draws = grown(draws, n, lambda more: weighted_draws(fit, log_p, max(more, MIN_DRAWS)))
    if fell(draws):
        before, after = (f"{d.n_effective:.0f} of {len(d.theta)}" for d in (draws.first(POOL), draws))
        warnings.warn(
            f"Corrected draws: the effective sample size fell from {before} draws of q to {after} when more "
            "were needed. Some of the new ones lie where q is much too low, which its certificate has not "
            "seen. Do not use them; train again with another seed, or run MCMC.",
            stacklevel=3,
        )
    return draws


def grown(draws: WeightedDraws, n: int, fresh: Callable[[int], WeightedDraws]) -> WeightedDraws:
    """A pool, and after it as many `fresh` draws as n corrected ones need; none once it `fell`."""
    while (needed := draws.needed(n)) > len(draws.theta) and not fell(draws):
        draws = draws.with_(fresh(needed - len(draws.theta)))
    return draws


def fell(draws: WeightedDraws) -> bool:
    """Whether all draws are worth less than half of what the first ones, a certificate's, are."""
    return len(draws.theta) > POOL and draws.n_effective < _FALLEN * draws.first(POOL).n_effective


def corrected(draws: WeightedDraws, shape: torch.Size, seed: int) -> Tensor:
    """Draws of the posterior, (*shape, D), from a pool; `seed` is that of `pool_for`.

    Raises:
        ValueError: no draw of the pool has a finite weight.
    """
    with seeded(seed + 2):
        return draws.resampled(shape.numel()).reshape(*shape, draws.theta.shape[-1])


def in_pieces(log_p: LogDensity, theta: Tensor) -> Tensor:
    """log p, (N,), at theta (N, D), not all of them at once."""
    return torch.cat([log_p(piece) for piece in theta.split(_BATCH)])
