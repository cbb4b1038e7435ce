r"""What speaks against a q beside its own weights, which know nothing of where none of its draws came.

Witnesses are the explorer's particles, the searched draws of the prior, and the points of all proposals: is q
much too low where they are, or where they lead uphill? (`missing`, `missing_of_points`); where ascents from
particles of all temperatures end (`missing_at_tops`); what a closely matched q leaves unexplained (`hides`),
in a box in theta itself (`hidden_in_box`), or Gaussians matched where another q's draws are (`unexplained`);
images of q's own draws, where labels can be exchanged or signs turned (`mirrored`); and resampled draws,
which the posterior's own moves should leave as they are (in `doubts`). Points are no proof of mass. So
wherever some accuse q, a mixture is put there and drawn from, and what its draws weigh beyond what q's own
draws find there is what q is missing (`weighing`).
"""

import math

import torch
from torch import Tensor

from visbi.certificate.weights import resample
from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.afar import at_small_scales, at_summits
from visbi.fitting.boxes import in_boxes
from visbi.fitting.budget import BudgetReached
from visbi.fitting.climbing import SEARCHED, Group
from visbi.fitting.drift import drift
from visbi.fitting.frontier import outermost, walk
from visbi.fitting.hidden import beyond, with_hidden
from visbi.fitting.lines import along_axes
from visbi.fitting.mixture import defended, local_covariances, spread_out
from visbi.fitting.pool import Proposal, Trial, thinned
from visbi.fitting.refine import around, matched
from visbi.fitting.summits import above
from visbi.fitting.symmetry import completed, symmetries
from visbi.fitting.uphill import starts_at, too_low, tops
from visbi.fitting.weighing import LOW, MISSING, missing_at

__all__ = [
    "FEW",
    "doubts",
    "hidden_in_box",
    "hides",
    "mirrored",
    "missing",
    "missing_at_tops",
    "missing_of_points",
    "missing_uphill",
    "unexplained",
]

FEW = 5e-3
"""Share of the mass that may lie where q is much too low."""
_ACCUSERS = 2  # particles; a mode of a few percent may have lost all but so many of its own on the way
_WITNESSES = 20  # points in effect; fewer may be a tail's chance
_LEFT = 1e-6  # of the mass, to q, however little it has beside what it lacks
_BELOW, _BELOW_EACH = 3.0, 0.2  # nats that particles' evidence may lack, and more for each dimension
_RESAMPLED, _STARTS = 1024, 8  # draws of q, and Gaussians matched at some of them
_DRIFT = 5.0  # standard errors
_DIMENSIONS = 4  # from which draws of the prior that are searched may lead to few of many modes
_ASCENTS, _STEPS = 128, 10  # from particles of all temperatures, and steps of each,
_SPREAD = 4096  # spread out among so many
_EACH, _IN_A_BOX = 100, 16_384  # evaluations: of an ascent, and of a search in a box
_ROOM = 4  # times these that a budget must leave
_PROBED, _MAPPED = 4, 512  # draws of q that tell symmetries, and that are mapped by each of them
_KNOWN, _ON_A_LINE = 2, 512  # draws of q through which lines go, and points on each of these
_TAILED = 0.2  # k-hat from which weights have a tail
_ROUNDS_WITHOUT = 3  # of drift where they have none
_OF_Q = 4096  # weighted draws that show where it ends
_WALKERS, _ROUNDS = 128, 8  # chains from there
_SCALES = 2  # positive parameters, from which all of them may be small together
_MAPS = 4096  # evaluations of a search for symmetries


def doubts(now: Group, q: Proposal, trial: Trial) -> list[list[str]]:
    """What speaks against each q beside its weights."""
    share = missing(now, q, trial.log_z, trial=trial)
    share = torch.maximum(share, missing_of_points(now, q, trial))
    share = torch.maximum(share, mirrored(now, q, trial.log_z))
    if not bool((share > MISSING).all()):
        share = torch.maximum(share, missing_at_ends(now, q, trial))
    if not bool((share > MISSING).all()):
        share = torch.maximum(share, unexplained(now, q, trial))
    found: list[list[str]] = [
        [
            f"an independent exploration has seen about {100 * each / (1 + each):.1f} % of the "
            "posterior's mass where q has next to none. Run MCMC to be sure."
        ]
        if each > MISSING
        else []
        for each in share.tolist()
    ]
    if bool((share > MISSING).all()):
        return found
    within = q.cov_within if isinstance(q, Mixture) else None
    try:
        z = _resampled(trial, now.effort.drifters)
        moved = drift(
            now.target,
            z,
            q.log_prob,
            gradient=now.gradient,
            rounds=now.effort.drift_rounds if bool((trial.khat > _TAILED).any()) else _ROUNDS_WITHOUT,
            step=None if now.seen is None or within is not None else now.seen.step,
            cov=within,
        ).tolist()
    except BudgetReached:
        left = "the budget left no room to check that resampled draws stay where they are."
        return [[*each, left] for each in found]
    carried = (
        "the posterior's own moves carry resampled draws to where q is too low: mass next to them is "
        "missing. Run MCMC to be sure."
    )
    return [[*each, carried] if by > _DRIFT else each for each, by in zip(found, moved, strict=True)]


