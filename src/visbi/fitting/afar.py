"""Gaussians matched at summits: for posteriors that particles come to from afar, or not at all.

Where a prior is a thousand times as wide as the posterior in some directions and about as wide in others,
tempered particles may sink into a narrow, bent valley that leads to the posterior only slowly: on a growth
curve of 27 sea cows half of the explorations ended 20 to 60 nats below it. An ascent that learns the
curvature on its way (`summits`) goes down the same valley in a hundred steps, and 16 of them cost a tenth of
the particles. Where it comes to rest on the way, as on a regression on raw years, `newton` goes on. A summit
is no mass: what is matched there is drawn from and weighed like any other proposal.

Ascents are sent until one more summit, as easily met as the k known ones, would have been met by n of them
with a chance of 99 %: (k + 1) (k / (k + 1))^n < .01. Of six modes with exchangeable labels eight ascents, all
that were sent once, left out one to three.
"""

import math

import torch

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import Group
from visbi.fitting.mixture import ALIKE, bhattacharyya
from visbi.fitting.newton import newton
from visbi.fitting.refine import HOPELESS, matched
from visbi.fitting.summits import Summits, above, summits
from visbi.fitting.target import Target

__all__ = ["at_small_scales", "at_summits"]

_MOST, _FEWER = 32, 16  # ascents from draws of the prior, of one fit alone and of others
_SMALL, _EACH = (16, 64), 256  # ascents from small scales: so many at least and at most, this over dimensions
_SMALLEST = 6.0  # prior sds that they are below the middle
_STEPS = 10  # that all but the first ascents take before Newton's
_CHANCE = 0.01  # of having left one out
_ROOM = 4  # times what ascents have cost that must be left for as many more


def at_summits(now: Group) -> Mixture:
    """Gaussians matched at the ends of ascents from the prior's most promising draws, and from particles.

    Those from the prior's draws are made once: where they ended is kept for when there are particles.

    Raises:
        BudgetReached: the target's budget is used up.
    """
    if now.ends is None:
        now.ends = _from_the_prior(now)
    ends = now.ends
    if now.seen is not None:
        others = above(now.target, now.seen.z, torch.ones_like(now.seen.ell))
        ends = ends.with_(newton(now.target, others))
    return matched(now.target, ends.z, ends.cov)


def at_small_scales(target: Target) -> Summits:
    """Ascents from where the positive entries of theta are up to a billion times smaller than a prior draw's.

    Of a curve that saturates, under priors such as U(0, 10^5) for its height and its rate, draws of the prior
    see the straight line that it is when both are huge, and nothing leads from there to where both are small
    and the curve bends. Draws in which all of them are small by a common factor are on that side.

    Raises:
        BudgetReached: the target's budget is used up.
    """
    like = {"dtype": torch.float64, "device": target.device}
    n = min(max(_EACH // target.dim, _SMALL[0]), _SMALL[1])
    common = _SMALLEST * torch.rand(target.fits, n, 1, **like)
    positive = torch.tensor(target.scales(), **like)
    z = torch.randn(target.fits, n, target.dim, **like) - common * positive
    return newton(target, summits(target, z, _STEPS))


def _from_the_prior(now: Group) -> Summits:
    """Where ascents from its draws end."""
    weights, before = now.usable.double(), now.target.n_gradients + now.target.n_values
    found = newton(now.target, above(now.target, now.starts, weights))
    cost = now.target.n_gradients + now.target.n_values - before
    most = _MOST if now.alone else _FEWER
    while (n := found.z.shape[1]) < most and now.target.budget.left > _ROOM * cost and not _all_met(found):
        more = picked(now.starts, torch.multinomial(weights, n, replacement=True))  # few may be usable
        found, cost = found.with_(newton(now.target, summits(now.target, more, _STEPS))), 2 * cost
    return found


def _all_met(found: Summits) -> bool:
    """Whether those not far below the highest are all of their kind, as far as chance goes.

    Those that were still rising say nothing of summits, and more of them would not.
    """
    arrived = found.rests & (found.ell > found.ell.amax(1, keepdim=True) - HOPELESS)
    distance = bhattacharyya(Mixture.of(torch.zeros_like(found.ell), found.z, found.cov))
    together = ((distance < ALIKE) & arrived[:, None]).sum(-1)
    n, known = arrived.sum(1), (arrived / together.clamp_min(1)).sum(1)
    left_out = (known + 1).log() - n * (1 / known).log1p()
    return bool(((left_out < math.log(_CHANCE)) | (n == 0)).all())
