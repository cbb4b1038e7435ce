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
from visbi.core.rows import trues_first

__all__ = ["POLYNOMIAL_DIMENSIONS", "Mixture", "cholesky", "monomials"]

POLYNOMIAL_DIMENSIONS = 16  # up to which log-densities are polynomials: one matrix product for all
_STEEPEST = 1e9  # of a quadratic coefficient times a distance squared: its rounding is 1e-7 nats
_AT_ONCE = 2**18  # numbers in one temporary: more do not fit into a cache
_FEW_COMPONENTS = 6


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
        return Mixture(torch.log_softmax(log_weights, -1), loc, cholesky(cov))

    @property
    def cov(self) -> Tensor:
        """(F, K, d, d)."""
        return self.tril @ self.tril.mT

    @property
    def cov_within(self) -> Tensor:
        """(F, d, d), the covariances of the components, averaged by their weights."""
        return (self.log_weights.exp()[..., None, None] * self.cov).sum(1)

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
        if steep.is_meta or not float(steep) < _STEEPEST:
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

    @cached_property
    def widest(self) -> "Mixture":
        """The widest third of the components, each with the weight that it has here.

        Where the mixture was spread wider by less than that, they bound it from below for a ninth of the
        cost; closely everywhere but in its midst.
        """
        log_det = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        top = log_det.topk(-(-self.loc.shape[1] // 3), 1).indices
        fit = torch.arange(len(top), device=top.device)[:, None]
        return Mixture(self.log_weights[fit, top], self.loc[fit, top], self.tril[fit, top])

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

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """n draws of each, (F, n, d), and log q there, (F, n)."""
        z = self.sample(n)
        return z, self.log_prob(z)

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
        if bool(which.all()):  # with all that it knows of itself
            return self
        return Mixture(self.log_weights[which], self.loc[which], self.tril[which])


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


def cholesky(cov: Tensor) -> Tensor:
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