def missing(
    now: Group, q: Proposal, log_z: Tensor, *, trial: Trial | None = None, enough: float = math.inf
) -> Tensor:
    """(F,) share of the posterior's mass where the explorer's particles, or the look's draws where there
    are none, and the searched draws of the prior say that q is much too low.

    Points alone are no proof: where an explorer mixes badly they sit where hardly any mass is. So a
    mixture fitted to those that accuse q is drawn from, and Gaussians matched at the tops to which they
    lead, and the mass there is weighed, less what the draws of q in `trial` find there. Where the first
    has found more than `enough` of every fit it is left at that.
    """
    share = torch.zeros_like(log_z)
    seen = now.independent()
    if seen is not None:
        share = _missing_near(now, *seen, q, log_z, trial)
    if now.summit is None and now.alone and now.gradient and _sunk(now, log_z):
        now.summit = at_summits(now)
    if now.summit is not None:
        there = missing_at(now, q, defended(now.summit), log_z, trial)
        if now.alone and isinstance(q, Mixture) and bool((there > FEW).all()):
            now.elsewhere = _with_more(q, now.summit, there)
        share = torch.maximum(share, there)
    if not bool((share > enough).all()):
        share = torch.maximum(share, missing_at_tops(now, q, log_z, trial))
    if bool((share > enough).all()):
        return share
    if now.gradient and now.alone:
        share = torch.maximum(share, missing_uphill(now, q, log_z, trial))
    elif len(now.searched):
        share = torch.maximum(share, _missing_near(now, now.searched, now.found, q, log_z, trial))
    return share


def _missing_near(
    now: Group, z: Tensor, ell: Tensor, q: Proposal, log_z: Tensor, trial: Trial | None
) -> Tensor:
    """(F,) mass around those of the points z (F, N, d) that say q is much too low."""
    share = torch.zeros_like(log_z)
    low = too_low(q, z, ell - log_z[:, None] - LOW)
    accused = low.sum(1) >= _ACCUSERS
    if bool(accused.any()):
        local = defended(around(z[accused], low[accused].double()))
        trial = None if trial is None else trial.of_fits(accused)
        share[accused] = missing_at(now.only(accused), q.of_fits(accused), local, log_z[accused], trial)
    return share


def missing_uphill(
    now: Group, q: Proposal, log_z: Tensor, trial: Trial | None, *, base: Mixture | None = None
) -> Tensor:
    """(F,) mass at the tops to which points lead, of whatever proposal: see `uphill`.

    Points on lines through draws of q are among them (`lines`). What is found is added to `base`, or to q.
    A certificate's own draws are, too: of a needle beside a haystack few draws tell, each of great
    weight, and what they say of the mass is no measure (`missing_of_points`).
    """
    z, ell = now.points(_accusing(now, q, log_z))
    few = now.alone and now.target.dim <= SEARCHED
    if trial is not None and few and now.target.budget.left > _ROOM * _KNOWN * now.target.dim * _ON_A_LINE:
        line = along_axes(_resampled(trial, _KNOWN), _ON_A_LINE)
        z, ell = torch.cat([z, line], 1), torch.cat([ell, now.target.value(line)], 1)
    local, there = tops(now.target, z, ell, q, log_z, by=LOW)
    if not bool(there.any()):
        return torch.zeros_like(log_z)
    return _weighed_there(now, q, local, there, log_z, trial, base)


def missing_at_tops(
    now: Group, q: Proposal, log_z: Tensor, trial: Trial | None = None, *, base: Mixture | None = None
) -> Tensor:
    """(F,) mass at the ends of ascents from particles of all temperatures, and from small scales.

    Of ten narrow modes in ten dimensions a thousand particles lose one, or several, on their way. Before the
    last temperatures they still are all over the place, and an ascent from there costs a hundred
    evaluations; one that ends in a mode that q lacks accuses it. In few dimensions draws of the prior that
    are searched do. What is found is added to `base`, or to q.
    """
    share = torch.zeros_like(log_z)
    if not (now.alone and now.gradient) or now.target.budget.left < _ROOM * _ASCENTS * _EACH:
        return share
    if now.target.fits == 1 and sum(now.target.scales()) >= _SCALES:
        share = _missing_at_small_scales(now, q, log_z, trial, base)
    if now.seen is None or now.seen.step is None or now.target.dim < _DIMENSIONS or bool((share > FEW).all()):
        return share
    if now.tops is None:
        z = now.seen.history_z.movedim(0, 1).flatten(1, 2)
        z = z[:, :: math.ceil(z.shape[1] / _SPREAD)]
        now.tops = above(now.target, z, torch.ones_like(z[..., 0]), _ASCENTS, _STEPS)
    low = too_low(q, now.tops.z, now.tops.ell - log_z[:, None] - LOW)
    there = low.any(1)
    if not bool(there.any()):
        return share
    weights = torch.where(there[:, None], low.to(now.tops.z), 1.0)
    local = matched(now.target, *starts_at(now.target, now.tops.z, weights))
    return torch.maximum(share, _weighed_there(now, q, local, there, log_z, trial, base))


