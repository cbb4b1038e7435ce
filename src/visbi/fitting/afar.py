"""Gaussians matched at summits: for posteriors that particles come to from afar, or not at all.

Where a prior is a thousand times as wide as the posterior in some directions and about as wide in others,
tempered particles may sink into a narrow, bent valley that leads to the posterior only slowly: on a growth
curve of 27 sea cows half of the explorations ended 20 to 60 nats below it. An ascent that learns the
curvature on its way (`summits`) goes down the same valley in a hundred steps, and 16 of them cost a tenth of
the particles. A summit is no mass: what is matched there is drawn from and weighed like any other proposal.
"""

import torch

from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import Group
from visbi.fitting.newton import newton
from visbi.fitting.refine import matched
from visbi.fitting.summits import above

__all__ = ["at_summits"]


def at_summits(now: Group) -> Mixture:
    """Gaussians matched at the ends of ascents from the prior's most promising draws, and from particles.

    Those from the prior's draws are made once: where they ended is kept for when there are particles.

    Raises:
        BudgetReached: the target's budget is used up.
    """
    if now.ends is None:
        now.ends = newton(now.target, above(now.target, now.starts, now.usable.double()))
    ends = now.ends
    if now.seen is not None:
        others = above(now.target, now.seen.z, torch.ones_like(now.seen.ell))
        ends = ends.with_(newton(now.target, others))
    return matched(now.target, ends.z, ends.cov)
