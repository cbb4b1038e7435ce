r"""The automatic fit: cheap ways first, dearer ones only where those before them did not do.

    Gaussian    matched to scores from the prior; exact for many posteriors
    mixture     matched, and fitted to what a tempered explorer saw; refitted to weighted draws
    flow        trained by the reverse KL where no mixture fits
    bridge      particles carried from the best q to the posterior, and a mixture fitted to them
    particles   those themselves, flagged

A rung answers if its q passes a certificate on fresh draws (`certificate.report`) and two checks that such a
certificate cannot make: that hardly any of the explorer's particles lie where q is much too low, and that the
posterior's own moves do not carry resampled draws away (`explore.drift`). A rung that has passed with few
of its draws to spare is kept, and the next one is tried; the better answers.

Every way works in coordinates z in which the prior is N(0, I), or near it. F posteriors, such as those of F
observations, climb side by side: a rung takes a group of fits and gives back groups that need the next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from visbi.certificate.modes import find_modes
from visbi.certificate.report import BROKEN, broken_sentence, certify
from visbi.core.rows import picked, trues_first
from visbi.families.gaussians import Mixture
from visbi.fitting.bridge import bridge
from visbi.fitting.budget import BudgetReached
from visbi.fitting.climbing import ALONE, SEARCHED, Answer, Effort, Group, Record
from visbi.fitting.flying import fly
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import defended, local_covariances, spread_out
from visbi.fitting.particles import settle
from visbi.fitting.pool import BELIEVED, UNSOUND, Pool, Trial
from visbi.fitting.probe import useful_gradient
from visbi.fitting.refine import from_particles, matched, refined
from visbi.fitting.target import Target, is_usable
from visbi.fitting.verdicts import EVEN, certified
from visbi.fitting.witnesses import FEW, hides, missing, missing_at

__all__ = ["Answer", "climb", "climb_together"]

_SPARE = 0.2  # effective share of draws with which a rung's answer is final
_CLEAR, _CLEAR_KHAT = 0.5, 0.5  # with which the Gaussian's is, and no mixture need be tried
_NEARLY = 0.25  # of a Gaussian from which refits of it are tried before anything else
_LEAST_SHARE = 1e-9  # of the prior beyond the outermost draw, in each dimension
_ROOM = 8  # times the draws of the search: a budget that leaves less is not spent on it
_INMOST = 0.03  # of how far it is from the prior's middle, to which a draw is moved at most
_LOOKED_AT = 512  # promising draws of the prior
_WIDE = 20  # dimensions beyond which the explorer is not sent after a Gaussian that passes
_ENOUGH_SEEN = 10.0  # draws of the prior in effect, for each dimension, from which a mixture can be fitted
_AGAIN = 2  # refits after a certificate that failed, but one,
_FEW_ROUNDS, _SURE = 2, 0.5  # of so few rounds and with such a steady share, where a flow may do
_FEW_DIMENSIONS = 4  # in which mixtures can follow tempered weights from the prior to the posterior
_SCANT = 0.05  # of a refitted one, below which no certificate is asked for, and
_HALF = 0.5  # below which none is where its weights are unsound and there is one mode
_LITTLE = 0.3
"""Steady share of a refitted one below which a flow is tried first, where one may do. In funnels, where some
mixtures had lost 13 to 26 % of the mass, it was .24 at most; in bananas, which had lost nothing, rarely."""


Rung = Callable[[Group], Sequence[Group]]
"""Takes fits that have no answer yet; gives back those that still have none."""


def climb(
    target: Target, *, start: Mixture | None = None, say: Callable[[str], None] = lambda _: None
) -> Answer:
    """Find q for one target, as far up the ladder as it takes.

    Args:
        target: with its budget; reaching it ends the climb with the best so far.
        start: an earlier q, or draws' moments, to begin with beside the usual starts.
        say: told what is being done.

    Raises:
        ValueError: the potential is finite at no draw of the prior.

    >>> import math
    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(lambda theta: 3 - 50 * theta.square().sum(-1), coordinates(prior))
    >>> report = climb(target).report
    >>> report.rung, report.status, report.log_evidence - 3 - math.log(2 * math.pi / 100)
    ('a Gaussian', 'ok', 0.00)
    """
    answer = climb_together(target, start=start, say=say)[0]
    if answer.report.rung == _NOWHERE:
        raise ValueError(
            "`potential_fn`: expected finite values at draws of the prior; got none at "
            f"{ALONE.look} of them (is x of the scale that the potential was trained on?)"
        )
    return answer


def climb_together(
    target: Target,
    *,
    start: Mixture | None = None,
    effort: Effort = ALONE,
    say: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Find q for each of a target's F potentials.

    Args:
        target: with its budget, of each fit; reaching it ends the climb with the best so far.
        start: F mixtures to begin with beside the usual starts.
        effort: how much to spend; with less than `climbing.ALONE` the climb ends at mixtures, and answers
            that are not good enough are to be sought alone.
        say: told what is being done.
    """
    records = [Record() for _ in range(target.fits)]
    rungs = _EVERY_RUNG if effort == ALONE else _QUICK_RUNGS
    groups = [Group(target, records, effort, Pool(target), start)]
    reason = ""
    try:
        for rung in rungs:
            if not groups:
                break
            say(rung.__name__.strip("_"))
            groups = [rest for group in groups for rest in rung(group)]
    except BudgetReached as reached:
        reason = str(reached)
    except KeyboardInterrupt:
        reason = "interrupted"
    return [_conclude(target, record, reason) for record in records]