def _missing_at_small_scales(
    now: Group, q: Proposal, log_z: Tensor, trial: Trial | None, base: Mixture | None
) -> Tensor:
    """(F,) mass at those ends of ascents from small scales that weigh most by Laplace's approximation."""
    if now.small is None:
        now.small = at_small_scales(now.target)
    z, ell, cov = now.small.z, now.small.ell, now.small.cov
    low = too_low(q, z, ell - log_z[:, None] - LOW)
    if not bool(low.any()):
        return torch.zeros_like(log_z)
    mass = torch.where(low, ell + 0.5 * torch.logdet(cov), -torch.inf)
    most = mass[0].topk(min(2 * _STARTS, int(low.sum()))).indices
    local = matched(now.target, z[:, most], cov[:, most])
    return _weighed_there(now, q, local, now.all(), log_z, trial, base)


def _weighed_there(
    now: Group,
    q: Proposal,
    local: Mixture,
    there: Tensor,
    log_z: Tensor,
    trial: Trial | None,
    base: Mixture | None = None,
) -> Tensor:
    """(F,) mass where Gaussians were matched in the fits `there`; of one fit alone, q with them is kept."""
    share = torch.zeros_like(log_z)
    local = local.of_fits(there)
    trial = None if trial is None else trial.of_fits(there)
    share[there] = missing_at(now.only(there), q.of_fits(there), defended(local), log_z[there], trial)
    base = q if base is None and isinstance(q, Mixture) else base
    if now.alone and base is not None and bool((share > FEW).all()):
        now.elsewhere = _with_more(base, local, share)
    return share


def _sunk(now: Group, log_z: Tensor) -> bool:
    """Whether particles were sent and ended far below q: then they know nothing of where q is wrong.

    Their own evidence lacks up to .11 nats for each dimension where they arrive; where they did not it lacked
    18 to 60 in four dimensions (`benchmarks/targets.py`).
    """
    if now.seen is None or now.seen.step is None:
        return False
    return bool((now.seen.log_evidence < log_z - _BELOW - _BELOW_EACH * now.target.dim).any())


def _with_more(q: Mixture, local: Mixture, share: Tensor) -> Mixture:
    """q of one fit with what was found where it lacks so much, relative to what it has."""
    return q.with_(local, min(float(share[0] / (1 + share[0])), 1 - _LEFT))


def missing_at_ends(now: Group, q: Proposal, trial: Trial) -> Tensor:
    """(F,) mass to which chains walk from the outermost draws: see `frontier`.

    Asked where the weights have a tail: where they have none, nothing goes on where q ends.
    """
    none = torch.zeros_like(trial.log_z)
    if not (now.alone and now.gradient) or now.target.budget.left < _ROOM * _WALKERS * _ROUNDS:
        return none
    if not bool((trial.khat > _TAILED).any()):
        return none
    z, weights = thinned(trial.z, trial.log_w, _OF_Q)
    seen = walk(now.target, *outermost(z, weights, _WALKERS), _ROUNDS)
    return _missing_near(now, *seen, q, trial.log_z, trial)


def missing_of_points(now: Group, q: Proposal, trial: Trial) -> Tensor:
    """(F,) mass, relative to what q has, that draws of all proposals find where q is much too low.

    Less what q's own draws, the trial, find there: that much their weights bring back.
    """
    low, log_z = _accusing(now, q, trial.log_z), trial.log_z[:, None]
    somewhere = low.any(0)
    if not bool(somewhere.any()):
        return torch.zeros_like(trial.log_z)
    weights = (now.pool.log_w(somewhere) - log_z).clamp_max(50.0).exp() * low[:, somewhere]
    mass, squares = weights.sum(1), weights.square().sum(1)
    own = trial.log_w - log_z
    own = torch.where(own > LOW, own.exp(), 0.0).mean(1)
    known = mass.square() > _WITNESSES * squares
    return torch.where(known, (mass / low.shape[1] - own).clamp_min(0.0), 0.0)


