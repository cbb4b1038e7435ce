r"""Mixtures of Gaussians as plain tensors, many at a time.

    q(z) = sum_k w_k N(z; m_k, L_k L_k')

A leading axis F holds independent mixtures: one for each fit. Components of weight zero (log-weight -inf) are
allowed, so that mixtures of different sizes share one tensor. Everything is float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from visbi.core.logs import exp_, log_sum_exp
from visbi.fitting.rows import trues_first

__all__ = [
    "POLYNOMIAL_DIMENSIONS",
    "Mixture",
    "defence",
    "defended",
    "local_covariances",
    "merged",
    "monomials",
    "spread_out",
]

_DEFENCE = ((2.5, 0.08), (6.0, 0.02))  # radii in spreads of the typical shell, and shares
POLYNOMIAL_DIMENSIONS = 16  # up to which log-densities are polynomials: one matrix product for all
_STEEPEST = 1e9  # of a quadratic coefficient times a distance squared: its rounding is 1e-7 nats
_AT_ONCE = 2**18  # numbers in one temporary: more do not fit into a cache
_FEW_COMPONENTS = 6
_LEAST = 1e-8  # smallest variance of a neighbourhood, relative to that of all points
_ALIKE = 0.5  # Bhattacharyya distance below which two components are one


@dataclass(frozen=True)
class Mixture:
    """F mixtures of K Gaussians.

    Attributes:
        log_weights: (F, K), normalised.
        loc: (F, K, d).
        tril: (F, K, d, d), lower Cholesky factors of the covariances.

    >>> loc = torch.tensor([[[-9.0], [9.0]]], dtype=torch.float64)
    >>> q = Mixture.of(torch.zeros(1, 2), loc, torch.ones(1, 2, 1, 1, dtype=torch.float64))
    >>> int((q.sample(100) > 0).sum())
    50
    >>> q.log_prob(torch.zeros(1, 1, 1, dtype=torch.float64))
    tensor([[-41.4189]], dtype=torch.float64)
    """

    log_weights: Tensor
    loc: Tensor
    tril: Tensor

    @staticmethod
    def of(log_weights: Tensor, loc: Tensor, cov: Tensor) -> "Mixture":
        """From covariances (F, K, d, d) and weights that need not be normalised."""
        return Mixture(torch.log_softmax(log_weights, -1), loc, _cholesky(cov))

    @property
    def cov(self) -> Tensor:
        """(F, K, d, d)."""
        return self.tril @ self.tril.mT

    @cached_property
    def _inverse(self) -> Tensor:
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return torch.linalg.solve_triangular(self.tril, eye.expand_as(self.tril), upper=False)

    @cached_property
    def _log_norm(self) -> Tensor:
        log_det = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_weights - log_det - 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)

    @cached_property
    def _quadratic(self) -> tuple[Tensor, Tensor] | None:
        """Coefficients about the middle of the components, and that, (F, 1, d)."""
        centre = self.loc.mean(1, keepdim=True)
        coefficients = self.about(centre)
        return None if coefficients is None else (coefficients, centre)

    def about(self, centre: Tensor) -> Tensor | None:
        """Coefficients (F, K, P) of every component's log-density as a polynomial in z - centre (F, 1, d).

        They belong to the `monomials`. None where rounding would show: for components too narrow for where
        they are, or for many dimensions.
        """
        d = self.loc.shape[-1]
        if d > POLYNOMIAL_DIMENSIONS:
            return None
        m = self.loc - centre
        precision = self._inverse.mT @ self._inverse
        pull = (precision @ m[..., None])[..., 0]
        steep = precision.diagonal(dim1=-2, dim2=-1).amax() * (m.abs().amax() + 1).square()
        if not float(steep) < _STEEPEST:
            return None
        i, j = torch.triu_indices(d, d, device=m.device)
        twice = torch.where(i == j, 1.0, 2.0).to(m)
        constant = self._log_norm - 0.5 * (m * pull).sum(-1)
        square = -0.5 * twice * precision[..., i, j]
        # a component without weight has a constant of -inf, which times zero would be NaN elsewhere
        return torch.cat([constant[..., None], pull, square], -1).nan_to_num(neginf=-1e300)

    def by_component(self, z: Tensor) -> Tensor:
        """log of w_k N(z; m_k, S_k), (F, K, N), for z (F, N, d)."""
        return torch.cat(list(self._by_component(z)), -1)

    def _by_component(self, z: Tensor) -> Iterator[Tensor]:
        """The same in pieces that fit a cache."""
        quadratic = self._quadratic
        if quadratic is not None:
            coefficients, centre = quadratic
            step = max(64, _AT_ONCE // (len(z) * max(coefficients.shape[-2:])))
            for piece in z.split(step, 1):
                yield coefficients @ monomials(piece - centre).mT
            return
        shift = (self._inverse @ self.loc[..., None]).mT  # (F, K, 1, d)
        step = max(64, _AT_ONCE // self.loc.numel())
        for piece in z.split(step, 1):
            u = piece[:, None] @ self._inverse.mT - shift
            yield self._log_norm[..., None] - 0.5 * u.square().sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """(F, N) for z (F, N, d)."""
        return torch.cat([log_sum_exp(piece, 1) for piece in self._by_component(z)], -1)

    def at_least(self, z: Tensor) -> Tensor:
        """(F, N) a bound of log q from below, by log K at most, for a third of the cost: its largest part."""
        return torch.cat([piece.amax(1) for piece in self._by_component(z)], -1)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q (F, N) and its gradient (F, N, d) at z (F, N, d)."""
        joint = self.by_component(z)
        total = log_sum_exp(joint, 1)
        share = exp_(joint - total[:, None])
        # sum over k of share_k S_k^-1 (m_k - z), with S_k^-1 = L_k^-T L_k^-1
        precision = self._inverse.mT @ self._inverse
        pull = (precision @ self.loc[..., None])[..., 0]
        score = share.mT @ pull
        for k in range(self.loc.shape[1]):
            score = score - share[:, k, :, None] * (z @ precision[:, k])
        return total, score

    def sample(self, n: int) -> Tensor:
        """n draws of each, (F, n, d), in random order; components get their share rounded up or down."""
        fits, like = len(self.loc), self.loc
        edges = self.log_weights.exp().cumsum(-1)
        steps = torch.arange(n, dtype=like.dtype, device=like.device)
        points = (torch.rand(fits, 1, dtype=like.dtype, device=like.device) + steps) / n * edges[:, -1:]
        which = torch.searchsorted(edges, points).clamp_max(like.shape[1] - 1)
        which = which.gather(1, torch.rand_like(points).argsort(1))
        index = which + like.shape[1] * torch.arange(fits, device=like.device)[:, None]
        u = torch.randn(fits, n, like.shape[-1], dtype=like.dtype, device=like.device)
        if like.shape[1] <= _FEW_COMPONENTS:
            moved = torch.zeros_like(u)
            for k in range(like.shape[1]):
                moved = torch.where((which == k)[..., None], u @ self.tril[:, k].mT, moved)
        else:
            moved = _rows(self.tril, index, u)
        return like.flatten(0, 1)[index] + moved

    def with_(self, other: "Mixture", share: float) -> "Mixture":
        """This mixture with `share` of its mass given to another."""
        log_weights = [self.log_weights + math.log1p(-share), other.log_weights + math.log(share)]
        return Mixture(
            torch.cat(log_weights, 1),
            torch.cat([self.loc, other.loc], 1),
            torch.cat([self.tril, other.tril], 1),
        )

    def widened(self, factor: float) -> "Mixture":
        """Covariances times `factor`."""
        return Mixture(self.log_weights, self.loc, self.tril * math.sqrt(factor))

    def only(self, keep: Tensor) -> "Mixture":
        """The components `keep`, (F, K) bool, at least one of each mixture; weights are normalised again.

        A component that only some of the mixtures keep stays, without weight, in the others.
        """
        there = keep.any(0)
        log_weights = torch.where(keep, self.log_weights, -torch.inf)[:, there]
        return Mixture(torch.log_softmax(log_weights, -1), self.loc[:, there], self.tril[:, there])

    def better(self, other: "Mixture", where: Tensor) -> "Mixture":
        """These mixtures, and `other` for the fits `where`, (F,) bool."""
        if bool(where.all()) or not bool(where.any()):
            return other if bool(where.all()) else self
        where = where[:, None]
        mine = torch.where(where, -torch.inf, self.log_weights)
        others = torch.where(where, other.log_weights, -torch.inf)
        loc, tril = torch.cat([self.loc, other.loc], 1), torch.cat([self.tril, other.tril], 1)
        both = Mixture(torch.cat([mine, others], 1), loc, tril)
        order = trues_first(torch.isfinite(both.log_weights))
        rows = torch.arange(len(loc), device=loc.device)[:, None]
        front = Mixture(both.log_weights.gather(1, order), loc[rows, order], tril[rows, order])
        return front.only(torch.isfinite(front.log_weights))

    def of_fits(self, which: Tensor) -> "Mixture":
        """The mixtures `which`, (F,) bool."""
        return Mixture(self.log_weights[which], self.loc[which], self.tril[which])


