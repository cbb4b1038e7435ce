r"""The automatic fit: cheap ways first, dearer ones only where those before them did not do.

    Gaussian    matched to scores from the prior; exact for many posteriors
    bend        a Gaussian bent by regression on what a tempered explorer saw
    mixture     matched, and fitted to what the explorer saw; refitted to weighted draws
    flow        trained by the reverse KL where no mixture fits
    bridge      particles carried from the best q to the posterior, and a mixture fitted to them
    particles   those themselves, flagged

A rung answers if its q passes a certificate on fresh draws (`certificate.verdict`) and two checks that such a
certificate cannot make: that hardly any of the explorer's particles lie where q is much too low, and that the
posterior's own moves do not carry resampled draws away (`explore.drift`). A rung that has passed with few
of its draws to spare is kept, and the next one is tried; the better answers.

Every way works in coordinates z in which the prior is N(0, I), or near it. F posteriors, such as those of F
observations, climb side by side: a rung takes a group of fits and gives back groups that need the next one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from visbi.certificate.report import GOOD
from visbi.certificate.verdict import BROKEN, broken_sentence, certify
from visbi.families.gaussians import Mixture
from visbi.fitting.bending import bent, bent_at_sight
from visbi.fitting.bridge import bridge
from visbi.fitting.budget import BudgetReached
from visbi.fitting.climbing import ALONE, Answer, Effort, Group, Record
from visbi.fitting.flying import fly
from visbi.fitting.looking import PRIOR, look, prior_like
from visbi.fitting.matching import gaussian
from visbi.fitting.mixing import mixture, prior_draws
from visbi.fitting.mixture import defended
from visbi.fitting.particles import settle
from visbi.fitting.pool import Pool, Trial
from visbi.fitting.target import Target
from visbi.fitting.verdicts import SPARE

__all__ = ["Answer", "climb", "climb_together"]

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
            f"{target.n_values} of them (is x of the scale that the potential was trained on? "
            "does a log_prob overflow in single precision?)"
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
        effort: how much to spend; with less than `climbing.ALONE` the climb ends at flows, and answers
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


def _flow(now: Group) -> Sequence[Group]:
    return fly(now, spare=SPARE)


def _bridge(now: Group) -> Sequence[Group]:
    return [one for one in now.singles() if not bridge(one, spare=SPARE)]


def _particles(now: Group) -> Sequence[Group]:
    for one in now.singles():
        settle(one)
    return [now]


_EVERY_RUNG: tuple[Rung, ...] = (look, gaussian, bent, mixture, _flow, _bridge, _particles)
_QUICK_RUNGS: tuple[Rung, ...] = (look, gaussian, bent_at_sight, prior_draws, bent, mixture, _flow)


# -- the end ----------------------------------------------------------------------------------------------

_FEW, _ENOUGH = 2.0, 50.0  # draws of the prior in effect: better than none, than a q that lacks mass
_MUCH = math.log(2.0)  # nats of evidence that it lacks
_NOWHERE = "nowhere"  # the rung of a fit whose potential is finite at no draw of the prior


def _conclude(target: Target, record: Record, reason: str) -> Answer:
    """The best answer, whatever ended the climb."""
    rung, answer = record.answer if record.answer is not None else _unfinished(target, record, reason)
    report = answer.report
    doubts = [broken_sentence(record.broken)] if record.broken > BROKEN else []
    doubts += [f"the fit ended early: {reason}. Give it more."] if reason else []
    if doubts and report.status in GOOD:
        report = certify(answer.ell, answer.log_q, resampled=True, doubts=[" ".join(doubts)])
    elif doubts:
        report = replace(report, sentence=" ".join([*doubts, report.sentence]))
    return replace(
        answer,
        report=replace(report, rung=rung, story=tuple(record.story), stop_reason=reason),
    )


def _unfinished(target: Target, record: Record, reason: str) -> tuple[str, Answer]:
    """From what was drawn so far alone: no rung came as far as a certificate."""
    found, doubt = record.best, "no rung passed."
    looked = _of_the_look(target, record)
    if found is None:
        found = looked
    elif looked is not None and looked[2].n_effective >= _ENOUGH:
        found = looked if record.lacking or looked[2].log_z > found[2].log_z + _MUCH else found
    if found is None:
        q = _one_prior(target)
        z = q.sample(256)
        unknown = torch.full((256,), -torch.inf, dtype=torch.float64, device=z.device)
        answer = Answer(q, z[0], unknown, q.log_prob(z)[0], certify(unknown, q.log_prob(z)[0]))
        if not reason:
            return _NOWHERE, answer
        return PRIOR, replace(answer, report=replace(answer.report, n_nonfinite=0))  # it was not asked
    rung, q, trial = found
    if record.lacking and rung != PRIOR:
        doubt = "mass was seen where q has next to none."
    q = defended(q) if isinstance(q, Mixture) and rung != PRIOR else q
    report = certify(trial.ell[0], trial.log_q[0], resampled=True, doubts=[doubt])
    return rung, Answer(q, trial.z[0], trial.ell[0], trial.log_q[0], report)


def _one_prior(target: Target) -> Mixture:
    return prior_like(target).of_fits(torch.arange(target.fits) == 0)


def _of_the_look(target: Target, record: Record) -> tuple[str, Mixture, Trial] | None:
    """The prior with the draws of the first look, if some of them are in effect."""
    if record.looked is None:
        return None
    q = _one_prior(target)
    z, ell = (part[None] for part in record.looked)
    trial = Trial.of(z, ell, q.log_prob(z))
    return (PRIOR, q, trial) if trial.n_effective >= _FEW else None
