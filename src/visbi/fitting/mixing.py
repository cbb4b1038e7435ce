r"""The rung of mixtures: matched, and fitted to what a tempered explorer saw; refitted to weighted draws.

What a refit did not see it cannot have, and its own weights do not tell. So a certificate's draws, and what
accused q, join the points of further refits; and where refits come out now good, now bad, a flow is asked
before a certificate is, if one may do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.afar import at_summits
from visbi.fitting.climbing import NOTHING, Group
from visbi.fitting.explore import Exploration
from visbi.fitting.flying import fly
from visbi.fitting.mixture import defended, local_covariances, spread_out
from visbi.fitting.pool import UNSOUND, Trial
from visbi.fitting.refine import COMPONENTS, ENOUGH, from_particles, matched, refined, weighed
from visbi.fitting.verdicts import EVEN, SPARE, certified
from visbi.fitting.witnesses import FEW, hidden_in_box, hides, mirrored, missing_at_tops, missing_uphill

__all__ = ["CLEAR", "LITTLE", "matched_from", "mixture", "prior_draws", "refitted"]

CLEAR = 0.5
"""Effective share of a matched q with which nothing else need be tried."""
LITTLE = 0.3
"""Steady share of a refitted one below which a flow is tried first, where one may do. In funnels, where some
mixtures had lost 13 to 26 % of the mass, it was .24 at most; in bananas, which had lost nothing, rarely."""
_CLEARLY = 1.05  # times the merit of matched Gaussians, few and smooth, that anything else must have
_SCANT = 0.05  # of a refitted one, below which no certificate is asked for, and
_THIN = 0.1  # below which a flow comes first, however even its weights are,
_HALF = 0.5  # and below which none is where its weights are unsound and there is one mode
_AGAIN = 2  # refits after a certificate that failed, but one,
_SURE = 0.5  # share of both of two refits, where a flow may do
_SURELY = 0.7  # steady share, among many fits, of mixtures for what is bent
_ENOUGH_SEEN = 10.0  # draws of the prior in effect, for each dimension, from which a mixture can be fitted
_LOST = 0.1  # merit of what particles led to below which they may not have arrived, if they came a long way
_TIMES = 4  # of adding modes, at most
_FEW_DIMENSIONS = 4  # in which mixtures can follow tempered weights from the prior to the posterior


def prior_draws(now: Group) -> Sequence[Group]:
    """A mixture from the prior's draws: in few dimensions, or where enough lie where the posterior does."""
    q, trial = now.pool.proposals[0]
    assert isinstance(q, Mixture)
    few = torch.tensor(now.target.dim <= _FEW_DIMENSIONS, device=trial.share.device)
    seen = few | (trial.share * now.effort.look > _ENOUGH_SEEN * now.target.dim)
    enough, others = now.parts(seen)
    rest = (
        []
        if enough is None
        else _refits(enough, q.of_fits(seen), trial.of_fits(seen).first(now.effort.trial), again=0)
    )
    return [*rest, *([] if others is None else [others])]


def mixture(now: Group) -> Sequence[Group]:
    """Mixtures, matched and from particles, and refitted."""
    if now.seen is None:
        now.explore(now.effort.particles)
    seen = now.seen
    assert seen is not None
    candidates = _candidates(now, seen)
    best = next(candidates)
    trial = now.pool.tried(defended(best), now.effort.trial)
    if bool((trial.share > CLEAR).all()) and bool(hides(now, best, trial.log_z).all()):
        (best, trial), candidates = now.joined(), iter(())
    while bool((trial.merit <= ENOUGH).any()) and (other := next(candidates, None)) is not None:
        fresh = now.pool.tried(defended(other), now.effort.trial)
        best, trial = _better(best, trial, other, fresh)
    sunk = now.far_too_wide() | (trial.log_z > seen.log_evidence + NOTHING)
    if now.alone and now.gradient and bool(((trial.merit < _LOST) & sunk).all()):
        best, trial = _or_summits(now, best, trial)
    now.consider("a mixture", best, trial)
    best, trial = _completed(now, best, trial)
    # what is not refitted has the masses of its modes from here
    best = best.better(weighed(best, trial), trial.merit > ENOUGH)
    if not now.alone:
        return _refits(now, best, trial)
    for i, record in enumerate(now.records):
        record.count_among(seen.z[i], best.of_fits(now.one(i)))
    return _refits(now, best, trial)


