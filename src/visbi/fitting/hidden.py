r"""Modes that hardly any draw of the prior leads to: the slope of what q leaves unexplained leads there.

A narrow mode beside a wide one is met by no particle, and the potential's own slopes lead away from it nearly
everywhere: half way between the two it may be e^-20 of what the wide one is. But where q is right about the
wide one,

    r(z) = ell(z) - log q(z) - log Z = log(1 + rest(z) / (Z q(z)))

is zero but for the rest, however little that is there, and its slope points to the rest and to nothing else.
So points at which r is largest are led up r, not up ell, by line searches; where q has become much too low
Gaussians are matched, q gets them with the weights that they turn out to have, and what that q leaves
unexplained leads to the next ones. This is deflation, as of the roots of a polynomial (Farrell, Birkisson,
Funke: Deflation techniques for finding distinct solutions. SISC 2015), of densities.

Points are ranked by r in units of what rounding makes of ell, which grows with its size: far out r is large
for no other reason. How faint a trace can be seen depends on how well q fits, too: Gaussians that are matched
to a Gaussian mode are right to 1e-6, and lead to what is e^-14 of them. Where one is right to no more than a
tenth, little is gained over looking for draws at which ell itself is too high (`fitting.uphill`). So q stands
here for its components that fit: among matched Gaussians there often are some that ended between modes, or
that stand for one that is no Gaussian, and one of them would hide the slopes of all that the others leave.
What these stand for is found again at most once, and left alone where it fits no better.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture, cholesky
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import ALIKE, bhattacharyya, merged
from visbi.fitting.summits import above
from visbi.fitting.target import Target, is_usable, log_standard_normal
from visbi.fitting.uphill import FOLLOWED, KEPT, best_along, starts_at

__all__ = ["beyond", "of_slopes", "with_hidden"]

Matching = Callable[[Target, Tensor, Tensor], Mixture | None]
"""A target, starts (1, K, d) and covariances there -> Gaussians of equal weight, if any."""

_SENT, _OUTMOST = 4096, 5.0  # draws around q, up to so many times as wide
_TURNS = 64  # of finding some and adding them, at most
_TIMES = 6  # line searches in each
_SLOPES, _FLAT = 4, 1e-12  # that tell a Gaussian, for each dimension; least curvature, of the largest
_ITERS = 10
_DRAWS, _DRAWS_OF_EACH = 1024, 64  # that say what components weigh; of each at least
_MISFIT = 0.01  # of the depth below q's top, that r may be for no more than how Gaussians were matched
_FITS = 0.1  # sd of ell - log q, in nats, of what fits closely enough,
_USABLE = 8  # of its draws at least


def _matched(target: Target, starts: Tensor, cov: Tensor) -> Mixture:
    """Gaussians matched from starts (1, K, d), all of equal weight and all of them.

    `refine.matched` keeps of those alike the one of the highest ELBO, whose noise prefers a worse fit.
    """
    batch = max(2 * target.dim, 32)
    match = match_gaussian(target, starts[0], cov[0], batch=batch, max_iters=_ITERS)
    return Mixture.of(torch.zeros_like(match.elbo)[None], match.loc[None], match.cov[None])


def with_hidden(
    target: Target, q: Mixture, z: Tensor, ell: Tensor, *, by: float, matched: Matching = _matched
) -> Mixture | None:
    """q with the modes to which what it leaves unexplained leads; None where no component fits.

    Args:
        target: of one potential (F = 1), with a useful gradient.
        q: matched closely where it is, weights included.
        z, ell: where to begin beside draws around q (1, N, d) and the target there (1, N), -inf for what need
            not be looked at.
        by: nats by which ell - log q - log Z is too much.
        matched: how Gaussians are matched; to scores, where nothing else is said.

    Returns:
        A mixture whose first components are those of q; its weights are those that it turns out to have.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> import math
    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(3).double(), 1.0), 1)
    >>> def log_p(theta):  # of equal mass, but one a fifth as wide in each of three dimensions
    ...     wide, narrow = ((theta + side).square().sum(-1) for side in (1.0, -1.0))
    ...     return torch.logaddexp(-2 * wide, -50 * narrow + 3 * math.log(5))
    >>> target = Target(log_p, coordinates(prior))
    >>> wide = Mixture.of(torch.zeros(1, 1), -torch.ones(1, 1, 3), torch.eye(3)[None, None] / 4)
    >>> wide = Mixture(*(each.double() for each in (wide.log_weights, wide.loc, wide.tril)))
    >>> z = torch.randn(1, 512, 3).double()
    >>> both = with_hidden(target, wide, z, target.value(z), by=3.0)
    >>> assert both is not None
    >>> both.loc[0, 1], both.log_weights.exp()
    (tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64), tensor([[0.50, 0.50]], dtype=torch.float64))
    """
    log_mass, fits = _masses(target, q)
    if not bool(fits.any()):
        return None
    around = _outwards(replace(q, log_weights=log_mass).only(fits))
    z, ell = torch.cat([z, around], 1), torch.cat([ell, target.value(around)], 1)
    for _ in range(_TURNS):
        fitting = replace(q, log_weights=log_mass).only(fits)
        new = _unexplained(target, fitting, log_mass[fits], z, ell, by, matched)
        if new is None:
            break
        q = q.with_(new, 0.5)
        log_mass = torch.cat([log_mass, new.log_weights], 1)
        fits = torch.cat([fits, torch.ones_like(new.log_weights, dtype=torch.bool)], 1)
    return replace(q, log_weights=torch.log_softmax(log_mass, 1))


def beyond(both: Mixture, q: Mixture) -> Mixture | None:
    """What `both` has beside q's components, if anything."""
    own, count = q.loc.shape[1], both.loc.shape[1]
    return None if count == own else both.only(torch.arange(count, device=q.loc.device)[None] >= own)


