r"""A mixture of Gaussians that follows the posterior: matched where the explorer has been, then refitted.

Two ways lead to a first mixture. *Matched*: Gaussians are matched to the potential's scores from many
starts in one batched call (`fitting.match`), unlike ones are kept; exact where modes are near Gaussian, in
any dimension. *From particles*: weighted EM on everything the explorer saw; bends and funnels get several
components, and no gradient is needed; good in a few dimensions. Both are drawn from, and what was drawn
says how good they are.

Then adaptive importance sampling: all points so far, weighted (`fitting.pool`), are fitted by EM, with new
components where points weigh much more than the mixture says; a refit is kept if the effective sample size of
fresh draws of it is larger.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.fitting.explore import Exploration
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import (
    Mixture,
    defended,
    expectation_maximisation,
    local_covariances,
    maximise,
    merged,
    spread_out,
)
from visbi.fitting.pool import Pool, Proposal, Trial, thinned
from visbi.fitting.target import Target

__all__ = ["Blend", "around", "from_particles", "matched", "patch", "refined"]

_COMPONENTS = 24
_MOST_COMPONENTS = 64
_NEW = 12  # components that a refit may add
_POINTS = 4096  # that EM runs on
_TRIAL = 4096
_PATCH = 0.7  # nats by which q is low where a patch starts
_LEAST_PATCH = 0.02
_HOPELESS = 14.0  # nats of local evidence below the best beyond which a matched Gaussian is dropped


def matched(target: Target, starts: Tensor, cov: Tensor) -> Mixture:
    """A mixture of the unlike Gaussians matched from starts (K, d) with covariances (K, d, d).

    At most `_COMPONENTS`, of equal weights; what ends far below the best is dropped.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> centre = torch.tensor([2.0, 0.0], dtype=torch.float64)
    >>> def log_p(theta):
    ...     each = [-50 * (theta - side * centre).square().sum(-1) for side in (1, -1)]
    ...     return torch.logaddexp(*each)
    >>> starts = torch.stack([0.9 * centre, -0.9 * centre, 1.1 * centre])
    >>> cov = 0.01 * torch.eye(2).double().expand(3, 2, 2)
    >>> found = matched(Target(log_p, coordinates(prior)), starts, cov)
    >>> sorted(found.loc[0, :, 0].tolist())
    [-2.0, 2.0]
    """
    match = match_gaussian(target, starts, cov, batch=max(2 * target.dim, 32), max_iters=10)
    good = torch.isfinite(match.elbo) & (match.elbo > match.elbo.max() - _HOPELESS)
    found = Mixture.of(torch.zeros_like(match.elbo)[None], match.loc[None], match.cov[None]).only(good)
    return merged(found, match.elbo[good], _COMPONENTS)


def around(z: Tensor) -> Mixture:
    """A mixture that covers points z (N, d), N >= 2: EM from local covariances that reach all of them."""
    even = torch.full((len(z),), 1.0 / len(z)).to(z)
    centres = z[spread_out(z, even, min(_NEW, len(z)))]
    cov = local_covariances(z, centres, max(2 * z.shape[1], 20, len(z) // len(centres)))
    start = Mixture.of(torch.zeros(1, len(centres)).to(z), centres[None], cov[None])
    fitted = expectation_maximisation(start, z[None], even[None])
    return fitted.only(torch.isfinite(fitted.log_weights[0]))


def from_particles(seen: Exploration) -> Mixture:
    """EM on all that the explorer saw (F = 1), weighted, from local covariances.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> from visbi.fitting.explore import explore
    >>> seen = explore(Target(prior.log_prob, coordinates(prior)), 256)
    >>> from_particles(seen).sample(10).shape
    torch.Size([1, 10, 2])
    """
    every, log_w = seen.weighted()
    z, weights = thinned(every[0], log_w[0], _POINTS)
    d = z.shape[1]
    most = max(1, min(_COMPONENTS, int(len(z) / (3 * d + 10))))
    centres = spread_out(z, weights, most)
    cov = local_covariances(z, z[centres], max(4 * d, 40))
    start = Mixture.of(torch.zeros(1, len(centres)).to(z), z[centres][None], cov[None])
    return expectation_maximisation(start, z[None], weights[None])


@dataclass(frozen=True)
class Blend:
    """A proposal of which a share is given to a mixture."""

    main: Proposal
    rest: Mixture
    share: float

    def sample(self, n: int) -> Tensor:
        """(1, n, d)."""
        k = round(self.share * n)
        z = torch.cat([self.main.sample(n - k), self.rest.sample(k)], 1)
        return z[:, torch.randperm(n, device=z.device)]

    def log_prob(self, z: Tensor) -> Tensor:
        """(1, N)."""
        main, rest = self.main.log_prob(z), self.rest.log_prob(z)
        return torch.logaddexp(main + math.log1p(-self.share), rest + math.log(self.share))


def patch(pool: Pool, q: Proposal) -> Blend:
    """q with a mixture where it is too low: EM on all points, with q as one component that stays as it is.

    The share of q's mass that the mixture takes is at most a half.
    """
    z, weights = pool.points(2 * _POINTS)
    log_q = q.log_prob(z[None])
    density = weights.log() - log_q[0]
    low = weights * torch.sigmoid(density - _weighted_median(density, weights) - _PATCH)
    centres = spread_out(z, low / low.sum(), _NEW)
    cov = local_covariances(z, z[centres], max(4 * z.shape[1], 40))
    rest = Mixture.of(torch.zeros(1, len(centres)).to(z), z[centres][None], cov[None])
    share = 0.2
    for _ in range(10):
        own = log_q + math.log1p(-share)
        others = rest.by_component(z[None]) + math.log(share)
        total = torch.logaddexp(own, torch.logsumexp(others, 1))
        part = (others - total[:, None]).exp() * weights
        share = min(max(float(part.sum()), _LEAST_PATCH), 0.5)
        rest = maximise(rest, z[None], part)
    return Blend(q, defended(rest.only(torch.isfinite(rest.log_weights[0]))), share)


def refined(pool: Pool, q: Mixture, trial: Trial, *, rounds: int = 4) -> tuple[Mixture, Trial]:
    """The best mixture after at most `rounds` refits, and the trial of it.

    Args:
        pool: all points so far; fresh draws of every refit, defended, are added.
        q: the mixture to begin with. trial: of it.
        rounds: most refits; fewer where the effective share is large or no longer grows.

    Raises:
        BudgetReached: the target's budget is used up.
    """
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
