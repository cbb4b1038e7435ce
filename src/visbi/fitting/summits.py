r"""Summits of the posterior, found by quasi-Newton ascents from a few points.

The inverse Hessian is that of Broyden, Fletcher, Goldfarb and Shanno, dense and one for each start, from what
the slopes at some draws of the prior say of the scales. Steps are the best of several lengths, which are
evaluated at once; an ascent that has arrived costs nothing more. Gaussians are matched from where they end
(`afar`); in Pathfinder (Zhang, Carpenter, Gelman, Vehtari. JMLR 2022) they are the Gaussians.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.fitting.mixture import spread_out
from visbi.fitting.target import Target

__all__ = ["GAIN", "Climbers", "Summits", "above", "on_the_line", "summits"]

_CLIMBERS = 8  # ascents from points of one kind
_STEPS = 160  # of an ascent, at most
_LENGTHS = 4.0 ** torch.arange(3, -5, -1)  # of steps that are tried, in quasi-Newton steps
GAIN = 1e-4
"""Nats that are next to nothing."""
_STILL = 3  # an ascent that gains less, so many times in a row, is there
_FAR = 1.0  # prior sds: the longest first step, and longest one without a curvature
_SLOPES = 64  # of the potential, at least, that its scales are guessed from
_LEAST_SLOPE = 1e-12  # of the largest


@dataclass(frozen=True)
class Summits:
    """Where ascents ended.

    Attributes:
        z: (F, K, d). ell: (F, K) there; at a start that is of no use what the target says of such points.
        cov: (F, K, d, d) the inverse of the curvature, as far as the ascent has learnt it.
        rests: (F, K) whether it ended because nothing more was gained. In the neck of a funnel none does.
    """

    z: Tensor
    ell: Tensor
    cov: Tensor
    rests: Tensor

    def with_(self, other: "Summits") -> "Summits":
        """These and the others."""
        return Summits(
            torch.cat([self.z, other.z], 1),
            torch.cat([self.ell, other.ell], 1),
            torch.cat([self.cov, other.cov], 1),
            torch.cat([self.rests, other.rests], 1),
        )

    def of_fits(self, which: Tensor) -> "Summits":
        """Those of the fits `which`, (F,) bool."""
        return Summits(self.z[which], self.ell[which], self.cov[which], self.rests[which])


def summits(target: Target, z: Tensor, steps: int = _STEPS) -> Summits:
    """Ascents from points z (F, K, d), of so many steps at most.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> scale = torch.tensor([1e-3, 1.0])
    >>> target = Target(lambda theta: -0.5 * ((theta - 0.5) / scale).square().sum(-1), coordinates(prior))
    >>> _ = torch.manual_seed(2)
    >>> found = summits(target, torch.zeros(1, 1, 2).double())
    >>> found.z[0, 0], found.cov[0, 0].diagonal().sqrt()
    (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([0.0010, 1.0000], dtype=torch.float64))
    """
    metric = _metric(target)[:, None]
    z = z.double()
    ell, gradient = target.value_and_gradient(z)
    inverse = _no_longer(metric, gradient)
    fresh = torch.ones_like(ell, dtype=torch.bool)
    everyone = _Climbers(z, ell, gradient, inverse, inverse, fresh, torch.zeros_like(ell))
    for _ in range(steps):
        climbing = (everyone.still < _STILL).any(0)
        if not bool(climbing.any()):
            break
        everyone = everyone.put(climbing, _step(target, everyone.only(climbing), metric))
    return Summits(everyone.z, everyone.ell, everyone.cov, everyone.still >= _STILL)


def above(target: Target, z: Tensor, weights: Tensor, n: int = _CLIMBERS, steps: int = _STEPS) -> Summits:
    """Where ascents from n of the points z (F, N, d) end, spread out by weights (F, N).

    Raises:
        BudgetReached: the target's budget is used up.
    """
    n = min(n, z.shape[1])
    return summits(target, picked(z, spread_out(z, weights / weights.sum(1, keepdim=True), n)), steps)


@dataclass(frozen=True)
class Climbers:
    """Ascents on their way, all that is known of them as tensors (F, K, ...)."""

    def only(self, which: Tensor) -> Self:
        """The ascents `which`, (K,) bool, of every fit."""
        return type(self)(*(part[:, which] for part in self._parts()))

    def put(self, which: Tensor, others: Self) -> Self:
        """With others in the place of those `which`."""
        parts = [part.clone() for part in self._parts()]
        for part, new in zip(parts, others._parts(), strict=True):
            part[:, which] = new
        return type(self)(*parts)

    def _parts(self) -> list[Tensor]:
        return [getattr(self, each.name) for each in fields(self)]


@dataclass(frozen=True)
class _Climbers(Climbers):
    """Quasi-Newton ascents.

    Attributes:
        z, ell, gradient: where they are.
        inverse: (F, K, d, d) inverse Hessians. cov: the last ones that were learnt while rising.
        fresh: (F, K) whether no curvature is known. still: steps in a row that gained next to nothing.
    """

    z: Tensor
    ell: Tensor
    gradient: Tensor
    inverse: Tensor
    cov: Tensor
    fresh: Tensor
    still: Tensor


def _step(target: Target, now: _Climbers, metric: Tensor) -> _Climbers:
    """All of them one step further, or as they are."""
    z, ell, gradient, inverse = now.z, now.ell, now.gradient, now.inverse
    direction = (inverse @ gradient[..., None])[..., 0]
    step, new_ell, new_gradient = on_the_line(target, z, ell, gradient, direction)
    better = new_ell > ell
    gain = torch.where(better, new_ell - ell, 0.0)
    learnt, inverse = _updated(inverse, step, gradient - new_gradient, now.fresh, metric)
    lost = ~better & ~now.fresh  # along a direction that does not rise: begin anew from the slope alone
    step = torch.where(better[..., None], step, 0.0)
    gradient = torch.where(better[..., None], new_gradient, gradient)
    return _Climbers(
        z=z + step,
        ell=torch.where(better, new_ell, ell),
        gradient=gradient,
        inverse=torch.where(lost[..., None, None], _no_longer(metric, gradient), inverse),
        cov=torch.where((better & learnt & (gain > GAIN))[..., None, None], inverse, now.cov),
        fresh=(now.fresh & ~learnt) | lost,
        still=torch.where(gain < GAIN, now.still + 1, torch.zeros_like(now.still)),
    )


def _metric(target: Target) -> Tensor:
    """(F, d, d) the inverse Hessian that a Gaussian's slopes at draws of the prior would come from.

    Draws of N(0, I) have slopes of covariance H^2 there. Where H is not the same everywhere this is still
    how unlike the directions are, and on raw predictors that is one to 10^7: from there an ascent takes sixty
    steps, from the identity four hundred and more.
    """
    n = max(_SLOPES, 4 * target.dim)
    z = torch.randn(target.fits, n, target.dim, dtype=torch.float64, device=target.device)
    _, gradient = target.value_and_gradient(z)
    centred = (gradient - gradient.mean(1, keepdim=True)) / n**0.5
    _, size, directions = torch.linalg.svd(centred, full_matrices=False)
    none = size[:, :1] <= 0
    size = torch.where(none, 1.0, torch.maximum(size, _LEAST_SLOPE * size[:, :1]))
    return (directions.mT / size[:, None]) @ directions


def on_the_line(
    target: Target, z: Tensor, ell: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best step (F, K, d) from z along a direction, and ell (F, K) and its slope after it.

    It need not rise. Eight lengths are tried at once, and the top of the parabola through the best of them.
    """
    fits, k, d = z.shape
    steps = _lengths(target, z, ell, gradient, direction)[..., None] * direction[:, :, None]
    new_ell, slopes = target.value_and_gradient((z[:, :, None] + steps).flatten(1, 2))
    highest = new_ell.reshape(fits, k, 2).max(-1)
    step, slope = (_chosen(t.reshape(fits, k, 2, d), highest.indices) for t in (steps, slopes))
    return step, highest.values, slope