def hides(now: Group, q: Mixture, log_z: Tensor) -> Tensor:
    """(F,) whether what a closely matched q does not explain leads to mass it lacks: see `hidden`."""
    both = _with_hidden(now, q)
    if both is None:
        return ~now.all()
    now.records[0].sought = both.loc
    if (new := beyond(both, q)) is None:
        return ~now.all()
    found = missing_at(now, defended(q), defended(new), log_z) > FEW
    if bool(found.all()):
        now.elsewhere = both
    return found


def hidden_in_box(
    now: Group, q: Mixture, log_z: Tensor, trial: Trial | None = None, *, base: Mixture | None = None
) -> Tensor:
    """(F,) mass, relative to what q has, to which leads what its modes leave in theta: see `boxes`.

    What is found is added to `base`, or to q.
    """
    none = torch.zeros_like(log_z)
    if now.target.dim < _DIMENSIONS or not _searchable(now) or now.target.budget.left < _ROOM * _IN_A_BOX:
        return none
    new = in_boxes(now.target, q if base is None else base, *now.points(), by=LOW)
    return none if new is None else _weighed_there(now, q, new, now.all(), log_z, trial, base)


def mirrored(now: Group, q: Proposal, log_z: Tensor, *, base: Mixture | None = None) -> Tensor:
    """(F,) mass, relative to what q has, that q lacks in an image of itself: see `symmetry`.

    `base`, or q, is completed by all images.
    """
    share = torch.zeros_like(log_z)
    if not now.alone or now.target.fits > 1 or now.target.budget.left < _ROOM * _MAPS:
        return share
    z, log_q = q.draw(_MAPPED)
    if now.maps is None:
        few = z[:, : _MAPPED // 16]
        best = now.target.value(few).topk(_PROBED).indices[0]
        now.maps = symmetries(now.target, few[:, best])
    for each in now.maps:
        image = each.of(z)
        low = (q.log_prob(image) < log_q - LOW)[0]
        if float(low.double().mean()) < FEW:
            continue
        lacks = (now.target.value(image[:, low]) - log_z[:, None] - log_q[:, low]).clamp_max(50.0).exp()
        known = lacks.sum(1).square() > _WITNESSES * lacks.square().sum(1)
        share = torch.maximum(share, torch.where(known, lacks.sum(1) / _MAPPED, 0.0))
    base = q if base is None and isinstance(q, Mixture) else base
    if base is not None and bool((share > FEW).all()):
        now.elsewhere = completed(base, now.maps)
    return share


def unexplained(now: Group, q: Proposal, trial: Trial) -> Tensor:
    """(F,) mass, relative to what q has, where what Gaussians matched at resampled draws leave leads.

    For q that is not matched itself, a refitted mixture or a flow: it is right to a tenth, say, and its own
    rest shows nothing. Asked where the prior is far too wide, and particles are no witnesses; elsewhere they
    are, and this would find again what q has. Where no mode is Gaussian it shows nothing.
    """
    none = torch.zeros_like(trial.log_z)
    if not (_searchable(now) and bool(now.far_too_wide().all())) or _sought(now, q):
        return none
    z = _resampled(trial, _RESAMPLED)
    even = torch.full(z.shape[:2], 1.0 / z.shape[1]).to(z)
    starts = picked(z, spread_out(z, even, _STARTS))
    cov = local_covariances(z, starts, max(4 * now.target.dim, 40))
    close = matched(now.target, starts, cov)
    both = _with_hidden(now, close)
    if both is None or (new := beyond(both, close)) is None:
        return none
    return missing_at(now, q, defended(new), trial.log_z, trial)


def _searchable(now: Group) -> bool:
    return now.alone and now.gradient and now.target.fits == 1 and len(now.searched) > 0


def _sought(now: Group, q: Proposal) -> bool:
    """Whether q's components are those beside which modes were sought last."""
    loc = now.records[0].sought
    return loc is not None and isinstance(q, Mixture) and torch.equal(q.loc[:, : loc.shape[1]], loc)


def _with_hidden(now: Group, close: Mixture) -> Mixture | None:
    """A closely matched mixture with what is hidden beside it; None where that cannot be sought."""
    if not _searchable(now):
        return None
    return with_hidden(now.target, close, *now.points(), by=LOW)


def _resampled(trial: Trial, n: int) -> Tensor:
    """(F, n, d) draws of the posteriors, as far as the weights of a trial can tell."""
    return picked(trial.z, torch.stack([resample(row, n) for row in trial.smooth]))


def _accusing(now: Group, q: Proposal, log_z: Tensor) -> Tensor:
    """(F, N) whether q is much too low at the points of all proposals."""
    low = []
    for other, trial in now.pool.proposals:
        least = trial.ell - log_z[:, None] - LOW
        low.append(trial.log_q < least if other is q else too_low(q, trial.z, least))
    return torch.cat(low, 1)
