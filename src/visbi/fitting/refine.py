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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visbi.core.logs import exp_, log_sum_exp
from visbi.core.rows import leading, picked
from visbi.families.gaussians import Mixture
from visbi.fitting.em import expectation_maximisation, maximise
from visbi.fitting.explore import Exploration
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import defended, local_covariances, merged, spread_out
from visbi.fitting.pool import Pool, Proposal, Trial, thinned
from visbi.fitting.target import Target

__all__ = [
    "COMPONENTS",
    "ENOUGH",
    "HOPELESS",
    "Blend",
    "around",
    "from_particles",
    "matched",
    "of_points",
    "patch",
    "refined",
    "weighed",
]

TRIAL = 4096
"""Draws that say how good a proposal is, where nothing else is asked for."""
POINTS = 4096
"""Most weighted points that EM runs on, likewise."""
ROUNDS = 4
"""Most refits."""
COMPONENTS = 24
"""Of a first mixture, where nothing asks for more."""
_MOST_COMPONENTS = 64
_NEW = 12  # components that a refit may add; twice as many
_POOR = 0.5  # where the share of the mixture before was lower
_NOWHERE = -1e6  # nats: as low as q needs to be taken for
_PATCH = 0.7  # nats by which q is low where a patch starts
_LEAST_PATCH = 0.02
ENOUGH = 0.8
"""Effective share that no refit need improve."""
_EVENLY = 0.2  # of the mass of matched Gaussians
_LEAST_WEIGHT = 1e-3  # of the mass, shared evenly by components that were weighed
HOPELESS = 14.0
"""Nats of local evidence below the best beyond which a matched Gaussian is dropped."""


def matched(
    target: Target, starts: Tensor, cov: Tensor, *, batch: int | None = None, max_iters: int = 10
) -> Mixture:
    """Mixtures of the unlike Gaussians matched from starts (F, K, d) with covariances (F, K, d, d).

    At most `COMPONENTS` each; what ends far below the best is dropped. Each weighs as much as the evidence
    that it stands for, exp(ELBO), which is exact where a mode is Gaussian; for modes that are not, a part of
    the mass is shared evenly.

    Args:
        target: of F potentials.
        starts, cov: what is matched from.
        batch: draws of an iteration; None is max(2 d, 32).
        max_iters: most iterations.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> centre = torch.tensor([2.0, 0.0], dtype=torch.float64)
    >>> def log_p(theta):
    ...     each = [-50 * (theta - side * centre).square().sum(-1) for side in (1, -1)]
    ...     return torch.logaddexp(*each)
    >>> starts = torch.stack([0.9 * centre, -0.9 * centre, 1.1 * centre])[None]
    >>> cov = 0.01 * torch.eye(2).double().expand(1, 3, 2, 2)
    >>> found = matched(Target(log_p, coordinates(prior)), starts, cov)
    >>> sorted(found.loc[0, :, 0].tolist())
    [-2.0, 2.0]
    """
    fits, k, d = starts.shape
    batch = max(2 * d, 32) if batch is None else batch
    match = match_gaussian(target, starts.flatten(0, 1), cov.flatten(0, 1), batch=batch, max_iters=max_iters)
    elbo = match.elbo.reshape(fits, k).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    best = elbo.amax(1, keepdim=True)
    good = (elbo >= best - HOPELESS) | ~torch.isfinite(best)
    log_weights = torch.where(good, elbo.nan_to_num(neginf=0.0), -torch.inf)
    found = Mixture.of(log_weights, match.loc.reshape(fits, k, d), match.cov.reshape(fits, k, d, d))
    unlike = merged(found.only(good), elbo[:, good.any(0)], COMPONENTS)
    return _partly_even(unlike, unlike.log_weights, _EVENLY)


def weighed(q: Mixture, trial: Trial) -> Mixture:
    """Each q with the weights that draws of it, or of it spread wider, say that its components have.

    One step of EM for the weights alone: each component's share of the weighted draws. A component of which
    there were none keeps what `_LEAST_WEIGHT` of the mass, shared evenly, gives it.

    >>> from visbi.fitting.mixture import defended
    >>> loc, one = torch.tensor([[[-9.0], [9.0]]]).double(), torch.ones(1, 2, 1, 1).double()
    >>> p, q = (Mixture.of(torch.tensor([w]).double().log(), loc, one) for w in ([0.3, 0.7], [0.5, 0.5]))
    >>> z = defended(q).sample(20_000)
    >>> weighed(q, Trial.of(z, p.log_prob(z), defended(q).log_prob(z))).log_weights.exp()
    tensor([[0.30, 0.70]], dtype=torch.float64)
    """
    weights = torch.softmax(trial.smooth, 1)
    part = q.by_component(trial.z)
    share = (exp_(part - log_sum_exp(part, 1)[:, None]) @ weights[..., None])[..., 0]
    return _partly_even(q, share.log(), _LEAST_WEIGHT)


