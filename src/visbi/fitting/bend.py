r"""Mixtures that are bent (`families.bent`), and the regression that finds how.

It finds which entry comes after which, its mean and its scale, from weighted points alone, without the
potential. The entry that the others tell most about, beyond what they tell linearly and less what it tells of
them, comes last; then the one that what is left tells most about, and so on until there is nothing to be
told. What is told is counted in nats,

    log(sd of residuals, linear / quadratic),   and   Var(explained part of log r^2) / 4,

for means and for scales (log r^2 = 2 log s + log chi^2_1), less what as many features of noise would tell and
two standard errors of that. Then each entry's mean is regressed on the features of those before it, its
log-scale on the logarithms of the squared residuals and by Newton's method for the likelihood, and the mean
once more with weights 1 / s^2; features within four standard errors of nothing are left out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.families.bent import Bend, features
from visbi.families.gaussians import Mixture
from visbi.fitting.mixture import defended, moments
from visbi.fitting.refine import of_points

__all__ = ["BentProposal", "bend_of", "bent_around"]

_CROSSED = 12  # dimensions up to which products of different entries are features
_RIDGE = 1e-9
_SIGNIFICANT, _PRUNINGS = 4.0, 2  # standard errors, and how often features are left out
_LEAST = 0.02  # nats that the others must tell of an entry, and
_SURE = 2.0  # standard errors of what noise tells
_POINTS_EACH = 2.0  # in effect, for each feature, below which nothing is told
_MEAN, _VARIANCE = -1.2704, math.pi**2 / 2  # of log chi^2_1
_NEWTON = 6  # steps
_ROOM = 0.5  # nats beyond the points' log-scales
_STEEPEST = 10.0  # weight of a point, relative to the median one: with more, few points are all that counts
_TINY = 1e-12  # of a variance
_COMPONENTS = 12  # of a mixture that is bent
_AT_ONCE = 2**22  # numbers in one temporary


@dataclass(frozen=True)
class BentProposal:
    """F mixtures, each of them bent; see `pool.Proposal`.

    Attributes:
        noise: what is bent, in u.
        bend: the maps from u to z.
    """

    noise: Mixture
    bend: Bend

    def sample(self, n: int) -> Tensor:
        """(F, n, d)."""
        return self.draw(n)[0]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(F, n, d) and log q there, (F, n)."""
        u = self.noise.sample(n)
        z, log_det = self.bend.push(u)
        return z, self.noise.log_prob(u) - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """(F, N) for z (F, N, d)."""
        u, log_det = self.bend.pull(z)
        return self.noise.log_prob(u) + log_det

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(F, N) and the gradient (F, N, d) for z (F, N, d)."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            log_q = self.log_prob(leaf)
            (score,) = torch.autograd.grad(log_q.sum(), leaf)
        return log_q.detach(), score

    def better(self, other: "BentProposal", where: Tensor) -> "BentProposal":
        """These, and `other` for the fits `where`, (F,) bool."""
        return BentProposal(self.noise.better(other.noise, where), self.bend.better(other.bend, where))

    def of_fits(self, which: Tensor) -> "BentProposal":
        """Those `which`, (F,) bool."""
        if bool(which.all()):
            return self
        return BentProposal(self.noise.of_fits(which), self.bend.of_fits(which))


def bent_around(z: Tensor, weights: Tensor, *, mixed: Tensor | None = None) -> tuple[BentProposal, Tensor]:
    """Bent Gaussians, defended, of weighted points, and what entries tell of each other, (F,) nats.

    Args:
        z, weights: (F, N, d) and (F, N), which add up to one.
        mixed: (F,) bool, of which fits a bent mixture is to be made.

    >>> z = torch.randn(1, 500, 3).double()
    >>> z[..., 0] += z[..., 2].square()
    >>> bent_around(z, torch.full((1, 500), 1 / 500).double())[0].sample(4).shape
    torch.Size([1, 4, 3])
    """
    bend, nats = bend_of(z, weights)
    u, _ = bend.pull(z)
    loc, cov = moments(u, weights)
    noise = Mixture.of(torch.zeros_like(loc[..., 0]), loc, cov[:, None])
    if mixed is not None and bool(mixed.any()):
        noise = noise.better(of_points(u, weights, components=_COMPONENTS), mixed)
    return BentProposal(defended(noise), bend), nats