# -- the rungs --------------------------------------------------------------------------------------------


def _look(now: Group) -> Sequence[Group]:
    """What the prior's draws say about the potential."""
    n, d = now.effort.look, now.target.dim
    if now.effort.keep_look:
        trial = now.pool.draw(_prior_like(now.target), n)
        now.consider(_PRIOR, _prior_like(now.target), trial)
        z, ell = trial.z, trial.ell
        usable = torch.isfinite(ell)
    else:
        more = now.effort.search if d <= SEARCHED else now.effort.inward
        more = more if now.target.budget.left > _ROOM * more else 0
        z = _evenly_drawn(now.target, n + more)
        if d > SEARCHED:
            z[:, n:] *= _INMOST ** torch.rand_like(z[:, n:, :1])
        ell = now.target.value(z)
        usable = is_usable(ell)
        if more:
            now.searched, now.found = z, torch.where(usable, ell, -torch.inf)
            now.n_prior = n + more if d <= SEARCHED else n
        z, ell, usable = z[:, :n], ell[:, :n], usable[:, :n]
    ell = torch.where(usable, ell, -torch.inf)
    somewhere = usable.any(1)
    for record, there in zip(now.records, somewhere.tolist(), strict=True):
        if not there:
            record.best = None
    if not bool(somewhere.any()):
        return []
    top = ell.topk(min(16, n), 1).indices
    some = trues_first(usable)[:, :32]
    now.gradient = useful_gradient(now.target, picked(z, torch.cat([top, some], 1)))
    if not now.gradient:
        now.tell(now.all(), "the potential has no useful gradient")
    promising = (ell + 0.5 * z.square().sum(-1)).topk(min(_LOOKED_AT, n), 1).indices
    now.starts, now.usable = picked(z, promising), usable.gather(1, promising)
    return [now.only(somewhere)]


def _gaussian(now: Group) -> Sequence[Group]:
    if not now.gradient:
        _try_start(now)
        return [now]
    fits, d = now.target.fits, now.target.dim
    loc = torch.zeros(fits, d, dtype=torch.float64, device=now.target.device)
    batch = None if now.effort.first_batch is None else max(now.effort.first_batch, 2 * d)
    match = match_gaussian(now.target, loc, torch.eye(d).to(loc).expand(fits, d, d), batch=batch)
    q = Mixture.of(torch.zeros_like(loc[:, :1]), match.loc[:, None], match.cov[:, None])
    trial = now.pool.tried(defended(q), now.effort.trial)
    now.consider("a Gaussian", q, trial)
    clear = (trial.share > _CLEAR) & (trial.khat < _CLEAR_KHAT)
    near = clear | ((trial.share > _NEARLY) & (trial.khat < BELIEVED) & (d <= _WIDE))
    now.tell(~clear, lambda i: f"a Gaussian had {trial.numbers(i)}")
    _try_start(now)
    alone, others = now.parts(near)
    rest = (
        []
        if alone is None
        else _only_a_gaussian(alone, q.of_fits(near), trial.of_fits(near), clear=clear[near])
    )
    return [*rest, *([] if others is None else [others])]


def _try_start(now: Group) -> None:
    if now.start is not None:
        now.consider("the start", now.start, now.pool.draw(defended(now.start), now.effort.trial))


def _only_a_gaussian(now: Group, q: Mixture, trial: Trial, *, clear: Tensor) -> Sequence[Group]:
    """Gaussians that fit where they are, the `clear` ones; those that only nearly do are refitted first."""
    if now.target.dim <= _WIDE and now.effort.confirming:
        now.explore(now.effort.confirming, moves=1)
    good, nearly = now.parts(clear)
    rest = [] if good is None else _unless_more(good, "a Gaussian", q.of_fits(clear), spare=_CLEAR)
    if nearly is None:
        return rest
    q, _, steady = _refitted(nearly, q.of_fits(~clear), trial.of_fits(~clear))
    over, others = nearly.parts(steady < _LITTLE)
    rest += [] if over is None else [over]
    if others is not None:
        rest += _unless_more(others, "a mixture", q.of_fits(steady >= _LITTLE), spare=_SPARE)
    return rest


