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

__all__ = ["BentProposal", "bend_of"]

_CROSSED = 12  # dimensions up to which products of different entries are features
_RIDGE = 1e-9
_SIGNIFICANT, _PRUNINGS = 4.0, 2  # standard errors, and how often features are left out
_LEAST = 0.02  # nats that the others must tell of an entry, and
_SURE = 2.0  # standard errors of what noise tells
_MEAN, _VARIANCE = -1.2704, math.pi**2 / 2  # of log chi^2_1
_NEWTON = 6  # steps
_ROOM = 0.5  # nats beyond the points' log-scales
_STEEPEST = 10.0  # weight of a point, relative to the median one: with more, few points are all that counts
_TINY = 1e-12  # of a variance
_AT_ONCE = 2**22  # numbers in one temporary


@dataclass(frozen=True)
class BentProposal:
    """A mixture that is bent, of a single fit (F = 1); see `pool.Proposal`.

    Attributes:
        noise: what is bent, in u.
        bend: the map from u to z.
    """

    noise: Mixture
    bend: Bend

    def sample(self, n: int) -> Tensor:
        """(1, n, d)."""
        return self.draw(n)[0]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(1, n, d) and log q there, (1, n)."""
        u = self.noise.sample(n)
        z, log_det = self.bend.push(u)
        return z, self.noise.log_prob(u) - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """(1, N) for z (1, N, d)."""
        u, log_det = self.bend.pull(z)
        return self.noise.log_prob(u) + log_det

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(1, N) and the gradient (1, N, d) for z (1, N, d)."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            log_q = self.log_prob(leaf)
            (score,) = torch.autograd.grad(log_q.sum(), leaf)
        return log_q.detach(), score

    def of_fits(self, which: Tensor) -> "BentProposal":
        """Itself: there is one fit."""
        assert bool(which.all())
        return self


def bend_of(z: Tensor, weights: Tensor) -> tuple[Bend, float]:
    """The bend of points z (N, d) with weights (N,), which add up to one, and what it tells, in nats.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(2000, 3).double()
    >>> x[:, 0] = x[:, 2].square() + 0.1 * x[:, 0]  # the first after the third
    >>> bend, nats = bend_of(x, torch.full((2000,), 1 / 2000).double())
    >>> bend.order.tolist()[-1], abs(nats - math.log(2.01**0.5 / 0.1)) < 0.1
    (0, True)
    >>> bool(((bend.pull(x)[0].std(0) - 1).abs() < 0.05).all())
    True
    """
    d = z.shape[1]
    n = float(1.0 / weights.square().sum())
    centre = weights @ z
    scale = (weights @ (z - centre).square()).sqrt().clamp_min(1e-300)
    w = (z - centre) / scale
    crossed = d <= _CROSSED
    order, nats = _ordered(_Points.of(w, weights, n, crossed=crossed))
    points = _Points.of(w[:, order], weights, n, crossed=crossed)
    mean, log_scale, s = _fitted(points)
    low, high = s.amin(0) - _ROOM, s.amax(0) + _ROOM
    return Bend(centre, scale, order, mean, log_scale, low, high, crossed), nats


@dataclass(frozen=True)
class _Points:
    """Standardised points and their features.

    Attributes:
        w: (N, d). weights: (N,). n: how many they are in effect.
        each: (N, P) features. gram: (P, P) of them.
        needs: (P, d) whether a feature needs an entry.
        linear, plain: (P,) whether a feature is of degree one at most; is no product of different entries.
    """

    w: Tensor
    weights: Tensor
    n: float
    each: Tensor
    gram: Tensor
    needs: Tensor
    linear: Tensor
    plain: Tensor

    @staticmethod
    def of(w: Tensor, weights: Tensor, n: float, *, crossed: bool) -> "_Points":
        d = w.shape[1]
        i, j = (index.to(w.device) for index in features(d, crossed=crossed))
        one_w = torch.cat([torch.ones_like(w[:, :1]), w], 1)
        each = one_w[:, i] * one_w[:, j]
        entry = torch.arange(1, d + 1, device=w.device)
        needs = (i[:, None] == entry) | (j[:, None] == entry)
        gram = (weights[:, None] * each).T @ each
        return _Points(w, weights, n, each, gram, needs, j == 0, (j == 0) | (i == j))

    def residuals(self, y: Tensor, allowed: Tensor) -> Tensor:
        """What features allowed (K, P) leave of y (N, K)."""
        return y - self.each @ _solved(self.gram, self.pull(y), allowed)[0]

    def pull(self, y: Tensor) -> Tensor:
        """(P, K) weighted sums of features times y (N, K)."""
        return (self.weights[:, None] * self.each).T @ y

    def pruned(
        self,
        y: Tensor,
        allowed: Tensor,
        *,
        variance: float | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Coefficients (P, K) of y (N, K) on the features allowed (K, P), but for those within their noise.

        Args:
            y: what is regressed. allowed: on what.
            variance: of the noise; None: that of the residuals.
            weights: (N, K) of the points for each y, adding up to one; None: those of all.
        """
        if weights is None:
            gram, pull, weights, n = self.gram, self.pull(y), self.weights[:, None], self.n
        else:
            gram = (weights.T[:, :, None] * self.each).mT @ self.each
            pull, n = self.each.T @ (weights * y), 1.0 / weights.square().sum(0)[:, None]
        found, tril = _solved(gram, pull, allowed)
        for _ in range(_PRUNINGS):
            noise = variance or (weights * (y - self.each @ found).square()).sum(0)[:, None]
            spread = torch.cholesky_inverse(tril).diagonal(dim1=-2, dim2=-1) * noise / n
            large = found.T.abs() > _SIGNIFICANT * spread.sqrt()
            large[:, 0] = True  # the constant stays
            if bool((large | ~allowed).all()):
                break
            allowed = allowed & large
            found, tril = _solved(gram, pull, allowed)
        return found