def _candidates(now: Group, seen: Exploration) -> Iterator[Mixture]:
    """Mixtures to begin with, the better ones first; each is made when it is asked for."""
    first = now.summit if now.elsewhere is None else now.elsewhere
    known = [q for q in (now.start, first) if q is not None]  # whatever the explorer saw

    def with_known(q: Mixture) -> Mixture:
        return reduce(lambda both, other: both.with_(other, 0.5), known, q)

    if first is not None:
        yield first
    unlike = 0
    if now.gradient:
        even = torch.full(seen.z.shape[:2], 1.0 / seen.z.shape[1]).to(seen.z)
        starts = picked(seen.z, spread_out(seen.z, even, now.effort.starts))
        cov = local_covariances(seen.z, starts, max(4 * now.target.dim, 40))
        q = matched_from(now, starts, cov)
        unlike = q.loc.shape[1]
        yield with_known(q)
    # where almost every start has led to another Gaussian there are more of them than starts
    yield with_known(from_particles(seen, now.effort.points, components=max(COMPONENTS, 2 * unlike)))


def _completed(now: Group, q: Mixture, trial: Trial) -> tuple[Mixture, Trial]:
    """q with modes where it has next to nothing."""
    for turn in range(_TIMES):
        wide = defended(q)
        lacks = mirrored(now, wide, trial.log_z, base=q) > FEW
        if not bool(lacks.all()):
            lacks = missing_at_tops(now, wide, trial.log_z, trial, base=q) > FEW
        if not bool(lacks.all()):
            lacks = hidden_in_box(now, wide, trial.log_z, trial, base=q) > FEW
        if turn and not bool(lacks.all()) and bool((trial.share > CLEAR).all()):
            lacks = hides(now, q, trial.log_z)  # what was added fits closely, and uncovers the next
        if not bool(lacks.all()):
            break
        for record in now.records:
            record.lacking = True
        q, trial = now.joined()
        now.consider("a mixture", q, trial)
    return q, trial


def _better(q: Mixture, trial: Trial, other: Mixture, fresh: Trial) -> tuple[Mixture, Trial]:
    """q, or the other where its merit is clearly higher, or makes nothing of it."""
    more = fresh.log_z - trial.log_z
    higher = (more > NOTHING) | ((more > -NOTHING) & (fresh.merit > _CLEARLY * trial.merit))
    return q.better(other, higher), trial.better(fresh, higher)


def matched_from(now: Group, starts: Tensor, cov: Tensor) -> Mixture:
    """Gaussians matched from starts (F, K, d) with covariances (F, K, d, d), as hard as the effort says."""
    effort = now.effort
    return matched(now.target, starts, cov, batch=effort.start_batch, max_iters=effort.start_iters)


def _refits(now: Group, q: Mixture, trial: Trial, *, again: int = _AGAIN) -> Sequence[Group]:
    """Refits and certificates; what is bent and in one piece is left to a flow first.

    Where nothing is tried `again` no flow is, either: more is to be seen before.
    """
    q, trial, steady = refitted(now, q, trial)
    rest: list[Group] = []
    left = now.for_a_flow() & _unsteady(now, trial, steady)
    nearly = now.for_a_flow() & (steady >= LITTLE) & (steady < CLEAR)
    if now.alone and bool(nearly.any()):
        # the best of some refits, by a trial that flatters it: a certificate and its doubts cost nine trials
        fresh = now.pool.draw(defended(q), now.effort.trial)
        left |= nearly & _unsteady(now, fresh, fresh.share)
    first, others = now.parts(left)
    if others is not None:
        rest += _certified_mixture(others, q.of_fits(~left), trial.of_fits(~left), again=again)
    if first is not None and again == 0:
        rest.append(first)
    elif first is not None:
        q, trial = q.of_fits(left), trial.of_fits(left)
        for group in fly(first, spare=SPARE):
            which = first.where(lambda record, group=group: any(record is each for each in group.records))
            rest += _certified_mixture(group, q.of_fits(which), trial.of_fits(which), again=0)
    return rest


def _unsteady(now: Group, trial: Trial, steady: Tensor) -> Tensor:
    """(F,) where a mixture may lack something that its weights do not tell.

    Even weights of thousands of draws tell, but not of what is bent: of eight hierarchies one mixture lacked
    6 %. So few as a fit among many has do not: there, of twelve funnels in six dimensions, mixtures with a
    steady share of .3 to .5, or with even weights, lacked 5 to 23 %; of 99 in five dimensions, with one of .5
    and more, ten lacked 5 to 12 %, and two of the 56 with .7 and more.
    """
    is_bent = now.where(lambda record: record.bent)
    if not now.alone:
        return steady < torch.where(is_bent, _SURELY, CLEAR)
    return (steady < LITTLE) & (is_bent | ~((trial.khat < EVEN) & (steady > _THIN)))


