r"""A mixture of Gaussians that follows the posterior: matched where the explorer has been, then refitted.

Two ways lead to a first mixture. *Matched*: Gaussians are matched to the potential's scores from many starts in
one batched call (`fitting.match`), unlike ones are kept; exact where modes are near Gaussian, in any dimension.
*From particles*: weighted EM on everything the explorer saw; bends and funnels get several components, and no
gradient is needed; good in a few dimensions. Both are drawn from, and what was drawn says how good they are.

Then adaptive importance sampling: all points so far, weighted (`fitting.pool`), are fitted by EM, with new
components where points weigh much more than the mixture says; a refit is kept if the effective sample size of
fresh draws of it is larger.
"""

import math

import torch
from torch import Tensor

from visbi.fitting.explore import Exploration
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import (
    Mixture,
    expectation_maximisation,
    local_covariances,
    merged,
    spread_out,
)
from visbi.fitting.pool import Pool, Trial
from visbi.fitting.target import Target

__all__ = ["around", "defended", "from_particles", "matched", "refined"]

_COMPONENTS = 24
_MOST_COMPONENTS = 64
_NEW = 12  # components that a refit may add
_POINTS = 4096  # that EM runs on
_TRIAL = 4096
_HOPELESS = 14.0  # nats of local evidence below the best beyond which a matched Gaussian is dropped
_DEFENCE = ((2.5, 0.08), (6.0, 0.02))  # radii in standard deviations beyond the typical shell, and their shares


def defended(q: Mixture) -> Mixture:
    """q with a tenth of its mass spread wider, so that weights at its edge stay bounded.

    The norm of a standard normal vector lies near sqrt(d) with a spread of sqrt(1/2): widening by
    1 + r / sqrt(2 d) moves that shell outwards by r of its spreads, in any dimension.
    """
    d, wide = q.loc.shape[-1], q
    for radius, share in _DEFENCE:
        wide = wide.with_(q.widened((1 + radius / math.sqrt(2 * d)) ** 2), share)
    return wide


def matched(target: Target, starts: Tensor, cov: Tensor) -> Mixture:
    """A mixture of the unlike Gaussians matched from starts (K, d) with covariances (K, d, d)."""
    match = match_gaussian(target, starts, cov, batch=max(2 * target.dim, 32), max_iters=10)
    good = torch.isfinite(match.elbo) & (match.elbo > match.elbo.max() - _HOPELESS)
    found = Mixture.of(torch.zeros_like(match.elbo)[None], match.loc[None], match.cov[None]).only(good)
    return merged(found, match.elbo[good], _COMPONENTS)


def around(z: Tensor) -> Mixture:
    """A mixture that covers points z (N, d), from local covariances, as it is."""
    even = torch.full((len(z),), 1.0 / len(z)).to(z)
    centres = z[spread_out(z, even, min(_NEW, len(z)))]
    cov = local_covariances(z, centres, max(2 * z.shape[1], 20))
    return Mixture.of(torch.zeros(1, len(centres)).to(z), centres[None], cov[None])


def from_particles(seen: Exploration) -> Mixture:
    """EM on all that the explorer saw (F = 1), weighted, from local covariances."""
    pool = _Weighted.of(seen)
    z, weights = pool.z, pool.weights
    d = z.shape[1]
    most = max(1, min(_COMPONENTS, int(len(z) / (3 * d + 10))))
    centres = spread_out(z, weights, most)
    cov = local_covariances(z, z[centres], max(4 * d, 40))
    start = Mixture.of(torch.zeros(1, len(centres)).to(z), z[centres][None], cov[None])
    return expectation_maximisation(start, z[None], weights[None])


class _Weighted:
    """Unlike points of an exploration and their weights."""

    def __init__(self, z: Tensor, weights: Tensor) -> None:
        self.z, self.weights = z, weights

    @classmethod
    def of(cls, seen: Exploration) -> "_Weighted":
        from visbi.certificate.weights import pareto_smooth, resample

        z, log_w = seen.weighted()
        chosen, counts = resample(pareto_smooth(log_w[0])[0], _POINTS).unique(return_counts=True)
        return cls(z[0][chosen], counts.double() / counts.sum())


def refined(pool: Pool, q: Mixture, trial: Trial, *, rounds: int = 4) -> tuple[Mixture, Trial]:
    """The best mixture after at most `rounds` refits, and the trial of it."""
    best, current = (q, trial), q
    for _ in range(rounds):
        if best[1].share > 0.9:
            break
        current = _refit(pool, current)
        fresh = pool.draw(defended(current), _TRIAL)
        better = fresh.share > 1.05 * best[1].share
        if fresh.share > best[1].share:
            best = current, fresh
        if not better and fresh.share > 0.3:
            break
    return best


def _refit(pool: Pool, q: Mixture) -> Mixture:
    z, weights = pool.points(_POINTS)
    d = z.shape[1]
    room = min(_NEW, _MOST_COMPONENTS - q.loc.shape[1], len(z) // (3 * d + 10))
    if room > 0:
        # where the weighted points are denser than q
        log_q = q.log_prob(z[None])[0]
        density = weights.log() - log_q
        excess = weights * torch.sigmoid(density - _weighted_median(density, weights))
        centres = spread_out(z, excess / excess.sum(), room)
        cov = local_covariances(z, z[centres], max(4 * d, 40))
        new = Mixture.of(torch.zeros(1, len(centres)).to(z), z[centres][None], cov[None])
        q = q.with_(new, 0.5)
    fitted = expectation_maximisation(q, z[None], weights[None])
    return fitted.only(torch.isfinite(fitted.log_weights[0]))


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    order = values.argsort()
    return values[order[int(torch.searchsorted(weights[order].cumsum(0), 0.5).clamp_max(len(values) - 1))]]
