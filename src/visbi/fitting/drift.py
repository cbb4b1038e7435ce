"""Whether draws that are meant to be right stay right when the posterior's own moves carry them."""

from collections.abc import Callable

import torch
from torch import Tensor

from visbi.fitting.moves import LEAPFROG, Moves, StandardNormal, covariance, root
from visbi.fitting.target import Target

__all__ = ["drift"]

_RISE = 0.02  # nats of mean log-weight that no one would notice
_LARGEST_RISE = 10.0


def drift(
    target: Target,
    z: Tensor,
    log_q: Callable[[Tensor], Tensor],
    *,
    gradient: bool,
    rounds: int = 5,
    step: Tensor | None = None,
    cov: Tensor | None = None,
) -> Tensor:
    """How far the posterior's own moves carry draws towards where q is too low, in standard errors.

    Draws that are right stay right under moves that leave the posterior as it is, so their log-weights
    ell - log q keep their mean. Draws of a q that misses what lies next to it walk into it, and the mean
    rises.

    Args:
        target: of F potentials.
        z: (F, n, d) draws that are meant to be right, such as resampled ones.
        log_q: (F, N, d) -> (F, N).
        gradient: whether the moves use the potential's gradient.
        rounds: of moves.
        step: (F,) what an exploration of the same posterior had come to; None finds it on the way.
        cov: (F, d, d) covariance of what a draw can reach, such as that within modes; None is that of z.

    Returns:
        (F,) the mean rise of log-weights over its standard error where the rise is above `_RISE`; else 0.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(prior.log_prob, coordinates(prior))  # the posterior is the prior
    >>> drift(target, prior.sample((1, 256)), prior.log_prob, gradient=True)
    tensor([0.], dtype=torch.float64)
    """
    moves = Moves(target, StandardNormal(target.dim), gradient)
    one = torch.ones(len(z), dtype=z.dtype, device=z.device)
    if step is not None:
        moves.step = step
    scale = root(covariance(z) if cov is None else cov)
    start = now = moves.at(z)
    for _ in range(rounds if gradient else rounds * LEAPFROG):
        now = moves.round(now, one, scale)
        moves.adapt()
    rise = (now.ell - start.ell) - (log_q(now.z) - log_q(z))
    rise = rise.clamp(-_LARGEST_RISE, _LARGEST_RISE)
    error = rise.std(1) / rise.shape[1] ** 0.5
    return torch.where(rise.mean(1) > _RISE, rise.mean(1) / error.clamp_min(1e-300), 0.0)
