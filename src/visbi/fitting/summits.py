r"""Summits of the posterior, found by quasi-Newton ascents from a few points, and Gaussians matched there.

Where a prior is a thousand times as wide as the posterior in some directions and about as wide in others,
tempered particles may sink into a narrow, bent valley that leads to the posterior only slowly: on a growth
curve of 27 sea cows half of the explorations ended 20 to 60 nats below it. An ascent that learns the
curvature on its way goes down the same valley in a hundred steps, and 16 of them cost a hundredth of the
particles. A summit is no mass: what is matched there is drawn from and weighed like any other proposal.

The inverse Hessian is that of Broyden, Fletcher, Goldfarb and Shanno, dense and one for each start; steps are
the best of several lengths, which are evaluated at once. It is where matching starts (as in Zhang, Carpenter,
Gelman, Vehtari: Pathfinder. JMLR 2022, whose Gaussians it would be).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import Group
from visbi.fitting.mixture import spread_out
from visbi.fitting.refine import matched
from visbi.fitting.target import Target

__all__ = ["Summits", "at_summits", "summits"]

_CLIMBERS = 8  # ascents from the prior's draws, and as many from particles
_STEPS = 120  # of an ascent, at most
_LENGTHS = 4.0 ** torch.arange(3, -5, -1)  # of steps that are tried, in quasi-Newton steps
_GAIN, _STILL = 1e-3, 3  # an ascent that gains less nats, so many times in a row, is there
_FAR = 1.0  # prior sds: the longest first step, and longest one without a curvature


@dataclass(frozen=True)
class Summits:
    """Where ascents ended.

    Attributes:
        z: (F, K, d). ell: (F, K) there; at a start that is of no use what the target says of such points.
        cov: (F, K, d, d) the inverse of the curvature, as far as the ascent has learnt it.
    """

    z: Tensor
    ell: Tensor
    cov: Tensor


def at_summits(now: Group) -> Mixture:
    """Gaussians matched at the ends of ascents from the prior's most promising draws, and from particles.

    Raises:
        BudgetReached: the target's budget is used up.
    """
    each = [(now.starts, now.usable.double())]
    each += [] if now.seen is None else [(now.seen.z, torch.ones_like(now.seen.ell))]
    starts = [picked(z, spread_out(z, w / w.sum(1, keepdim=True), _CLIMBERS)) for z, w in each]
    found = summits(now.target, torch.cat(starts, 1))
    return matched(now.target, found.z, found.cov)


def summits(target: Target, z: Tensor) -> Summits:
    """Ascents from points z (F, K, d).

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> scale = torch.tensor([1e-3, 1.0])
    >>> target = Target(lambda theta: -0.5 * ((theta - 0.5) / scale).square().sum(-1), coordinates(prior))
    >>> found = summits(target, torch.zeros(1, 1, 2).double())
    >>> found.z[0, 0], found.cov[0, 0].diagonal().sqrt()
    (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([0.0010, 1.0000], dtype=torch.float64))
    """
    fits, k, d = z.shape
    z = z.double()
    ell, gradient = target.value_and_gradient(z)
    eye = torch.eye(d).to(z).expand(fits, k, d, d)
    inverse = cov = _scaled(eye, gradient)
    fresh = torch.ones_like(ell, dtype=torch.bool)  # no curvature is known
    still = torch.zeros_like(ell)
    for _ in range(_STEPS):
        direction = (inverse @ gradient[..., None])[..., 0]
        step = _lengths(target, z, ell, gradient, direction)[..., None] * direction[:, :, None]
        new_ell, new_gradient = target.value_and_gradient((z[:, :, None] + step).flatten(1, 2))
        highest = new_ell.reshape(fits, k, 2).max(-1)
        step, new_gradient = (
            _chosen(t.reshape(fits, k, 2, d), highest.indices) for t in (step, new_gradient)
        )
        better = highest.values > ell
        gain = torch.where(better, highest.values - ell, 0.0)
        learnt, inverse = _updated(inverse, step, gradient - new_gradient, fresh)
        lost = ~better & ~fresh  # along a direction that does not rise: begin anew from the slope alone
        step = torch.where(better[..., None], step, 0.0)
        gradient = torch.where(better[..., None], new_gradient, gradient)
        z, ell = z + step, torch.where(better, highest.values, ell)
        cov = torch.where((better & learnt & (gain > _GAIN))[..., None, None], inverse, cov)
        inverse = torch.where(lost[..., None, None], _scaled(eye, gradient), inverse)
        fresh = (fresh & ~learnt) | lost
        still = torch.where(gain < _GAIN, still + 1, torch.zeros_like(still))
        if bool((still >= _STILL).all()):
            break
    return Summits(z, ell, cov)


def _lengths(target: Target, z: Tensor, ell: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
    """(F, K, 2) how long a step could be: the best of some, and the top of the parabola through it."""
    lengths = _LENGTHS.to(z)
    each = z[:, :, None] + lengths[:, None] * direction[:, :, None]
    values = target.value(each.flatten(1, 2)).reshape(*ell.shape, -1).nan_to_num(-torch.inf, -torch.inf)
    highest = values.max(-1)
    best = lengths[highest.indices]
    slope = (gradient * direction).sum(-1)
    bend = (ell + slope * best - highest.values) / best.square()
    top = torch.where(bend > 0, slope / (2 * bend), best).nan_to_num(0.0)
    return torch.stack([best, torch.minimum(torch.maximum(top, best / 4), best * 4)], -1)


def _chosen(each: Tensor, index: Tensor) -> Tensor:
    """(F, K, d) from (F, K, 2, d)."""
    return each.gather(2, index[..., None, None].expand(*index.shape, 1, each.shape[-1]))[:, :, 0]


def _scaled(eye: Tensor, gradient: Tensor) -> Tensor:
    """Multiples of the identity by which a step is as long as `_FAR`, or as the slope if that is less."""
    norm = gradient.norm(dim=-1).clamp_min(1e-300)
    return eye * (_FAR / norm).clamp_max(1.0)[..., None, None]


def _updated(inverse: Tensor, step: Tensor, change: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Where steps (F, K, d) that changed the slope so taught a curvature, and inverse Hessians after them."""
    product = (step * change).sum(-1)
    learnt = product > 1e-12 * step.norm(dim=-1) * change.norm(dim=-1)
    rate = torch.where(learnt, 1.0 / product.clamp_min(1e-300), 0.0)[..., None, None]
    size = (product / change.square().sum(-1).clamp_min(1e-300))[..., None, None]
    eye = torch.eye(step.shape[-1]).to(step)
    start = torch.where((fresh & learnt)[..., None, None], size * eye, inverse)
    s, y = step[..., None], change[..., None]
    left = eye - rate * s @ y.mT
    new = left @ start @ left.mT + rate * s @ s.mT
    return learnt, torch.where(learnt[..., None, None], new, inverse)