def defence(dim: int) -> tuple[tuple[float, float], ...]:
    """Factors by which part of a proposal is spread wider, and the shares of its mass.

    The norm of a standard normal vector lies near sqrt(d) with a spread of sqrt(1/2): a factor of
    1 + r / sqrt(2 d) moves that shell outwards by r of its spreads, in any dimension.

    >>> defence(2)
    ((2.25, 0.08), (4.0, 0.02))
    """
    return tuple((1 + radius / math.sqrt(2 * dim), share) for radius, share in _DEFENCE)


def defended(q: Mixture) -> Mixture:
    """q with a tenth of its mass spread wider, so that weights at its edge stay bounded.

    The defensive mixture of Hesterberg (1995) with q's own shape for the wide part; see `defence`.

    >>> loc, cov = torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None, None]
    >>> defended(Mixture.of(torch.zeros(1, 1).double(), loc, cov)).log_weights.exp()
    tensor([[0.9016, 0.0784, 0.0200]], dtype=torch.float64)
    """
    wide = q
    for factor, share in defence(q.loc.shape[-1]):
        wide = wide.with_(q.widened(factor**2), share)
    return wide


def merged(mixture: Mixture, score: Tensor, most: int) -> Mixture:
    """At most `most` unlike components of each mixture, best `score` first, with equal weights.

    Two are alike if their Bhattacharyya distance is below `_ALIKE`:
    (m - n)' [(S + T) / 2]^-1 (m - n) / 8 + log(|(S + T) / 2| / sqrt(|S| |T|)) / 2.

    Args:
        mixture: F mixtures of K components; those without weight are left out.
        score: (F, K). most: at least 1.

    >>> loc = torch.tensor([[[0.0], [0.1], [9.0]]], dtype=torch.float64)
    >>> q = Mixture.of(torch.zeros(1, 3).double(), loc, torch.ones(1, 3, 1, 1).double())
    >>> merged(q, torch.tensor([[1.0, 2.0, 3.0]]), 5).loc.flatten().tolist()
    [9.0, 0.1]
    """
    alive = torch.isfinite(mixture.log_weights)
    order = torch.where(alive, score, -torch.inf).argsort(1, descending=True)
    distance = _bhattacharyya(mixture)
    kept = torch.zeros_like(alive)
    fit = torch.arange(len(order), device=order.device)
    for k in order.T:
        alike = ((distance[fit, k] < _ALIKE) & kept).any(1)
        kept[fit, k] = alive[fit, k] & ~alike & (kept.sum(1) < most)
    front = trues_first(kept.gather(1, order))
    chosen = order.gather(1, front)[:, : int(kept.sum(1).max())]
    log_weights = torch.where(kept.gather(1, chosen), 0.0, -torch.inf).to(mixture.log_weights)
    return Mixture(
        torch.log_softmax(log_weights, -1),
        mixture.loc[fit[:, None], chosen],
        mixture.tril[fit[:, None], chosen],
    )