def _solved(gram: Tensor, pull: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (P, K) of the features allowed (K, P), and the factors (K, P, P) of their Gram matrices.

    Args:
        gram: (P, P) of all features, or (K, P, P). pull: (P, K).
    """
    both = allowed[:, :, None] & allowed[:, None]
    eye = torch.eye(allowed.shape[1], dtype=pull.dtype, device=pull.device)
    matrix = torch.where(both, gram, 0.0)
    diagonal = torch.where(allowed, matrix.diagonal(dim1=-2, dim2=-1) * _RIDGE + _TINY, 1.0)
    tril = torch.linalg.cholesky_ex(matrix + eye * diagonal[:, None])[0]
    right = torch.where(allowed, pull.T, 0.0)[..., None]
    return torch.cholesky_solve(right, tril)[..., 0].T, tril


def _ordered(points: _Points) -> tuple[Tensor, float]:
    """The order of entries (d,), and what each is told by those before it, in all, in nats."""
    d = points.w.shape[1]
    left, last, nats = list(range(d)), [], 0.0
    alone = _told_alone(points)
    while len(left) > 1:
        gone = points.needs[:, [k for k in range(d) if k not in left]].any(1)
        told = _told(points, left, gone)
        if not float(told.max()) > _LEAST:
            break
        # what tells much of others stays: of a funnel's neck its mouth tells something, too
        best = int(torch.where(told > _LEAST, told - alone[left][:, left].sum(1), -torch.inf).argmax())
        nats += float(told[best])
        last.append(left.pop(best))
    return torch.tensor([*left, *reversed(last)], device=points.w.device), nats


def _told(points: _Points, entries: list[int], gone: Tensor) -> Tensor:
    """(K,) nats that the others tell of each entry, beyond what is told linearly; `gone` features are out."""
    w, n = points.w[:, entries], points.n
    allowed = ~gone & ~points.needs.T[entries]
    straight, plain = allowed & points.linear, allowed & points.plain
    bent, plainly = points.residuals(w, allowed), points.residuals(w, straight)
    by_mean = 0.5 * ((points.weights @ plainly.square()) / (points.weights @ bent.square())).log()
    free, linearly, scales = (each.sum(1).double() for each in (allowed, straight, plain))
    by_mean = by_mean - 0.5 * ((n - linearly).clamp_min(1.0) / (n - free).clamp_min(1.0)).log()
    y = _log_square(bent, points.weights)
    y = y - points.weights @ y
    explained = points.weights @ (y - points.residuals(y, plain)).square()
    by_scale = 0.25 * (explained - _VARIANCE * scales / n).clamp_min(0.0)
    noise = (0.5 * (2 * (free - linearly)).sqrt() + 0.25 * _VARIANCE * (2 * scales).sqrt()) / n
    return by_mean + by_scale - _SURE * noise


def _told_alone(points: _Points) -> Tensor:
    """(d, d) nats that entry k alone tells of entry j, beyond what is linear, by some of the points."""
    d = points.w.shape[1]
    some = slice(None, None, math.ceil(len(points.w) * d**2 / _AT_ONCE))
    w, weights = points.w[some], points.weights[some] / points.weights[some].sum()
    each = torch.stack([torch.ones_like(w), w, w.square()], -1).movedim(1, 0)  # (d, N, 3)
    weighted = (weights[:, None] * each).mT
    eye = torch.eye(3, dtype=w.dtype, device=w.device)

    def left_by(y: Tensor, n: int) -> Tensor:  # residuals (d, N, d) of y (N, d), or (d, N, d)
        some = each[..., :n]
        gram = weighted[:, :n] @ some + _RIDGE * eye[:n, :n]
        return y - some @ torch.linalg.solve(gram, weighted[:, :n] @ y)

    linear, bent = left_by(w, 2), left_by(w, 3)
    by_mean = 0.5 * ((weights @ linear.square()) / (weights @ bent.square()).clamp_min(1e-300)).log()
    y = _log_square(bent, weights)
    y = y - (weights @ y)[:, None]
    explained = weights @ y.square() - weights @ left_by(y, 3).square()
    told = by_mean - 0.5 / points.n + 0.25 * (explained - 2 * _VARIANCE / points.n).clamp_min(0.0)
    return told.clamp_min(0.0).fill_diagonal_(0.0)


def _log_square(r: Tensor, weights: Tensor) -> Tensor:
    square = r.square()
    return (square + _TINY * (weights @ square)[..., None, :]).log()


def _fitted(points: _Points) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of means and log-scales (P, d), and the log-scales of all points (N, d)."""
    entries = torch.arange(points.w.shape[1], device=points.w.device)
    last = torch.where(points.needs, entries, -1).amax(1)  # (P,) the last entry that a feature needs
    allowed = last < entries[:, None]
    mean = points.pruned(points.w, allowed)
    log_scale = _scales(points, points.w - points.each @ mean, allowed & points.plain)
    s = points.each @ log_scale
    uneven = (log_scale[1:] != 0).any(0)
    if bool(uneven.any()):
        weights = (2 * (s.median(0).values - s)[:, uneven]).exp().clamp_max(_STEEPEST)
        weights = weights * points.weights[:, None]
        weights = weights / weights.sum(0)
        mean[:, uneven] = points.pruned(points.w[:, uneven], allowed[uneven], weights=weights)
        log_scale = _scales(points, points.w - points.each @ mean, allowed & points.plain)
        s = points.each @ log_scale
    return mean, log_scale, s


def _scales(points: _Points, r: Tensor, allowed: Tensor) -> Tensor:
    """Coefficients (P, K) of the log-scales of residuals r (N, K)."""
    y = _log_square(r, points.weights)
    found = 0.5 * points.pruned(y, allowed, variance=_VARIANCE)
    found[0] -= 0.5 * _MEAN
    allowed = (found != 0).T
    allowed[:, 0] = True
    some = allowed.any(0)
    each, here = points.each[:, some], allowed[:, some]
    g = found[some]
    eye = torch.eye(each.shape[1], dtype=r.dtype, device=r.device)
    for _ in range(_NEWTON):
        ratio = (r.square() * (-2 * (each @ g)).clamp(-60.0, 60.0).exp()).clamp_max(1e6)
        slope = each.T @ (points.weights[:, None] * (1.0 - ratio))
        weight = 2 * points.weights[:, None] * ratio
        curve = (weight.T[:, :, None] * each).mT @ each
        curve = torch.where(here[:, :, None] & here[:, None], curve, 0.0)
        diagonal = torch.where(here, 1e-6 * curve.diagonal(dim1=-2, dim2=-1) + _TINY, 1.0)
        step = torch.linalg.solve(curve + eye * diagonal[:, None], torch.where(here, slope.T, 0.0))
        change = (each @ step.T).abs().amax(0)
        g = g - step.T / change.clamp_min(1.0)
        if float(change.max()) < 1e-3:
            break
    found = torch.zeros_like(found)
    found[some] = g
    return found