def _unless_more(now: Group, rung: str, q: Mixture, *, spare: float) -> list[Group]:
    """Certify q of what may be one mode, unless mass shows elsewhere; those that have no answer then."""
    wide, log_z = defended(q), now.log_z()
    missed = ~now.all()
    if now.start is not None:
        missed = missing_at(now, wide, defended(now.start), log_z) > FEW
    if not bool(missed.all()):
        missed = missed | (missing(now, wide, log_z, enough=FEW) > FEW)
    if not bool(missed.all()):
        missed = missed | hides(now, q, log_z)
    if not bool(missed.all()):
        missed = missed | (missing_at(now, wide, defended(_other_gaussians(now)), log_z) > FEW)
    now.tell(missed, f"{rung} missed other modes")
    rest, alone = now.parts(missed)
    found = [] if rest is None else [rest]
    if alone is not None:
        answered = certified(alone, rung, wide.of_fits(~missed), spare=spare)
        found += [] if bool(answered.all()) else [alone.only(~answered)]
    return found


def _other_gaussians(now: Group) -> Mixture:
    """Gaussians matched from the most promising of the prior's draws."""
    even = now.usable.double() / now.usable.sum(1, keepdim=True)
    starts = picked(now.starts, spread_out(now.starts, even, now.effort.starts))
    eye = 0.09 * torch.eye(now.target.dim).to(starts)
    return _matched(now, starts, eye.expand(*starts.shape, -1))


def _matched(now: Group, starts: Tensor, cov: Tensor) -> Mixture:
    effort = now.effort
    return matched(now.target, starts, cov, batch=effort.start_batch, max_iters=effort.start_iters)


def _prior_draws(now: Group) -> Sequence[Group]:
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


def _mixture(now: Group) -> Sequence[Group]:
    """Mixtures, matched and from particles, and refitted."""
    if now.seen is None:
        now.explore(now.effort.particles)
    seen = now.seen
    assert seen is not None
    z = seen.z
    found: list[Mixture] = []
    if now.gradient:
        even = torch.full(z.shape[:2], 1.0 / z.shape[1]).to(z)
        starts = picked(z, spread_out(z, even, now.effort.starts))
        found.append(_matched(now, starts, local_covariances(z, starts, max(4 * now.target.dim, 40))))
    found.append(from_particles(seen, now.effort.points))
    if now.start is not None:  # what the user knows of, whatever the explorer saw
        found = [q.with_(now.start, 0.5) for q in found]
    if now.elsewhere is not None:  # likewise, what the last q lacked
        found = [now.elsewhere, *(q.with_(now.elsewhere, 0.5) for q in found)]
    best, trial = found[0], now.pool.tried(defended(found[0]), now.effort.trial)
    if bool((trial.share > _CLEAR).all()) and bool(hides(now, best, trial.log_z).all()):
        assert now.elsewhere is not None
        found = [now.elsewhere]
        best, trial = found[0], now.pool.draw(defended(found[0]), now.effort.trial)
    for other in found[1:]:
        fresh = now.pool.tried(defended(other), now.effort.trial)
        higher = fresh.merit > trial.merit
        best, trial = best.better(other, higher), trial.better(fresh, higher)
    now.consider("a mixture", best, trial)
    if not now.alone:
        return _refits(now, best, trial)
    for i, record in enumerate(now.records):
        one = best.of_fits(now.one(i))
        record.count_modes = partial(_modes_among, z[i], one)
    return _refits(now, best, trial)


def _modes_among(z: Tensor, q: Mixture) -> int:
    return len(find_modes(z, lambda z: q.log_prob(z[None])[0]))


def _refits(now: Group, q: Mixture, trial: Trial, *, again: int = _AGAIN) -> Sequence[Group]:
    """Refits and certificates; what is bent and in one piece is left to a flow first."""
    q, trial, steady = _refitted(now, q, trial)
    rest: list[Group] = []
    left = now.for_a_flow() & (steady < _LITTLE) & ~((trial.khat < EVEN) & (steady > _SCANT))
    first, others = now.parts(left)
    if others is not None:
        rest += _certified_mixture(others, q.of_fits(~left), trial.of_fits(~left), again=again)
    if first is not None:
        q, trial = q.of_fits(left), trial.of_fits(left)
        for group in _flow(first):
            which = first.where(lambda record, group=group: any(record is each for each in group.records))
            rest += _certified_mixture(group, q.of_fits(which), trial.of_fits(which), again=0)
    return rest


