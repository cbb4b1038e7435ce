r"""The rung of bends: a Gaussian whose means are quadratic in other entries, and so its log-scales.

A banana takes a mixture dozens of components, a flow a hundred thousand evaluations; a chain of parabolas
neither of them follows to its ends, a thousand widths away. Regression on the explorer's particles
(`fitting.bend`) finds the map that makes them Gaussian, if there is one, and asks the potential for nothing.
Draws of the bent Gaussian are weighed, and all points so far, with their weights, are regressed again: what
the particles had lost in a neck or at an end is met, and then the map is right there, too. Where it has done
what it can, a mixture takes the place of the Gaussian.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visbi.families.gaussians import Mixture
from visbi.fitting.bend import BentProposal, bend_of
from visbi.fitting.climbing import Group
from visbi.fitting.mixing import LITTLE
from visbi.fitting.mixture import defence, defended, moments
from visbi.fitting.pool import Trial
from visbi.fitting.refine import ENOUGH, of_points
from visbi.fitting.verdicts import EVEN, SPARE, certified

__all__ = ["bent"]

_DIMENSIONS = 3  # from which it is tried: in the plane a mixture follows any bend
_WORTH = 0.1  # nats that entries must tell of each other, beyond what they tell linearly
_LEFT = 0.8  # nats by which, particles say, a bent Gaussian is off at most: of two modes it is by more
_ROUNDS = 7
_EARLY, _SLOW = 4, 0.2  # rounds after which the share must have come to so much
_FULL = 40.0  # points in effect, for each dimension, that a regression wants, or else they are tempered
_GROWN = 1.05  # times the share so far, or else the map has done what it can
_COMPONENTS = 12


def bent(now: Group) -> Sequence[Group]:
    """A bent Gaussian, or mixture, for a fit alone; gives it back if that is no answer."""
    if not now.alone or now.target.fits > 1 or now.target.dim < _DIMENSIONS:
        return [now]
    first = _of_particles(now)
    if first is None:
        return [now]
    q, trial, steady = _regressed(now, *first)
    now.records[0].count_among(trial.z[0], q)
    if steady < LITTLE:
        now.tell(now.all(), lambda i: f"{_name(q)} had {trial.numbers(i)}")
        return [now]
    for again in (True, False):
        if bool(certified(now, _name(q), q, spare=SPARE, more_to_come=True).all()):
            return []
        if again:  # its draws show more of the ends than the trials did
            q = _of_all_points(now)
    return [now]


def _of_particles(now: Group) -> tuple[BentProposal, Trial] | None:
    """The bent Gaussian of the explorer's particles, and a trial of it, if they are bent and nothing else."""
    if now.seen is None:
        now.explore(now.effort.particles)
    seen = now.seen
    assert seen is not None
    weights = torch.full_like(seen.ell, 1.0 / seen.ell.shape[1])
    q, nats = _of_points(seen.z, weights)
    now.bent = nats > _WORTH
    if not now.bent:
        return None
    log_p = (seen.ell - q.log_prob(seen.z)).mean()
    if not bool(now.far_too_wide().all()):
        near = float(log_p - seen.log_evidence) < _LEFT
        return (q, now.pool.tried(q, now.effort.trial)) if near else None
    trial = now.pool.tried(q, now.effort.trial)  # particles bring no evidence then that is to be believed
    return (q, trial) if float(log_p - trial.log_z) < _LEFT else None


def _regressed(now: Group, q: BentProposal, trial: Trial) -> tuple[BentProposal, Trial, float]:
    """The best after some rounds, the trial of it, and how steady that is: see `refine.refined`."""
    best, best_trial, shares, components = q, trial, [float(trial.share)], 1
    now.consider(_name(q), q, trial)
    while not (_good(trial) or components > 1 or len(shares) == _ROUNDS):
        highest = max(shares)
        if len(shares) >= _EARLY and highest < _SLOW:
            break
        stalled = len(shares) > 1 and highest > LITTLE and shares[-1] < _GROWN * max(shares[:-1])
        components = _COMPONENTS if stalled else 1
        q = _of_all_points(now, components)
        trial = now.pool.draw(q, now.effort.trial)
        now.consider(_name(q), q, trial)
        if float(trial.share) > highest:
            best, best_trial = q, trial
        if components == 1:
            shares.append(float(trial.share))
    return best, best_trial, shares[-1] if _good(trial) else min(shares[-2:])


def _good(trial: Trial) -> bool:
    return float(trial.share) > ENOUGH and float(trial.khat) < EVEN


def _of_all_points(now: Group, components: int = 1) -> BentProposal:
    points = now.pool.points(now.effort.points, least=_FULL * now.target.dim)
    return _of_points(*points, components)[0]


def _of_points(z: Tensor, weights: Tensor, components: int = 1) -> tuple[BentProposal, float]:
    """What weighted points (1, N, d) show, and what entries tell of each other, in nats."""
    bend, nats = bend_of(z[0], weights[0])
    u, _ = bend.pull(z)
    if components > 1:
        return BentProposal(defended(of_points(u, weights, components=components)), bend), nats
    loc, cov = moments(u, weights)
    return BentProposal(defended(Mixture.of(torch.zeros_like(loc[..., 0]), loc, cov[:, None])), bend), nats


def _name(q: BentProposal) -> str:
    _, components, d = q.noise.loc.shape
    return "a bent mixture" if components > 1 + len(defence(d)) else "a bent Gaussian"