def _bhattacharyya(mixture: Mixture) -> Tensor:
    """(F, K, K) distances between the components of each mixture."""
    cov = mixture.cov
    log_det = 2 * mixture.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    both = _cholesky(0.5 * (cov[:, :, None] + cov[:, None]))
    gap = mixture.loc[:, :, None] - mixture.loc[:, None]
    between = torch.linalg.solve_triangular(both, gap[..., None], upper=False)[..., 0].square().sum(-1)
    middle = 2 * both.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return between / 8 + 0.5 * (middle - 0.5 * (log_det[:, :, None] + log_det[:, None]))


def spread_out(z: Tensor, weights: Tensor, n: int) -> Tensor:
    """Indices (F, n) of points z (F, N, d), spread out.

    Each is drawn by its weight times the squared distance to the nearest one drawn before, in units of the
    points' own covariance (k-means++; Arthur, Vassilvitskii 2007). Where no other point of positive weight
    lies apart from those drawn, some come twice.

    Args:
        z: (F, N, d). weights: (F, N), adding up to one.
        n: how many of each fit.

    >>> z = torch.tensor([[[0.0], [0.0], [5.0]]], dtype=torch.float64)
    >>> sorted(z[0, spread_out(z, torch.full((1, 3), 1 / 3).double(), 2)[0], 0].tolist())
    [0.0, 5.0]
    """
    centre = z - (weights[..., None] * z).sum(1, keepdim=True)
    cov = (weights[..., None] * centre).mT @ centre
    y = torch.linalg.solve_triangular(_cholesky(cov), centre.mT, upper=False).mT
    fit = torch.arange(len(z), device=z.device)
    chosen = [torch.multinomial(weights, 1)[:, 0]]
    nearest = (y - y[fit, chosen[0]][:, None]).square().sum(-1)
    for _ in range(n - 1):
        chance = weights * nearest
        apart = chance.sum(1, keepdim=True) > 0
        chosen.append(torch.multinomial(torch.where(apart, chance, weights), 1)[:, 0])
        nearest = torch.minimum(nearest, (y - y[fit, chosen[-1]][:, None]).square().sum(-1))
    return torch.stack(chosen, 1)