def _outwards(q: Mixture) -> Tensor:
    """Draws (1, N, d) of q and of q spread wider, evenly on the scale of its logarithm.

    What q lacks need not be where the prior is, whose draws may all be too far off for a trace of it.
    """
    wide = _OUTMOST ** torch.rand(1, _SENT, 1).to(q.loc)
    which = torch.multinomial(q.log_weights[0].exp(), _SENT, replacement=True)
    u = torch.randn(_SENT, q.loc.shape[-1], 1).to(q.loc)
    return q.loc[:, which] + wide * (q.tril[0, which] @ u)[None, ..., 0]


def _unexplained(
    target: Target, q: Mixture, log_mass: Tensor, z: Tensor, ell: Tensor, by: float, matched: Matching
) -> Mixture | None:
    """Gaussians that fit what a q that fits, with masses (K,), leaves; their weights are their masses."""
    ends = _ends(target, q, log_mass.logsumexp(0, keepdim=True), z, ell, by=by)
    if ends is None:
        return None
    for starts in (_as_curved_as_they_are, _at_summits):
        found = matched(target, *starts(target, ends))
        new = None if found is None else _unlike(q, found)
        if new is None:
            continue
        log_mass, fits = _masses(target, new)
        if bool(fits.any()):
            return Mixture(log_mass[fits][None], new.loc[fits][None], new.tril[fits][None])
    return None


def _masses(target: Target, q: Mixture) -> tuple[Tensor, Tensor]:
    """Log-mass of the target that each component of q explains, and which of them fit, (1, components).

    The mass of a component that fits is the same at each of its draws; of another it is more than what is
    found here. Where the target is nothing it says nothing.
    """
    count, dim = q.loc.shape[1:]
    u = torch.randn(1, count, max(_DRAWS, _DRAWS_OF_EACH * count) // count, dim).to(q.loc)
    centre = target.inwards(q.loc, q.cov)
    u = u + torch.linalg.solve_triangular(q.tril, (centre - q.loc)[..., None], upper=False).mT
    z = q.loc[:, :, None] + u @ q.tril.mT
    log_det = q.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None]
    log_q = log_standard_normal(u) - log_det
    ell = target.value(z)
    usable, mass = is_usable(ell), ell - log_q  # (1, components, draws)
    n = usable.sum(-1)
    mean = torch.where(usable, mass, 0.0).sum(-1) / n.clamp_min(1)
    spread = torch.where(usable, mass - mean[..., None], 0.0).square().sum(-1) / (n - 1).clamp_min(1)
    return mean, (n >= _USABLE) & (spread.sqrt() < _FITS)


