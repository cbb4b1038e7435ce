"""The rung of the Gaussian: matched from the prior, and an answer where nothing speaks for more than that.

Where the prior is far too wide Gaussians are matched at summits (`afar`), one for each that is unlike the
others: they answer regressions on raw predictors, and of equal modes, such as labels that can be exchanged,
particles that came a long way may have kept one.

None is matched where enough of the prior's draws lie in the posterior to tell that none fits: the effective
share of draws of q is 1 / E_p[p / q], at most exp(-KL(p | q)), and no Gaussian has a lower KL(p | q) than the
one with p's mean and covariance.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visbi.certificate.rows import effective_sample_size
from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.afar import at_summits
from visbi.fitting.climbing import SEEN, Group
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixing import CLEAR, LITTLE, matched_from, refitted
from visbi.fitting.mixture import defended, moments, spread_out
from visbi.fitting.pool import BELIEVED, Trial
from visbi.fitting.target import log_standard_normal
from visbi.fitting.verdicts import EVEN, SPARE, certified
from visbi.fitting.weighing import missing_at
from visbi.fitting.witnesses import FEW, hidden_in_box, hides, mirrored, missing

__all__ = ["gaussian"]

_NEARLY = 0.25  # effective share of a Gaussian from which refits of it are tried before anything else
_WIDE = 20  # dimensions beyond which the explorer is not sent after a Gaussian that passes


def gaussian(now: Group) -> Sequence[Group]:
    """Match a Gaussian to each fit and certify it; give back the fits that it does not answer."""
    most = _most_in_effect(now)
    too_few = most < _NEARLY
    now.tell(too_few, lambda i: f"no Gaussian can have more than {float(most[i]):.2f} of its draws in effect")
    if not now.gradient or bool(too_few.all()):
        _try_start(now)
        return [now]
    fits, d = now.target.fits, now.target.dim
    loc = torch.zeros(fits, d, dtype=torch.float64, device=now.target.device)
    batch = None if now.effort.first_batch is None else max(now.effort.first_batch, 2 * d)
    match = match_gaussian(now.target, loc, torch.eye(d).to(loc).expand(fits, d, d), batch=batch)
    q = Mixture.of(torch.zeros_like(loc[:, :1]), match.loc[:, None], match.cov[:, None])
    trial = now.pool.tried(defended(q), now.effort.trial)
    now.consider(_name(q), q, trial)
    wide = now.far_too_wide()
    far, others = now.parts(wide)
    rest = [] if others is None else _tried(others, q.of_fits(~wide), trial.of_fits(~wide))
    return rest if far is None else [*rest, *_from_afar(far)]


def _most_in_effect(now: Group) -> Tensor:
    """(F,) bound of the effective share of any Gaussian; 1 where the prior's draws do not tell."""
    unknown = torch.ones(len(now.records), **now.like)  # type: ignore[arg-type]
    if not now.n_prior:
        return unknown
    log_w, z = now.of_prior(), now.searched[:, : now.n_prior]
    if bool((effective_sample_size(log_w) < SEEN).any()):
        return unknown
    weights = torch.softmax(log_w, 1)
    _, cov = moments(z, weights)
    log_p = torch.log(weights * weights.shape[1]) + log_standard_normal(z)
    negative_entropy = torch.where(weights > 0, weights * log_p, 0.0).sum(1)
    entropy_of_gaussian = 0.5 * (torch.logdet(cov) + z.shape[-1] * math.log(2 * math.pi * math.e))
    return (-negative_entropy - entropy_of_gaussian).exp()


def _from_afar(now: Group) -> list[Group]:
    """The same from summits: where the prior is far too wide, matching from it mostly runs away."""
    q = now.summit = at_summits(now)
    trial = now.pool.tried(defended(q), now.effort.trial)
    now.consider(_name(q), q, trial)
    return _tried(now, q, trial)


def _tried(now: Group, q: Mixture, trial: Trial) -> list[Group]:
    """Certify each q that fits, or nearly does; what it does not answer."""
    clear = (trial.share > CLEAR) & (trial.khat < EVEN)
    near = clear | ((trial.share > _NEARLY) & (trial.khat < BELIEVED) & (now.target.dim <= _WIDE))
    now.tell(~clear, lambda i: f"{_name(q)} had {trial.numbers(i)}")
    _try_start(now)
    alone, others = now.parts(near)
    rest = [] if others is None else [others]
    if alone is not None:
        rest += _only_a_gaussian(alone, q.of_fits(near), trial.of_fits(near), clear=clear[near])
    return rest


def _name(q: Mixture) -> str:
    return "a Gaussian" if q.loc.shape[1] == 1 else "a mixture"


def _try_start(now: Group) -> None:
    if now.start is not None:
        now.consider("the start", now.start, now.pool.draw(defended(now.start), now.effort.trial))


def _only_a_gaussian(now: Group, q: Mixture, trial: Trial, *, clear: Tensor) -> Sequence[Group]:
    """Gaussians that fit where they are, the `clear` ones; those that only nearly do are refitted first."""
    if now.target.dim <= _WIDE and (n := now.effort.confirming):
        # from far off they come by many temperatures, and are worse witnesses than ascents
        now.explore(n // 2 if bool(now.far_too_wide().all()) else n, moves=1)
    good, nearly = now.parts(clear)
    rest = [] if good is None else _unless_more(good, _name(q), q.of_fits(clear), spare=CLEAR)
    if nearly is None:
        return rest
    q, _, steady = refitted(nearly, q.of_fits(~clear), trial.of_fits(~clear))
    over, others = nearly.parts(steady < LITTLE)
    rest += [] if over is None else [over]
    if others is not None:
        rest += _unless_more(others, "a mixture", q.of_fits(steady >= LITTLE), spare=SPARE)
    return rest


def _unless_more(now: Group, rung: str, q: Mixture, *, spare: float) -> list[Group]:
    """Certify q of what may be one mode, unless mass shows elsewhere; those that have no answer then."""
    wide, log_z = defended(q), now.log_z()
    missed = ~now.all()
    if now.start is not None:
        missed = missing_at(now, wide, defended(now.start), log_z) > FEW
    if not bool(missed.all()):
        missed = missed | (mirrored(now, wide, log_z, base=q) > FEW)
    if not bool(missed.all()):
        missed = missed | (missing(now, wide, log_z, enough=FEW) > FEW)
    if not bool(missed.all()):
        missed = missed | hides(now, q, log_z)
    if not bool(missed.all()):
        missed = missed | (hidden_in_box(now, wide, log_z, base=q) > FEW)
    if not bool(missed.all()):
        missed = missed | (missing_at(now, wide, defended(_other_gaussians(now)), log_z) > FEW)
    now.tell(missed, f"{rung} missed other modes")
    for record, lacking in zip(now.records, missed.tolist(), strict=True):
        record.lacking |= lacking
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
    return matched_from(now, starts, eye.expand(*starts.shape, -1))