def refitted(
    now: Group, q: Mixture, trial: Trial, *, rounds: int | None = None
) -> tuple[Mixture, Trial, Tensor]:
    """What `refine.refined` makes of each q, as hard as the effort says; kept where it is the best."""
    q, trial, steady = refined(
        now.pool,
        q,
        trial,
        rounds=now.effort.rounds if rounds is None else rounds,
        n=now.effort.trial,
        points=now.effort.points,
        least=now.effort.least * now.target.dim,
    )
    now.consider("a mixture", q, trial)
    return q, trial, steady


def _certified_mixture(now: Group, q: Mixture, trial: Trial, *, again: int) -> Sequence[Group]:
    """So many times again, with the draws of a failed certificate, and what accused q, among the points."""
    unsound = (trial.khat >= UNSOUND) & (trial.share < _HALF)
    if bool(unsound.any()):  # of several modes, a heavy tail may be one that q lacks
        unsound = unsound & now.where(lambda record: record.modes == 1)
    hopeless = (trial.share < _SCANT) | unsound
    now.tell(hopeless, lambda i: f"a mixture had {trial.numbers(i)}")
    over, others = now.parts(hopeless)
    rest = [] if over is None else [over]
    if others is None:
        return rest
    answered = certified(others, "a mixture", defended(q.of_fits(~hopeless)), spare=SPARE)
    q, trial = q.of_fits(~hopeless).of_fits(~answered), trial.of_fits(~hopeless).of_fits(~answered)
    others = others.parts(answered)[1]
    if others is None or again == 0:
        return [*rest, *([] if others is None else [others])]
    bent = others.for_a_flow()
    if again == _AGAIN:  # what speaks against q beside its weights may be mended by one refit
        bent &= ~others.where(lambda record: record.doubted)
    shaped, others = others.parts(bent)
    if shaped is not None:
        rest += _once_more(shaped, q.of_fits(bent), trial.of_fits(bent), again=again)
    if others is None:
        return rest
    q, trial = _filled(others, q.of_fits(~bent), trial.of_fits(~bent))
    q, trial, _ = refitted(others, q, _forgotten(trial))
    return [*rest, *_certified_mixture(others, q, trial, again=again - 1)]


def _filled(now: Group, q: Mixture, trial: Trial) -> tuple[Mixture, Trial]:
    """q of a single fit with all that points lead to, a few modes at a time, if that spoke against it."""
    if not (now.alone and now.gradient) or not now.records[0].doubted:
        return q, trial
    for _ in range(_TIMES):
        if not bool((missing_uphill(now, defended(q), trial.log_z, trial, base=q) > FEW).all()):
            break
        before = trial.log_z
        q, trial = now.joined()
        if bool(((trial.merit < _LOST) & (trial.log_z > before + NOTHING)).all()):
            q, trial = _or_summits(now, q, trial)
    return q, trial


def _or_summits(now: Group, q: Mixture, trial: Trial) -> tuple[Mixture, Trial]:
    """q, or what is matched at the ends of ascents, where that is better."""
    now.summit = at_summits(now)
    return _better(q, trial, now.summit, now.pool.tried(defended(now.summit), now.effort.trial))


def _once_more(now: Group, q: Mixture, trial: Trial, *, again: int) -> list[Group]:
    """One refit of what fails by its weights alone: it may lack no more than a tail that has been seen now.

    If that does not do, it is no matter of modes, and the next rung may have the shape.
    """
    if again < _AGAIN:
        return [now]
    q, trial, steady = refitted(now, q, _forgotten(trial), rounds=1)
    if bool((steady >= _SURE).any()):
        q, trial, steady = refitted(now, q, trial, rounds=1)
    sure = steady >= _SURE
    better, over = now.parts(sure)
    rest = [] if over is None else [over]
    if better is not None:
        rest += _certified_mixture(better, q.of_fits(sure), trial.of_fits(sure), again=0)
    return rest


def _forgotten(trial: Trial) -> Trial:
    """Of a q whose share is no measure any more: it has not seen what the certificate or the explorer has."""
    return replace(trial, share=torch.zeros_like(trial.share))