def _refitted(
    now: Group, q: Mixture, trial: Trial, *, rounds: int | None = None
) -> tuple[Mixture, Trial, Tensor]:
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
    answered = certified(others, "a mixture", defended(q.of_fits(~hopeless)), spare=_SPARE)
    q, trial = q.of_fits(~hopeless).of_fits(~answered), trial.of_fits(~hopeless).of_fits(~answered)
    others = others.parts(answered)[1]
    if others is None or again == 0:
        return [*rest, *([] if others is None else [others])]
    bent = others.for_a_flow() & ~others.where(lambda record: record.doubted)
    shaped, others = others.parts(bent)
    if shaped is not None:
        rest += _once_more(shaped, q.of_fits(bent), trial.of_fits(bent), again=again)
    if others is None:
        return rest
    q, trial, _ = _refitted(others, q.of_fits(~bent), _forgotten(trial.of_fits(~bent)))
    return [*rest, *_certified_mixture(others, q, trial, again=again - 1)]


def _once_more(now: Group, q: Mixture, trial: Trial, *, again: int) -> list[Group]:
    """One refit of what fails by its weights alone: it may lack no more than a tail that has been seen now.

    If that does not do, it is no matter of modes, and the next rung may have the shape.
    """
    if again < _AGAIN:
        return [now]
    q, trial, steady = _refitted(now, q, _forgotten(trial), rounds=_FEW_ROUNDS)
    sure = steady >= _SURE
    better, over = now.parts(sure)
    rest = [] if over is None else [over]
    if better is not None:
        rest += _certified_mixture(better, q.of_fits(sure), trial.of_fits(sure), again=0)
    return rest


def _forgotten(trial: Trial) -> Trial:
    """Of a q whose share is no measure any more: it has not seen what the certificate or the explorer has."""
    return replace(trial, share=torch.zeros_like(trial.share))


def _flow(now: Group) -> Sequence[Group]:
    return fly(now, spare=_SPARE)


def _bridge(now: Group) -> Sequence[Group]:
    return [one for one in now.singles() if not bridge(one, spare=_SPARE)]


def _particles(now: Group) -> Sequence[Group]:
    for one in now.singles():
        settle(one)
    return [now]


_EVERY_RUNG: tuple[Rung, ...] = (_look, _gaussian, _mixture, _flow, _bridge, _particles)
_QUICK_RUNGS: tuple[Rung, ...] = (_look, _gaussian, _prior_draws, _mixture)


# -- the end ----------------------------------------------------------------------------------------------

_NOWHERE = "nowhere"  # the rung of a fit whose potential is finite at no draw of the prior
_PRIOR = "the prior"


def _conclude(target: Target, record: Record, reason: str) -> Answer:
    """The best answer, whatever ended the climb."""
    rung, answer = record.answer if record.answer is not None else _unfinished(target, record, reason)
    report = answer.report
    doubts = [broken_sentence(record.broken)] if record.broken > BROKEN else []
    doubts += [f"the fit ended early: {reason}. Give it more."] if reason else []
    if doubts and report.status in ("ok", "corrected"):
        report = certify(answer.ell, answer.log_q, resampled=True, doubts=doubts)
    elif doubts and record.best is None:
        report = replace(report, sentence=doubts[0])
    return replace(
        answer,
        report=replace(report, rung=rung, story=tuple(record.story), stop_reason=reason),
    )


def _unfinished(target: Target, record: Record, reason: str) -> tuple[str, Answer]:
    """From the trials alone: no rung came as far as a certificate."""
    if record.best is None:
        q = _prior_like(target).of_fits(torch.arange(target.fits) == 0)
        z = q.sample(256)
        unknown = torch.full((256,), -torch.inf, dtype=torch.float64, device=z.device)
        answer = Answer(q, z[0], unknown, q.log_prob(z)[0], certify(unknown, q.log_prob(z)[0]))
        return _PRIOR if reason else _NOWHERE, answer
    rung, q, trial = record.best
    q = defended(q) if isinstance(q, Mixture) else q
    report = certify(trial.ell[0], trial.log_q[0], resampled=True, doubts=["no rung passed."])
    return rung, Answer(q, trial.z[0], trial.ell[0], trial.log_q[0], report)


def _evenly_drawn(target: Target, n: int) -> Tensor:
    """(F, n, d) draws of N(0, I) by scrambled Sobol sequences: smaller gaps than independent ones."""
    seeds = torch.randint(2**31, (target.fits,)).tolist()
    u = [SobolEngine(target.dim, scramble=True, seed=seed).draw(n, dtype=torch.float64) for seed in seeds]
    return torch.special.ndtri(torch.stack(u).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)).to(target.device)


def _prior_like(target: Target) -> Mixture:
    """N(0, I) for each of the target's potentials."""
    d = target.dim
    loc = torch.zeros(target.fits, 1, d, dtype=torch.float64, device=target.device)
    return Mixture.of(torch.zeros_like(loc[..., 0]), loc, torch.eye(d).to(loc).expand(*loc.shape, d))