def local_covariances(
    z: Tensor, centres: Tensor, neighbours: int | Tensor, weights: Tensor | None = None
) -> Tensor:
    """Covariance of each centre's nearest points of its fit: (F, C, d, d).

    Nearness is judged in units of the points' own covariance first, then once more in units of the
    covariances so found: a narrow ridge gets narrow neighbourhoods.

    Args:
        z: (F, N, d), N >= 2. centres: (F, C, d).
        neighbours: how many, or how many of each fit (F,); all of the points where there are fewer.
        weights: (F, N); points without weight do not count. None: all count.

    >>> local_covariances(torch.randn(1, 50, 2).double(), torch.zeros(1, 3, 2).double(), 20).shape
    torch.Size([1, 3, 2, 2])
    """
    n, d = z.shape[1:]
    counts = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if weights is None else weights > 0
    wanted = torch.minimum(torch.as_tensor(neighbours, device=z.device).expand(len(z)), counts.sum(1))
    rank = torch.arange(int(wanted.max()), device=z.device)
    there = (rank < wanted[:, None]).to(z)[:, None, :, None]  # (F, 1, neighbours, 1)
    share = counts.to(z) / counts.sum(1, keepdim=True)
    centred = z - (share[..., None] * z).sum(1, keepdim=True)
    cov = (share[..., None] * centred).mT @ centred * (n / max(n - 1, 1))
    tril = _cholesky(cov)[:, None].expand(-1, centres.shape[1], d, d)
    least = _LEAST * cov.diagonal(dim1=-2, dim2=-1)[:, None]  # where points lie on top of each other
    size = wanted.to(z)[:, None, None, None]
    cov = tril @ tril.mT
    for _ in range(2):
        gap = z[:, None] - centres[:, :, None]  # (F, C, N, d)
        y = torch.linalg.solve_triangular(tril, gap.mT, upper=False)
        distance = torch.where(counts[:, None], y.square().sum(2), torch.inf)
        near = distance.topk(len(rank), largest=False).indices
        points = torch.gather(gap, 2, near[..., None].expand(-1, -1, -1, d))
        points = there * (points - (there * points).sum(2, keepdim=True) / size)
        local = points.mT @ points / (size - 1).clamp_min(1)
        own = torch.diag_embed(local.diagonal(dim1=-2, dim2=-1) + least)
        cov = (size * local + (d + 2) * own) / (size + d + 2)
        tril = _cholesky(cov)
    return cov


def _rows(tril: Tensor, index: Tensor, u: Tensor) -> Tensor:
    """L[index] u (F, n, d) without a copy of L for every draw at once."""
    flat = tril.flatten(0, 1)
    if tril.shape[-1] > POLYNOMIAL_DIMENSIONS:
        out = torch.zeros_like(u)
        for k in index.unique().tolist():
            rows = index == k
            out[rows] = u[rows] @ flat[k].mT
        return out
    step = max(64, _AT_ONCE // (len(u) * tril[0, 0].numel()))
    pairs = zip(index.split(step, 1), u.split(step, 1), strict=True)
    return torch.cat([(flat[i] @ each[..., None])[..., 0] for i, each in pairs], 1)


def _cholesky(cov: Tensor) -> Tensor:
    """Lower Cholesky factors; where rounding has left a covariance singular, of it with a ridge."""
    tril, info = torch.linalg.cholesky_ex(cov)
    ridge = 1e-12
    while bool((info != 0).any()) and ridge < 1:
        scale = cov.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-300)
        fixed, info_fixed = torch.linalg.cholesky_ex(cov + torch.diag_embed(ridge * scale))
        bad = info != 0
        tril = torch.where(bad[..., None, None], fixed, tril)
        info = torch.where(bad, info_fixed, info)
        ridge *= 100
    return tril


def monomials(z: Tensor) -> Tensor:
    """1, the entries of z, and their products z_i z_j for i <= j: (F, N, P) for z (F, N, d)."""
    # slices: picking columns by their indices takes several times as long
    products = [z[..., i : i + 1] * z[..., i:] for i in range(z.shape[-1])]
    return torch.cat([torch.ones_like(z[..., :1]), z, *products], -1)