def _ends(target: Target, q: Mixture, log_z: Tensor, z: Tensor, ell: Tensor, *, by: float) -> Tensor | None:
    """Where r is above `by` after it was climbed, (1, K, d), or None."""

    def left(each: Tensor) -> Tensor:
        log_q = q.log_prob(each.flatten(1, 2)).reshape(each.shape[:-1])
        return target.value(each) - log_q - log_z[:, None, None]

    r, keep = ell - q.log_prob(z) - log_z[:, None], FOLLOWED
    for _ in range(_TIMES):
        sure = torch.where(torch.isfinite(r), r / (1.0 + ell.abs()), -torch.inf)
        z = picked(z, sure.topk(min(keep, r.shape[1]), 1).indices)
        ell, gradient = target.value_and_gradient(z)
        log_q, score = q.log_prob_and_score(z)
        z, r = best_along(z, ell - log_q - log_z[:, None], gradient - score, left)
        ell = r + q.log_prob(z) + log_z[:, None]
        keep = KEPT
    depth = q.log_prob(q.loc).amax(1, keepdim=True) - q.log_prob(z)
    there = r > by + _MISFIT * depth
    return z[there][None] if bool(there.any()) else None


def _as_curved_as_they_are(target: Target, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussians whose slopes are those around some of the ends, and the ends themselves where there is none.

    r rises with the distance from q, so where it is large may be far out in the tails of what q lacks. There
    the slopes of a Gaussian still are P (m - z): a regression on draws around the end finds m and P.
    """
    starts, cov = starts_at(target, ends, torch.ones_like(ends[..., 0]))
    top, inverse, curved = of_slopes(target, starts, cov)
    return torch.where(curved[..., None], top, starts), torch.where(curved[..., None, None], inverse, cov)


def of_slopes(target: Target, z: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (1, K, d) and covariances of Gaussians with the target's slopes around points z (1, K, d).

    By regression, grad ell = P (m - z), on draws of N(z, cov) at which the target is something; and (1, K)
    whether P is a precision at all.
    """
    n = _SLOPES * target.dim
    step = torch.randn(*z.shape[:2], n, target.dim).to(z) @ cholesky(cov).mT
    ell, score = target.value_and_gradient((z[:, :, None] + step).flatten(1, 2))
    usable = is_usable(ell).reshape(*z.shape[:2], n, 1).to(z)
    score = score.reshape(step.shape)
    count = usable.sum(2, keepdim=True).clamp_min(1.0)
    middle, mean = ((usable * each).sum(2, keepdim=True) / count for each in (step, score))
    slope = -torch.linalg.lstsq(usable * (step - middle), usable * (score - mean)).solution
    size, axes = torch.linalg.eigh(0.5 * (slope + slope.mT).nan_to_num(0.0, 0.0, 0.0))
    curved = (size > _FLAT * size[..., -1:]).all(-1) & (usable.sum((2, 3)) > target.dim)
    inverse = (axes / torch.where(curved[..., None], size, 1.0)[..., None, :]) @ axes.mT
    top = z + middle[:, :, 0] + (inverse @ mean.mT)[..., 0]
    return top, inverse, curved


def _at_summits(target: Target, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Summits above some of the ends, and covariances as curved as the target is there.

    An ascent may leap to another summit, which is why it comes second.
    """
    found = above(target, ends, torch.ones_like(ends[..., 0]))
    return found.z, found.cov


def _unlike(q: Mixture, new: Mixture) -> Mixture | None:
    """Those of the new components that are like none of q's, and unlike each other, or None."""
    own = q.loc.shape[1]
    apart = (bhattacharyya(q.with_(new, 0.5))[:, own:, :own] > ALIKE).all(-1)
    if not bool(apart.any()):
        return None
    new = new.only(apart)
    return merged(new, torch.zeros_like(new.log_weights), new.loc.shape[1])
