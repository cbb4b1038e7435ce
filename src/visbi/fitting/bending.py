r"""The rung of bends: a Gaussian whose means are quadratic in other entries, and so its log-scales.

A banana takes a mixture dozens of components, a flow a hundred thousand evaluations; a chain of parabolas
neither of them follows to its ends, a thousand widths away. Regression on the explorer's particles
(`fitting.bend`) finds the map that makes them Gaussian, if there is one, and asks the potential for nothing.
Draws of the bent Gaussian are weighed, and all points so far, with their weights, are regressed again: what
the particles had lost in a neck or at an end is met, and then the map is right there, too. Where it has done
what it can, a mixture takes the place of the Gaussian.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visbi.families.gaussians import Mixture
from visbi.fitting.bend import BentProposal, bend_of, bent_around
from visbi.fitting.climbing import Group
from visbi.fitting.mixing import CLEAR, LITTLE
from visbi.fitting.mixture import defence, moments
from visbi.fitting.pool import Trial
from visbi.fitting.refine import ENOUGH
from visbi.fitting.verdicts import EVEN, SPARE, certified
from visbi.fitting.weighing import missing_at
from visbi.fitting.witnesses import FEW

__all__ = ["bent", "bent_at_sight"]

_DIMENSIONS = 3  # from which it is tried: in the plane a mixture follows any bend
_WORTH = 0.1  # nats that entries must tell of each other, beyond what they tell linearly
_LEFT = 0.8  # nats by which, particles say, a bent Gaussian is off at most: of two modes it is by more
_ROUNDS = 7
_EARLY, _SLOW = 4, 0.2  # rounds after which the share must have come to so much
_FULL = 40.0  # points in effect, for each dimension, that a regression wants, or else they are tempered
_GROWN = 1.05  # times the share so far, or else the map has done what it can
_WIDER = 4.0  # times as wide along an entry
_FURTHER = 3.0  # nats by which log-scales go on there
_MIXTURE = "a bent mixture"


def bent(now: Group) -> Sequence[Group]:
    """Bent Gaussians, or mixtures, for those fits that have had none; gives back what they do not answer."""
    if now.target.dim < _DIMENSIONS:
        return [now]
    had, fresh = now.parts(now.where(lambda record: record.regressed))
    rest = [] if had is None else [had]
    if fresh is None:
        return rest
    others, found = _of_particles(fresh)
    return [*rest, *others, *([] if found is None else _answers(*found))]


def bent_at_sight(now: Group) -> Sequence[Group]:
    """The same for those fits of which all points so far, draws of the prior or others, show that it may do.

    Particles cost many fits as much as all else that most of them need.
    """
    if now.target.dim < _DIMENSIONS:
        return [now]
    some, others = now.parts(bend_of(*now.pool.points(now.effort.points))[1] > _WORTH)
    return [*([] if others is None else [others]), *([] if some is None else bent(some))]


def _of_particles(now: Group) -> tuple[list[Group], tuple[Group, BentProposal, Trial] | None]:
    """The fits that are not bent or something else, too, and the bent Gaussians of the others' particles,
    with trials of them.
    """
    if now.seen is None:
        now.explore(now.effort.particles)
    seen = now.seen
    assert seen is not None
    weights = torch.full_like(seen.ell, 1.0 / seen.ell.shape[1])
    q, nats = bent_around(seen.z, weights)
    for record, told in zip(now.records, nats.tolist(), strict=True):
        record.bent = told > _WORTH
    log_p, unsure = (seen.ell - q.log_prob(seen.z)).mean(1), now.far_too_wide()
    if seen.step is not None and seen.z.shape[1] < now.effort.particles:
        unsure = now.all()  # few that were hurried, or came from afar: no evidence that is to be believed
    near = (nats > _WORTH) & (unsure | (log_p - seen.log_evidence < _LEFT))
    some, others = now.parts(near)
    rest = [] if others is None else [others]
    if some is None:
        return rest, None
    q, log_p, unsure = q.of_fits(near), log_p[near], unsure[near]
    trial = some.pool.tried(q, some.effort.trial)
    near = ~unsure | (log_p - trial.log_z < _LEFT)
    found, others = some.parts(near)
    rest += [] if others is None else [others]
    return rest, None if found is None else (found, q.of_fits(near), trial.of_fits(near))


def _answers(now: Group, q: BentProposal, trial: Trial) -> list[Group]:
    """Regresses, and asks for certificates; gives back what gets none."""
    for record in now.records:
        record.regressed = True
    q, trial, steady = _regressed(now, q, trial)
    q, trial = _completed(now, q, trial)
    if now.alone:
        now.records[0].count_among(trial.z[0], q)
    steadily = steady >= (LITTLE if now.alone else CLEAR)  # few draws tell less: see `mixing._unsteady`
    for name, which in _named(q):
        now.tell(which & ~steadily, lambda i, name=name: f"{name} had {trial.numbers(i)}")
    asked, others = now.parts(steadily)
    rest = [] if others is None else [others]
    if asked is None:
        return rest
    for group, kind in _uncertified(asked, q.of_fits(steadily)):
        # once more with the draws of the certificate, which show more of the ends than the trials did
        again = _of_all_points(group, mixed=group.all() if kind == _MIXTURE else None)
        rest += [left for left, _ in _uncertified(group, again)]
    return rest


def _uncertified(now: Group, q: BentProposal) -> list[tuple[Group, str]]:
    """The fits that q does not answer, by what it was."""
    rest = []
    for name, which in _named(q):
        group = now.only(which)
        left = group.parts(certified(group, name, q.of_fits(which), spare=SPARE, more_to_come=True))[1]
        rest += [] if left is None else [(left, name)]
    return rest


def _completed(now: Group, q: BentProposal, trial: Trial) -> tuple[BentProposal, Trial]:
    """q of a fit alone, refitted to what else there is on its bend, if anything.

    A mode in a funnel's neck is met by no particle, but draws with one entry of u spread wider are.
    """
    if not now.alone or bool((trial.share < LITTLE).any()):
        return q, trial
    u, _ = q.bend.pull(trial.z)
    along = _along_entries(*moments(u, torch.softmax(trial.smooth, 1)))
    bend = replace(q.bend, low=q.bend.low - _FURTHER, high=q.bend.high + _FURTHER)
    lacks = missing_at(now, q, BentProposal(along, bend), trial.log_z, trial)
    if not bool((lacks > FEW).all()):
        return q, trial
    q = _of_all_points(now, mixed=now.all())
    trial = now.pool.draw(q, now.effort.trial)
    _consider(now, q, trial)
    return q, trial


def _along_entries(loc: Tensor, cov: Tensor) -> Mixture:
    """Gaussians of mean (F, 1, d) and covariances (F, d, d), each with another entry spread wider."""
    d = loc.shape[-1]
    stretch = 1.0 + (_WIDER - 1.0) * torch.eye(d).to(loc)
    each = stretch[:, :, None] * cov[:, None] * stretch[:, None]
    return Mixture.of(torch.zeros(len(loc), d).to(loc), loc.expand(-1, d, -1), each)


def _regressed(now: Group, q: BentProposal, trial: Trial) -> tuple[BentProposal, Trial, Tensor]:
    """The best after some rounds, the trials of it, and (F,) how steady that is: see `refine.refined`."""
    _consider(now, q, trial)
    best, best_trial, shares, steady = q, trial, [trial.share], trial.share
    over = _good(trial)
    while len(shares) < _ROUNDS:
        before, highest = shares[-1], torch.stack(shares).amax(0)
        stalled = torch.zeros_like(over)
        if len(shares) >= _EARLY:
            over = over | (highest < _SLOW)
        if len(shares) > 1:
            stalled = ~over & (highest > LITTLE) & (before < _GROWN * torch.stack(shares[:-1]).amax(0))
        if bool(over.all()):
            break
        q = _of_all_points(now, mixed=stalled)
        trial = now.pool.draw(q, now.effort.trial)
        _consider(now, q, trial)
        better = ~over & (trial.share > highest)
        best, best_trial = best.better(q, better), best_trial.better(trial, better)
        last = torch.where(over | stalled, before, trial.share)  # of Gaussians alone
        lower = last.minimum(torch.where(stalled, shares[-2:][0], before))
        steady = torch.where(over, steady, torch.where(_good(trial), last, lower))
        shares.append(last)
        over = over | stalled | _good(trial)
    return best, best_trial, steady


def _good(trial: Trial) -> Tensor:
    return (trial.share > ENOUGH) & (trial.khat < EVEN)


def _of_all_points(now: Group, *, mixed: Tensor | None = None) -> BentProposal:
    """Bent Gaussians, or mixtures for the fits `mixed`, (F,) bool, of all points."""
    points = now.pool.points(now.effort.points, least=_FULL * now.target.dim)
    return bent_around(*points, mixed=mixed)[0]


def _consider(now: Group, q: BentProposal, trial: Trial) -> None:
    for name, which in _named(q):
        now.only(which).consider(name, q.of_fits(which), trial.of_fits(which))


def _named(q: BentProposal) -> list[tuple[str, Tensor]]:
    """What they are called, and which, (F,) bool."""
    count = q.noise.log_weights.isfinite().sum(1)
    mixed = count > 1 + len(defence(q.noise.loc.shape[-1]))
    both = (_MIXTURE, mixed), ("a bent Gaussian", ~mixed)
    return [(name, which) for name, which in both if bool(which.any())]
