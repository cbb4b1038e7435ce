"""Gaussians matched at summits: for posteriors that particles come to from afar, or not at all.

Where a prior is a thousand times as wide as the posterior in some directions and about as wide in others,
tempered particles may sink into a narrow, bent valley that leads to the posterior only slowly: on a growth
curve of 27 sea cows half of the explorations ended 20 to 60 nats below it. An ascent that learns the
curvature on its way (`summits`) goes down the same valley in a hundred steps, and 16 of them cost a tenth of
the particles. A summit is no mass: what is matched there is drawn from and weighed like any other proposal.
"""

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import Group
from visbi.fitting.mixture import spread_out
from visbi.fitting.refine import matched
from visbi.fitting.summits import Summits, summits

__all__ = ["at_summits"]

_CLIMBERS = 8  # ascents from the prior's draws, and as many from particles


def at_summits(now: Group) -> Mixture:
    """Gaussians matched at the ends of ascents from the prior's most promising draws, and from particles.

    Those from the prior's draws are made once: where they ended is kept for when there are particles.

    Raises:
        BudgetReached: the target's budget is used up.
    """
    if now.ends is None:
        now.ends = _ends(now, now.starts, now.usable.double())
    ends = now.ends
    if now.seen is not None:
        ends = ends.with_(_ends(now, now.seen.z, torch.ones_like(now.seen.ell)))
    return matched(now.target, ends.z, ends.cov)


def _ends(now: Group, z: Tensor, weights: Tensor) -> Summits:
    """Of ascents from some of the points z (F, N, d), spread out by weights (F, N)."""
    starts = spread_out(z, weights / weights.sum(1, keepdim=True), _CLIMBERS)
    return summits(now.target, picked(z, starts))
