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

from dataclasses import replace

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import ALIKE, bhattacharyya, merged
from visbi.fitting.summits import above
from visbi.fitting.target import Target, log_standard_normal
from visbi.fitting.uphill import FOLLOWED, KEPT, best_along, starts_at

__all__ = ["with_hidden"]

_SENT, _OUTMOST = 4096, 5.0  # draws around q, up to so many times as wide
_TURNS = 64  # of finding some and adding them, at most
_TIMES = 6  # line searches in each
_SLOPES, _FLAT = 4, 1e-12  # at ends, for each dimension; least curvature, of the largest
_ITERS = 10
_DRAWS, _DRAWS_OF_EACH = 1024, 64  # that say what components weigh; of each at least
_MISFIT = 0.01  # of the depth below q's top, that r may be for no more than how Gaussians were matched
_FITS = 0.1  # sd of ell - log q, in nats, of what fits closely enough


def with_hidden(target: Target, q: Mixture, z: Tensor, ell: Tensor, *, by: float) -> Mixture | None:
    """q with the modes to which what it leaves unexplained leads; None where no component fits.

    Args:
        target: of one potential (F = 1), with a useful gradient.
        q: matched closely where it is, weights included.
        z, ell: where to begin beside draws around q (1, N, d) and the target there (1, N), -inf for what need
            not be looked at.
        by: nats by which ell - log q - log Z is too much.

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
        new = _unexplained(target, replace(q, log_weights=log_mass).only(fits), log_mass[fits], z, ell, by=by)
        if new is None:
            break
        q = q.with_(new, 0.5)
        log_mass = torch.cat([log_mass, new.log_weights], 1)
        fits = torch.cat([fits, torch.ones_like(new.log_weights, dtype=torch.bool)], 1)
    return replace(q, log_weights=torch.log_softmax(log_mass, 1))


def _outwards(q: Mixture) -> Tensor:
    """Draws (1, N, d) of q and of q spread wider, evenly on the scale of its logarithm.

    What q lacks need not be where the prior is, whose draws may all be too far off for a trace of it.
    """
    wide = _OUTMOST ** torch.rand(1, _SENT, 1).to(q.loc)
    which = torch.multinomial(q.log_weights[0].exp(), _SENT, replacement=True)
    u = torch.randn(_SENT, q.loc.shape[-1], 1).to(q.loc)
    return q.loc[:, which] + wide * (q.tril[0, which] @ u)[None, ..., 0]


def _unexplained(
    target: Target, q: Mixture, log_mass: Tensor, z: Tensor, ell: Tensor, *, by: float
) -> Mixture | None:
    """Gaussians that fit what a q that fits, with masses (K,), leaves; their weights are their masses."""
    ends = _ends(target, q, log_mass.logsumexp(0, keepdim=True), z, ell, by=by)
    if ends is None:
        return None
    for starts in (_as_curved_as_they_are, _at_summits):
        new = _unlike(q, _matched(target, *starts(target, ends)))
        if new is None:
            continue
        log_mass, fits = _masses(target, new)
        if bool(fits.any()):
            return Mixture(log_mass[fits][None], new.loc[fits][None], new.tril[fits][None])
    return None


def _masses(target: Target, q: Mixture) -> tuple[Tensor, Tensor]:
    """Log-mass of the target that each component of q explains, and which of them fit, (1, components).

    The mass of a component that fits is the same at each of its draws; of another it is more than what is
    found here.
    """
    count, dim = q.loc.shape[1:]
    u = torch.randn(1, count, max(_DRAWS, _DRAWS_OF_EACH * count) // count, dim).to(q.loc)
    z = q.loc[:, :, None] + u @ q.tril.mT
    log_det = q.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None]
    log_q = log_standard_normal(u) - log_det
    mass = target.value(z) - log_q  # (1, components, draws)
    return mass.mean(-1), mass.std(-1) < _FITS


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
    width = cov[..., :1, :1].sqrt()
    step = width * torch.randn(*starts.shape[:2], _SLOPES * target.dim, target.dim).to(starts)
    _, score = target.value_and_gradient((starts[:, :, None] + step).flatten(1, 2))
    score = score.reshape(step.shape)
    step, mean = step - step.mean(2, keepdim=True), score.mean(2, keepdim=True)
    slope = -torch.linalg.lstsq(step, score - mean).solution
    size, axes = torch.linalg.eigh(0.5 * (slope + slope.mT))
    curved = (size > _FLAT * size[..., -1:]).all(-1)[..., None]
    inverse = (axes / torch.where(curved, size, 1.0)[..., None, :]) @ axes.mT
    top = starts + (inverse @ mean.mT)[..., 0]
    return torch.where(curved, top, starts), torch.where(curved[..., None], inverse, cov)


def _at_summits(target: Target, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Summits above some of the ends, and covariances as curved as the target is there.

    An ascent may leap to another summit, which is why it comes second.
    """
    found = above(target, ends, torch.ones_like(ends[..., 0]))
    return found.z, found.cov


def _matched(target: Target, starts: Tensor, cov: Tensor) -> Mixture:
    """Gaussians matched from starts (1, K, d), all of equal weight and all of them.

    `refine.matched` keeps of those alike the one of the highest ELBO, whose noise prefers a worse fit.
    """
    batch = max(2 * target.dim, 32)
    match = match_gaussian(target, starts[0], cov[0], batch=batch, max_iters=_ITERS)
    return Mixture.of(torch.zeros_like(match.elbo)[None], match.loc[None], match.cov[None])


def _unlike(q: Mixture, new: Mixture) -> Mixture | None:
    """Those of the new components that are like none of q's, and unlike each other, or None."""
    own = q.loc.shape[1]
    apart = (bhattacharyya(q.with_(new, 0.5))[:, own:, :own] > ALIKE).all(-1)
    if not bool(apart.any()):
        return None
    new = new.only(apart)
    return merged(new, torch.zeros_like(new.log_weights), new.loc.shape[1])