def _lengths(target: Target, z: Tensor, ell: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
    """(F, K, 2) how long a step could be: the best of some, and the top of the parabola through it."""
    lengths = _LENGTHS.to(z)
    each = z[:, :, None] + lengths[:, None] * direction[:, :, None]
    values = target.value(each.flatten(1, 2)).reshape(*ell.shape, -1).nan_to_num(-torch.inf, -torch.inf)
    highest = values.max(-1)
    best = lengths[highest.indices]
    slope = (gradient * direction).sum(-1)
    bend = (ell + slope * best - highest.values) / best.square()
    top = torch.where(bend > 0, slope / (2 * bend), best).nan_to_num(0.0)
    return torch.stack([best, torch.minimum(torch.maximum(top, best / 4), best * 4)], -1)


def _chosen(each: Tensor, index: Tensor) -> Tensor:
    """(F, K, d) from (F, K, 2, d)."""
    return each.gather(2, index[..., None, None].expand(*index.shape, 1, each.shape[-1]))[:, :, 0]


def _no_longer(metric: Tensor, gradient: Tensor) -> Tensor:
    """Multiples of the metric by which a step is as long as `_FAR`, or as it is if that is less."""
    norm = (metric @ gradient[..., None])[..., 0].norm(dim=-1).clamp_min(1e-300)
    return metric * (_FAR / norm).clamp_max(1.0)[..., None, None]


def _updated(
    inverse: Tensor, step: Tensor, change: Tensor, fresh: Tensor, metric: Tensor
) -> tuple[Tensor, Tensor]:
    """Where steps (F, K, d) that changed the slope so taught a curvature, and inverse Hessians after them."""
    product = (step * change).sum(-1)
    learnt = product > 1e-12 * step.norm(dim=-1) * change.norm(dim=-1)
    rate = torch.where(learnt, 1.0 / product.clamp_min(1e-300), 0.0)[..., None, None]
    s, y = step[..., None], change[..., None]
    size = product[..., None, None] / (y.mT @ metric @ y).clamp_min(1e-300)
    start = torch.where((fresh & learnt)[..., None, None], size * metric, inverse)
    left = torch.eye(step.shape[-1]).to(step) - rate * s @ y.mT
    new = left @ start @ left.mT + rate * s @ s.mT
    return learnt, torch.where(learnt[..., None, None], new, inverse)
