r"""Gaussians, or mixtures of them, that are bent: each entry's mean is quadratic in the entries before it.

With w the entries of z, standardised and in an order, and noise u,

    w_k = a_k(w_1 .. w_{k-1}) + exp(s_k(w_1 .. w_{k-1})) u_k,

a triangular map (El Moselhy, Marzouk: Bayesian inference with optimal maps. J. Comput. Phys. 2012) of the
simplest kind that bends, a_k a polynomial of degree two, and narrows, s_k one with squares alone. Bananas,
chains of parabolas and funnels are such densities; a few hundred coefficients take the place of a network's
weights, follow by regression (`fitting.bend`), and go on beyond the points that they were fitted to. There
s_k is held within half a nat of what it was at the points.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.families.base import Body

__all__ = ["Bend", "BentBody", "features"]


def features(d: int, *, crossed: bool) -> tuple[Tensor, Tensor]:
    """Which products of entries are features, as two indices (P,) into (1, w_1, .., w_d).

    They stand in the order of the last entry that they need: what involves the first k comes first.

    Args:
        d: entries. crossed: whether products of two entries are among them, beside squares.

    >>> [tuple(pair) for pair in torch.stack(features(2, crossed=True), 1).tolist()]
    [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    >>> len(features(50, crossed=False)[0])
    101
    """
    pairs = [(0, 0)]
    for k in range(1, d + 1):
        pairs += [(k, 0), *((k, j) for j in range(1 if crossed else k, k + 1))]
    i, j = torch.tensor(pairs).T
    return i, j


@dataclass(frozen=True)
class Bend:
    """The map between noise u and z, or F of them, with a leading axis F of everything.

    Attributes:
        centre, scale: (d,), by which z is standardised.
        order: (d,) which entry of z comes first, second ...
        mean, log_scale: (P, d) coefficients of a and s; those of entry k are zero from its own features on.
        low, high: (d,) bounds of s.
        crossed: whether products of entries are among the features.

    >>> loc, one = torch.zeros(2).double(), torch.ones(2).double()
    >>> mean = torch.zeros(6, 2).double()
    >>> mean[2, 1] = 1.0  # w_2 = w_1^2 + u_2
    >>> bend = Bend(loc, one, torch.arange(2), mean, 0 * mean, -one, one, True)
    >>> z, _ = bend.push(torch.tensor([[3.0, 0.5]]).double())
    >>> z, bend.pull(z)[0]
    (tensor([[3.0000, 9.5000]], dtype=torch.float64), tensor([[3.0000, 0.5000]], dtype=torch.float64))
    """

    centre: Tensor
    scale: Tensor
    order: Tensor
    mean: Tensor
    log_scale: Tensor
    low: Tensor
    high: Tensor
    crossed: bool

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        return features(self.centre.shape[-1], crossed=self.crossed)

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u (..., d) and log|det du/dz| (...) at z (..., d), or (F, N, d)."""
        w = (z - _of_rows(self.centre)) / _of_rows(self.scale)
        w = w.gather(-1, _of_rows(self.order).expand_as(w))
        one_w = torch.cat([torch.ones_like(w[..., :1]), w], -1)
        i, j = self._pairs
        each = one_w[..., i] * one_w[..., j]
        s = (each @ self.log_scale).clamp(_of_rows(self.low), _of_rows(self.high))
        return (w - each @ self.mean) * (-s).exp(), -s.sum(-1) - _of_rows(self.scale.log()).sum(-1)

    def push(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., d) and log|det dz/du| (...) at u (..., d), or (F, N, d)."""
        one_w = each = torch.ones_like(u[..., :1])
        log_det = _of_rows(self.scale.log()).sum(-1)
        i, j = self._pairs
        low, high = _of_rows(self.low), _of_rows(self.high)
        for k in range(u.shape[-1]):
            known, this = each.shape[-1], slice(k, k + 1)
            s = (each @ self.log_scale[..., :known, this]).clamp(low[..., this], high[..., this])
            w = each @ self.mean[..., :known, this] + s.exp() * u[..., this]
            one_w = torch.cat([one_w, w], -1)
            each = torch.cat([each, w * one_w[..., j[i == k + 1]]], -1)
            log_det = log_det + s[..., 0]
        w = one_w[..., 1:].gather(-1, _of_rows(self.order.argsort(-1)).expand_as(u))
        return _of_rows(self.centre) + _of_rows(self.scale) * w, log_det

    def of_fits(self, which: Tensor | int) -> "Bend":
        """Those `which` of F maps, (F,) bool, or one, without that axis."""
        return Bend(**{name: value[which] for name, value in self.tensors.items()}, crossed=self.crossed)

    def better(self, other: "Bend", where: Tensor) -> "Bend":
        """These F maps, and `other` for those `where`, (F,) bool."""
        chosen = {
            name: torch.where(where.view(-1, *[1] * (mine.ndim - 1)), other.tensors[name], mine)
            for name, mine in self.tensors.items()
        }
        return Bend(**chosen, crossed=self.crossed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def _of_rows(each: Tensor) -> Tensor:
    """(d,) as it is, (F, d) as (F, 1, d): for what has rows (..., d) or (F, N, d)."""
    return each if each.ndim == 1 else each[:, None]


class BentBody(Body):
    """A body that is bent; drawn from and evaluated, not trained further.

    Args:
        inner: the distribution of the noise, in float64.
        bend: the map.

    Raises:
        ValueError: another dimension.

    >>> from visbi.families.mixture import MixtureBody
    >>> none, one = torch.zeros(6, 2).double(), torch.ones(2).double()
    >>> bend = Bend(0 * one, one, torch.arange(2), none, none, -one, one, True)
    >>> body = BentBody(MixtureBody(2), bend)
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> bool(torch.allclose(body.log_prob(z), log_q))
    True
    """

    def __init__(self, inner: Body, bend: Bend) -> None:
        super().__init__(inner.dim)
        if len(bend.centre) != inner.dim:
            raise ValueError(violation("bend", f"a map of {inner.dim} entries", len(bend.centre)))
        self.inner, self.crossed = inner, bend.crossed
        for name, value in bend.tensors.items():
            self.register_buffer(name, value)

    @property
    def bend(self) -> Bend:
        """The map."""
        return Bend(**{field.name: getattr(self, field.name) for field in fields(Bend)})

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        u, log_q = self.inner.rsample_and_log_prob(n)
        z, log_det = self.bend.push(u)
        return z, log_q - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        u, log_det = self.bend.pull(z)
        return self.inner.log_prob(u) + log_det