def bend_of(z: Tensor, weights: Tensor) -> tuple[Bend, Tensor]:
    """The bends of points z (F, N, d) with weights (F, N) that add up to one, and what they tell, (F,) nats.

    Points without weight do not count.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(1, 2000, 3).double()
    >>> x[..., 0] = x[..., 2].square() + 0.1 * x[..., 0]  # the first after the third
    >>> bend, nats = bend_of(x, torch.full((1, 2000), 1 / 2000).double())
    >>> bend.order[0].tolist()[-1], abs(float(nats) - math.log(2.01**0.5 / 0.1)) < 0.1
    (0, True)
    >>> bool(((bend.pull(x)[0].std(1) - 1).abs() < 0.05).all())
    True
    """
    n, d = z.shape[1:]
    crossed = d <= _CROSSED
    count = len(features(d, crossed=crossed)[0])
    together = max(1, _AT_ONCE // max(n * d**2, n * count, d * count**2))
    pairs = zip(z.split(together), weights.split(together), strict=True)
    bends, nats = zip(*(_bend_of(*pair, crossed=crossed) for pair in pairs), strict=True)
    whole = {name: torch.cat([bend.tensors[name] for bend in bends]) for name in bends[0].tensors}
    return Bend(**whole, crossed=crossed), torch.cat(nats)


def _bend_of(z: Tensor, weights: Tensor, *, crossed: bool) -> tuple[Bend, Tensor]:
    n = 1.0 / weights.square().sum(1)
    centre, cov = moments(z, weights)
    scale = cov.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-300)
    w = (z - centre) / scale[:, None]
    order, nats = _ordered(_Points.of(w, weights, n, crossed=crossed))
    w = w.gather(-1, order[:, None].expand_as(w))
    mean, log_scale, s = _fitted(_Points.of(w, weights, n, crossed=crossed))
    there = weights[..., None] > 0
    low, high = torch.where(there, s, torch.inf).amin(1), torch.where(there, s, -torch.inf).amax(1)
    return Bend(centre[:, 0], scale, order, mean, log_scale, low - _ROOM, high + _ROOM, crossed), nats


