r"""Ascents by Newton's method, for narrow valleys in which quasi-Newton ones come to rest.

Curvatures of a regression on raw predictors, far from where it belongs, are 10^8 to one, upwards in some
directions, and seen from another place than where they are needed. What quasi-Newton updates learn from a
single step is then the steepest direction, over and over. Here the whole Hessian is taken from differences of
slopes, in coordinates y = L^-1 z in which the last one was the identity:

    z <- z + t L Q |S|^-1 Q' L' grad ell,    L' (-Hessian) L = Q S Q',    L <- L Q |S|^(-1/2).

Differences resolve curvatures that are 10^4 to one; each step sharpens L by as much as that. The absolute
values let it leave saddles (Dauphin et al.: Identifying and attacking the saddle point problem. 2014). Steps
are the best of several lengths, as in `summits`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.fitting.summits import GAIN, Climbers, Summits, on_the_line
from visbi.fitting.target import Target

__all__ = ["newton"]

_STEPS = 40  # of an ascent, at most
_STILL = 2  # an ascent that gains next to nothing, so many times in a row, is there
_DIFFERENCE = 0.03  # of the last curvature's own scale
_WIDEST, _STEEPER = 3.0, 1e10  # scales in prior sds at most; curvatures, by the last ones, at most


@dataclass(frozen=True)
class _Climbers(Climbers):
    """Newton's: where they are (F, K, d), L (F, K, d, d), and steps in a row without a gain."""

    z: Tensor
    ell: Tensor
    gradient: Tensor
    root: Tensor
    still: Tensor


def newton(target: Target, found: Summits, steps: int = _STEPS) -> Summits:
    """Where ascents (F, K, d) end that go on from others' ends, after so many steps at most.

    A step takes d + 2 evaluations with gradient and eight without.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.fitting.summits import summits
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1e3), 1)
    >>> year = torch.linspace(1950, 2020, 71).double()
    >>> def log_p(theta):  # y = .02 (year - 1985) within .01: intercept and slope are all but one
    ...     fit = theta[:, :1] + theta[:, 1:] * year
    ...     return -0.5 * ((fit - 0.02 * (year - 1985)) / 0.01).square().sum(-1)
    >>> target = Target(log_p, coordinates(prior))
    >>> found = newton(target, summits(target, torch.ones(1, 1, 2).double()))
    >>> 1e3 * found.z[0, 0]
    tensor([-39.7000, 0.0200], dtype=torch.float64)
    >>> 1e3 * found.cov[0, 0].diagonal().sqrt()
    tensor([0.1149, 0.0001], dtype=torch.float64)
    """
    ell, gradient = target.value_and_gradient(found.z)
    root = torch.eye(target.dim).to(found.z).expand_as(found.cov)
    everyone = _Climbers(found.z, ell, gradient, root, torch.zeros_like(ell))
    for _ in range(steps):
        climbing = (everyone.still < _STILL).any(0)
        if not bool(climbing.any()):
            break
        everyone = everyone.put(climbing, _step(target, everyone.only(climbing)))
    return Summits(everyone.z, everyone.ell, everyone.root @ everyone.root.mT, everyone.still >= _STILL)


def _step(target: Target, now: _Climbers) -> _Climbers:
    """All of them one step further, or as they are, with the curvature there."""
    fits, k, d = now.z.shape
    each = now.z[:, :, None] + _DIFFERENCE * now.root.mT  # a row for each column of L
    _, slopes = target.value_and_gradient(each.flatten(1, 2))
    change = now.gradient[:, :, None] - slopes.reshape(fits, k, d, d)
    bend = (change @ now.root / _DIFFERENCE).nan_to_num(0.0, 0.0, 0.0)
    size, axes = torch.linalg.eigh(0.5 * (bend + bend.mT))
    root = now.root @ axes
    least = root.square().sum(2) / _WIDEST**2
    root = root / torch.maximum(size.abs().clamp_max(_STEEPER), least).sqrt()[:, :, None]
    direction = (root @ (root.mT @ now.gradient[..., None]))[..., 0]
    step, ell, slope = on_the_line(target, now.z, now.ell, now.gradient, direction)
    better = ell > now.ell
    return _Climbers(
        torch.where(better[..., None], now.z + step, now.z),
        torch.where(better, ell, now.ell),
        torch.where(better[..., None], slope, now.gradient),
        root,
        torch.where(ell - now.ell < GAIN, now.still + 1, 0.0),
    )