def _partly_even(q: Mixture, log_weights: Tensor, part: float) -> Mixture:
    """q with these weights, but for a part of the mass that its components share evenly."""
    there = torch.isfinite(q.log_weights)
    even = torch.where(there, -there.sum(1, keepdim=True).double().log(), -torch.inf)
    both = torch.logaddexp(log_weights + math.log1p(-part), even + math.log(part))
    return replace(q, log_weights=both)


def around(z: Tensor, weights: Tensor | None = None) -> Mixture:
    """Mixtures that cover points z (F, N, d): EM from local covariances that reach all of them.

    Args:
        z: (F, N, d), N >= 2.
        weights: (F, N), zero or not: points without weight do not count. None: all count.
    """
    counts = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if weights is None else weights > 0
    even = counts.to(z) / counts.sum(1, keepdim=True)
    n = min(_NEW, z.shape[1])
    centres = picked(z, spread_out(z, even, n))
    near = (counts.sum(1) // n).clamp_min(max(2 * z.shape[-1], 20))
    return _fitted(z, even, centres, local_covariances(z, centres, near, even))


def from_particles(seen: Exploration, most: int = POINTS, *, components: int = COMPONENTS) -> Mixture:
    """EM on all that the explorer saw, weighted, at most `most` points of it, from local covariances.

    Args:
        seen: what it saw.
        most: points.
        components: as many at most, and no more than there are points for.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> from visbi.fitting.explore import explore
    >>> seen = explore(Target(prior.log_prob, coordinates(prior)), 256)
    >>> from_particles(seen).sample(10).shape
    torch.Size([1, 10, 2])
    """
    return of_points(*thinned(*seen.weighted(), most), components=components)


def of_points(z: Tensor, weights: Tensor, *, components: int) -> Mixture:
    """EM on weighted points (F, M, d), from local covariances, with no more components than points allow."""
    d = z.shape[-1]
    room = ((weights > 0).sum(1) // (3 * d + 10)).clamp(1, components)
    centres = picked(z, spread_out(z, weights, int(room.max())))
    return _fitted(z, weights, centres, local_covariances(z, centres, max(4 * d, 40), weights), room)


def _fitted(z: Tensor, weights: Tensor, centres: Tensor, cov: Tensor, room: Tensor | None = None) -> Mixture:
    """EM from Gaussians at centres (F, C, d), of each fit the first `room` (F,)."""
    start = Mixture.of(torch.zeros(centres.shape[:2]).to(z), centres, cov)
    start = start if room is None else start.only(leading(room, centres.shape[1]))
    fitted = expectation_maximisation(start, z, weights)
    return fitted.only(torch.isfinite(fitted.log_weights))


@dataclass(frozen=True)
class Blend:
    """Proposals of which a share (F,) is given to a mixture."""

    main: Proposal
    rest: Mixture
    share: Tensor

    def sample(self, n: int) -> Tensor:
        """(F, n, d), in random order; the share is rounded up or down."""
        return self.draw(n)[0]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """The same with log q there, (F, n)."""
        given = torch.rand(len(self.share), n, device=self.share.device).argsort(1)
        given = given < (self.share * n).round()[:, None]
        of_rest, (of_main, log_main) = self.rest.sample(n), self.main.draw(n)
        z = torch.where(given[..., None], of_rest, of_main)
        return z, self._joint(torch.where(given, self.main.log_prob(of_rest), log_main), z)

    def log_prob(self, z: Tensor) -> Tensor:
        """(F, N)."""
        return self._joint(self.main.log_prob(z), z)

    def _joint(self, log_main: Tensor, z: Tensor) -> Tensor:
        share = self.share[:, None]
        return torch.logaddexp(log_main + torch.log1p(-share), self.rest.log_prob(z) + share.log())

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q (F, N) and its gradient (F, N, d)."""
        share = self.share[:, None]
        log_main, main = self.main.log_prob_and_score(z)
        log_rest, rest = self.rest.log_prob_and_score(z)
        log_main, log_rest = log_main + torch.log1p(-share), log_rest + share.log()
        total = torch.logaddexp(log_main, log_rest)
        return total, (log_main - total).exp()[..., None] * main + (log_rest - total).exp()[..., None] * rest

    def of_fits(self, which: Tensor) -> "Blend":
        """Those `which`, (F,) bool."""
        if bool(which.all()):
            return self
        return Blend(self.main.of_fits(which), self.rest.of_fits(which), self.share[which])


def patch(pool: Pool, q: Proposal) -> Blend:
    """q with a mixture where it is too low: EM on all points, with q as one component that stays as it is.

    The share of q's mass that the mixture takes is at most a half.
    """
    z, weights = pool.points(2 * POINTS)
    log_q = q.log_prob(z)
    centres = picked(z, spread_out(z, _where_low(weights, log_q, _PATCH), _NEW))
    cov = local_covariances(z, centres, max(4 * z.shape[-1], 40), weights)
    rest = Mixture.of(torch.zeros(centres.shape[:2]).to(z), centres, cov)
    share = torch.full((len(z), 1), 0.2).to(z)
    for _ in range(10):
        own = log_q + torch.log1p(-share)
        others = rest.by_component(z) + share[..., None].log()
        total = torch.logaddexp(own, log_sum_exp(others, 1))
        part = exp_(others - total[:, None]) * weights[:, None]
        share = part.sum((1, 2))[:, None].clamp(_LEAST_PATCH, 0.5)
        rest = maximise(rest, z, part)
    return Blend(q, defended(rest.only(torch.isfinite(rest.log_weights))), share[:, 0])


def refined(
    pool: Pool,
    q: Mixture,
    trial: Trial,
    *,
    rounds: int = ROUNDS,
    n: int = TRIAL,
    points: int = POINTS,
    least: float = 0.0,
) -> tuple[Mixture, Trial, Tensor]:
    """The best mixtures after at most `rounds` refits, and the trial of them.

    And (F,) how steady that is: the lower share of the last two trials. Where a mixture has all of the mass
    its refits are alike; where it lacks some, a share is large as long as no draw meets what is lacking, and
    next to nothing for the refit after one did.

    Args:
        pool: all points so far; fresh draws of every refit, defended, are added.
        q: the mixtures to begin with. trial: of them, with a share of 0 where that is no measure any more.
        rounds: most refits; fewer where the effective share of every fit is large or no longer grows.
        n: draws in a trial. points: most of them that EM runs on.
        least: points in effect that EM wants: where the pool has fewer, their weights are tempered.

    Raises:
        BudgetReached: the target's budget is used up.
    """
    best, best_trial, current = q, trial, q
    over = torch.zeros_like(trial.share, dtype=torch.bool)
    shares = [trial.share]
    for _ in range(rounds):
        over |= best_trial.share > ENOUGH
        if bool(over.all()):
            break
        new = torch.where(shares[-1] < _POOR, 2 * _NEW, _NEW)
        current = _refit(pool, current, points, least, new)
        fresh = pool.draw(defended(current), n)
        shares.append(fresh.share)
        over |= (fresh.share <= 1.05 * best_trial.share) & (fresh.share > 0.3)
        higher = fresh.share > best_trial.share
        best, best_trial = best.better(current, higher), best_trial.better(fresh, higher)
    last = torch.stack(shares[-2:])
    return best, best_trial, torch.where(last > 0, last, last.amax(0)).amin(0)


def _refit(pool: Pool, q: Mixture, points: int, least: float, new: Tensor) -> Mixture:
    """With at most `new` (F,) components more."""
    z, weights = pool.points(points, least=least)
    d = z.shape[-1]
    room = ((weights > 0).sum(1) // (3 * d + 10)).minimum(new)
    most = _MOST_COMPONENTS - int(room.max())
    if q.loc.shape[1] > most:  # what is new may be a mode; the lightest of the others make room
        lightest = q.log_weights.topk(most, 1).values[:, -1:]
        q = q.only((q.log_weights >= lightest) & torch.isfinite(q.log_weights))
    if bool((room > 0).any()):
        # where the weighted points are denser than q
        excess = _where_low(weights, q.log_prob(z), 0.0)
        centres = picked(z, spread_out(z, excess, int(room.max())))
        cov = local_covariances(z, centres, max(4 * d, 40), weights)
        added = Mixture.of(torch.zeros(centres.shape[:2]).to(z), centres, cov)
        both = q.with_(added, 0.5)
        old = torch.isfinite(q.log_weights)
        q = both.only(torch.cat([old, leading(room, centres.shape[1])], 1))
    fitted = expectation_maximisation(q, z, weights)
    return fitted.only(torch.isfinite(fitted.log_weights))


def _where_low(weights: Tensor, log_q: Tensor, by: float) -> Tensor:
    """Weights (F, N) of points where q is lower than they ask for by more than `by` nats, adding up to 1."""
    log_q = log_q.clamp_min(_NOWHERE)  # a flow may have no density at all where they are
    density = torch.where(weights > 0, weights.log() - log_q, -torch.inf)
    low = weights * torch.sigmoid(density - _weighted_median(density, weights) - by)
    return low / low.sum(1, keepdim=True)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """(F, 1)."""
    order = values.argsort(1)
    half = torch.full((len(values), 1), 0.5).to(values)
    middle = torch.searchsorted(weights.gather(1, order).cumsum(1), half).clamp_max(values.shape[1] - 1)
    return values.gather(1, order.gather(1, middle))