@dataclass(frozen=True)
class _Points:
    """Standardised points of F fits, and their features.

    Attributes:
        w: (F, N, d). weights: (F, N). n: (F,) how many they are in effect.
        each: (F, N, P) features. gram: (F, P, P) of them.
        needs: (P, d) whether a feature needs an entry.
        linear, plain: (P,) whether a feature is of degree one at most; is no product of different entries.
    """

    w: Tensor
    weights: Tensor
    n: Tensor
    each: Tensor
    gram: Tensor
    needs: Tensor
    linear: Tensor
    plain: Tensor

    @staticmethod
    def of(w: Tensor, weights: Tensor, n: Tensor, *, crossed: bool) -> "_Points":
        d = w.shape[-1]
        i, j = (index.to(w.device) for index in features(d, crossed=crossed))
        one_w = torch.cat([torch.ones_like(w[..., :1]), w], -1)
        each = one_w[..., i] * one_w[..., j]
        entry = torch.arange(1, d + 1, device=w.device)
        needs = (i[:, None] == entry) | (j[:, None] == entry)
        gram = (weights[..., None] * each).mT @ each
        return _Points(w, weights, n, each, gram, needs, j == 0, (j == 0) | (i == j))

    def mean(self, y: Tensor) -> Tensor:
        """(F, 1, K) weighted means of y (F, N, K)."""
        return self.weights[:, None] @ y

    def residuals(self, y: Tensor, allowed: Tensor) -> Tensor:
        """What features allowed (F, K, P) leave of y (F, N, K)."""
        return y - self.each @ _solved(self.gram, self.pull(y), allowed)[0]

    def pull(self, y: Tensor) -> Tensor:
        """(F, P, K) weighted sums of features times y (F, N, K)."""
        return (self.weights[..., None] * self.each).mT @ y

    def pruned(
        self,
        y: Tensor,
        allowed: Tensor,
        *,
        variance: float | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Coefficients (F, P, K) of y (F, N, K) on the features allowed (F, K, P), but for those within
        their noise.

        Args:
            y: what is regressed. allowed: on what.
            variance: of the noise; None: that of the residuals.
            weights: (F, N, K) of the points for each y, adding up to one; None: those of all.
        """
        if weights is None:
            gram, pull, weights, n = self.gram, self.pull(y), self.weights[..., None], self.n[:, None, None]
        else:
            gram = (weights.mT[..., None] * self.each[:, None]).mT @ self.each[:, None]
            pull, n = self.each.mT @ (weights * y), 1.0 / weights.square().sum(1)[..., None]
        found, tril = _solved(gram, pull, allowed)
        for _ in range(_PRUNINGS):
            noise = variance or (weights * (y - self.each @ found).square()).sum(1)[..., None]
            spread = torch.cholesky_inverse(tril).diagonal(dim1=-2, dim2=-1) * noise / n
            large = found.mT.abs() > _SIGNIFICANT * spread.sqrt()
            large[..., 0] = True  # the constant stays
            if bool((large | ~allowed).all()):
                break
            allowed = allowed & large
            found, tril = _solved(gram, pull, allowed)
        return found


def _solved(gram: Tensor, pull: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (F, P, K) of the features allowed (F, K, P), and the factors (F, K, P, P) of their Gram
    matrices.

    Args:
        gram: (F, P, P) of all features, or (F, K, P, P). pull: (F, P, K).
    """
    both = allowed[..., None] & allowed[..., None, :]
    gram = gram[:, None] if gram.ndim == 3 else gram
    eye = torch.eye(allowed.shape[-1], dtype=pull.dtype, device=pull.device)
    matrix = torch.where(both, gram, 0.0)
    diagonal = torch.where(allowed, matrix.diagonal(dim1=-2, dim2=-1) * _RIDGE + _TINY, 1.0)
    tril = torch.linalg.cholesky_ex(matrix + eye * diagonal[..., None, :])[0]
    right = torch.where(allowed, pull.mT, 0.0)[..., None]
    return torch.cholesky_solve(right, tril)[..., 0].mT, tril


def _ordered(points: _Points) -> tuple[Tensor, Tensor]:
    """The order of entries (F, d), and what each is told by those before it, in all, in nats (F,)."""
    fits, _, d = points.w.shape
    entries = torch.arange(d, device=points.w.device)
    rank = entries.repeat(fits, 1)
    left = torch.ones_like(rank, dtype=torch.bool)
    nats = torch.zeros_like(points.n)
    alone = _told_alone(points)
    for turn in range(d - 1):
        told = torch.where(left, _told(points, left), -torch.inf)
        more = told.amax(1) > _LEAST
        if not bool(more.any()):
            break
        # what tells much of others stays: of a funnel's neck its mouth tells something, too
        surplus = told - torch.where(left[:, None], alone, 0.0).sum(-1)
        best = torch.where(told > _LEAST, surplus, -torch.inf).argmax(1)
        last = (entries == best[:, None]) & more[:, None]
        nats = nats + torch.where(last, told, 0.0).sum(1)
        rank = torch.where(last, 2 * d - turn, rank)
        left = left & ~last & more[:, None]
    return rank.argsort(1), nats


def _told(points: _Points, left: Tensor) -> Tensor:
    """(F, d) nats that those `left` (F, d) tell of each entry, beyond what is told linearly."""
    w, n = points.w, points.n[:, None]
    gone = (points.needs & ~left[:, None]).any(-1)
    allowed = ~gone[:, None] & ~points.needs.T
    straight, plain = allowed & points.linear, allowed & points.plain
    bent, plainly = points.residuals(w, allowed), points.residuals(w, straight)
    by_mean = 0.5 * (points.mean(plainly.square()) / points.mean(bent.square())).log()[:, 0]
    free, linearly, scales = (each.sum(-1).double() for each in (allowed, straight, plain))
    by_mean = by_mean - 0.5 * ((n - linearly).clamp_min(1.0) / (n - free).clamp_min(1.0)).log()
    y = _log_square(bent, points.weights)
    y = y - points.mean(y)
    explained = points.mean((y - points.residuals(y, plain)).square())[:, 0]
    by_scale = 0.25 * (explained - _VARIANCE * scales / n).clamp_min(0.0)
    noise = (0.5 * (2 * (free - linearly)).sqrt() + 0.25 * _VARIANCE * (2 * scales).sqrt()) / n
    return torch.where(n > _POINTS_EACH * free, by_mean + by_scale - _SURE * noise, 0.0)


def _told_alone(points: _Points) -> Tensor:
    """(F, d, d) nats that entry k alone tells of entry j, beyond what is linear, by some of the points."""
    n, d = points.w.shape[1:]
    some = slice(None, None, math.ceil(n * d**2 / _AT_ONCE))
    w, weights = points.w[:, some], points.weights[:, some]
    weights = weights / weights.sum(1, keepdim=True)
    each = torch.stack([torch.ones_like(w), w, w.square()], -1).movedim(2, 1)  # (F, d, N, 3)
    weighted = (weights[:, None, :, None] * each).mT
    eye = torch.eye(3, dtype=w.dtype, device=w.device)

    def left_by(y: Tensor, n: int) -> Tensor:  # residuals (F, d, N, d) of y (F, 1 or d, N, d)
        gram = weighted[..., :n, :] @ each[..., :n] + _RIDGE * eye[:n, :n]
        return y - each[..., :n] @ torch.linalg.solve(gram, weighted[..., :n, :] @ y)

    def mean(y: Tensor) -> Tensor:
        return (weights[:, None, None] @ y)[..., 0, :]

    linear, bent = left_by(w[:, None], 2), left_by(w[:, None], 3)
    by_mean = 0.5 * (mean(linear.square()) / mean(bent.square()).clamp_min(1e-300)).log()
    y = _log_square(bent, weights[:, None])
    y = y - mean(y)[..., None, :]
    explained = mean(y.square()) - mean(left_by(y, 3).square())
    n_each = points.n[:, None, None]
    told = by_mean - 0.5 / n_each + 0.25 * (explained - 2 * _VARIANCE / n_each).clamp_min(0.0)
    return torch.where(torch.eye(d, dtype=torch.bool, device=w.device), 0.0, told.clamp_min(0.0))


def _log_square(r: Tensor, weights: Tensor) -> Tensor:
    """log r^2 for r (..., N, d), kept from nothing by what is tiny beside its weighted mean."""
    square = r.square()
    return (square + _TINY * (weights[..., None, :] @ square)).log()


def _fitted(points: _Points) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of means and log-scales (F, P, d), and the log-scales of all points (F, N, d)."""
    entries = torch.arange(points.w.shape[-1], device=points.w.device)
    last = torch.where(points.needs, entries, -1).amax(1)  # (P,) the last entry that a feature needs
    allowed = (last < entries[:, None]).expand(len(points.w), -1, -1)
    mean = points.pruned(points.w, allowed)
    log_scale = _scales(points, points.w - points.each @ mean, allowed & points.plain)
    s = points.each @ log_scale
    uneven = (log_scale[:, 1:] != 0).any(1)  # (F, d)
    some = uneven.any(0)
    if bool(some.any()):
        middle = torch.where(points.weights[..., None] > 0, s, torch.nan).nanmedian(1, keepdim=True).values
        weights = (2 * (middle - s)[..., some]).exp().clamp_max(_STEEPEST)
        weights = weights * points.weights[..., None]
        weights = weights / weights.sum(1, keepdim=True)
        again = points.pruned(points.w[..., some], allowed[:, some], weights=weights)
        mean[..., some] = torch.where(uneven[:, None, some], again, mean[..., some])
        log_scale = _scales(points, points.w - points.each @ mean, allowed & points.plain)
        s = points.each @ log_scale
    return mean, log_scale, s


def _scales(points: _Points, r: Tensor, allowed: Tensor) -> Tensor:
    """Coefficients (F, P, K) of the log-scales of residuals r (F, N, K)."""
    y = _log_square(r, points.weights)
    found = 0.5 * points.pruned(y, allowed, variance=_VARIANCE)
    found[:, 0] -= 0.5 * _MEAN
    allowed = (found != 0).mT
    allowed[..., 0] = True
    some = allowed.flatten(0, 1).any(0)
    each, here = points.each[..., some], allowed[..., some]
    g = found[:, some]
    eye = torch.eye(each.shape[-1], dtype=r.dtype, device=r.device)
    moving = torch.ones_like(g[:, :1, :1], dtype=torch.bool)
    for _ in range(_NEWTON):
        ratio = (r.square() * (-2 * (each @ g)).clamp(-60.0, 60.0).exp()).clamp_max(1e6)
        slope = each.mT @ (points.weights[..., None] * (1.0 - ratio))
        weight = 2 * points.weights[..., None] * ratio
        curve = (weight.mT[..., None] * each[:, None]).mT @ each[:, None]
        curve = torch.where(here[..., None] & here[..., None, :], curve, 0.0)
        diagonal = torch.where(here, 1e-6 * curve.diagonal(dim1=-2, dim2=-1) + _TINY, 1.0)
        step = torch.linalg.solve(curve + eye * diagonal[..., None, :], torch.where(here, slope.mT, 0.0))
        change = (each @ step.mT).abs().amax(1, keepdim=True)
        g = torch.where(moving, g - step.mT / change.clamp_min(1.0), g)
        moving = moving & (change.amax(-1, keepdim=True) >= 1e-3)
        if not bool(moving.any()):
            break
    found = torch.zeros_like(found)
    found[:, some] = g
    return found
