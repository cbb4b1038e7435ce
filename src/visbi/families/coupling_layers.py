r"""Coupling layers in few operations (Dinh, Sohl-Dickstein, Bengio 2017; with splines: Durkan et al. 2019).

A layer keeps some entries x_K of x and moves the others, entry by entry, as the kept ones tell it to:

    y_K = x_K,   y_M = f(x_M; phi),   phi = W3 g(W2 g(W1 x_K + C c + b1) + b2) + b3 + A x_K,

where f(x) = exp(s) x + t, s = 6 tanh(a / 6), phi = (a, t), or f is a monotone spline (`core.spline`); c is a
context, if there is one, and g(a) = a sigmoid(a), so that the density has no kinks. Both directions take one
pass. W3, b3 and A start at zero: every layer is the identity. A, of affine layers alone, is the straight way
from x_K to phi: a log-scale that is linear in another entry, as in a funnel, needs no hidden layer, is learnt
faster, and goes on where no draw has been.

All layers have weights of the same shapes, which stand in one tensor each. x stays whole: columns of W1 and A
and rows of W3 and A that a layer must not use are masked.

The score v = d log q / dx of q at its own draws is carried along, v_y = J^{-T} (v_x - grad_x log|det J|)
(Vaitl, Nicoli, Nakajima, Kessel 2022). J's only block beside the diagonal D = df/dx is dy_M/dx_K, so that

    v_yM = (v_xM - d log D / dx_M) / D,
    v_yK = v_xK - (dphi/dx_K)' (d/dphi) [<v_yM, y_M> + sum log D]

where the last line is one pass back through the network, a product of three matrices.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from visbi.core.spline import RationalQuadraticSpline, spline_shapes

__all__ = ["BINS", "LARGEST_LOG_SCALE", "PER_ENTRY", "CouplingLayers", "moved_entries"]

LARGEST_LOG_SCALE = 6.0
_LARGEST_BEFORE = 3.0  # of layers without a straight way, as they were saved once
BINS = 8
_SIZES, _SLOPES = spline_shapes(BINS)
PER_ENTRY = math.prod(_SIZES) + math.prod(_SLOPES)

_Pull = Callable[[Tensor], Tensor]


class _Network(NamedTuple):
    """Weights of one layer, without those that it must not use."""

    first: Tensor | None
    from_context: Tensor | None
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    last: Tensor
    last_bias: Tensor
    direct: Tensor | None


def moved_entries(dim: int, num_transforms: int) -> Tensor:
    """Which entries each layer moves, (T, ceil(d / 2)) indices.

    Layers come in pairs that between them move every entry. Each pair cuts by another binary digit of codes
    (as Müller et al. 2019), which are such that either half of an even number of entries has each digit: in 2
    log2(d) layers each entry is moved by each other, but for a few where the number is odd.

    >>> moved_entries(4, 4).sort().values.tolist()
    [[0, 2], [1, 3], [0, 1], [2, 3]]
    """
    digits = max(1, (dim - 1).bit_length())
    half = (dim + 1) // 2
    codes = [i if 2 * i < dim else ~(dim - 1 - i) for i in range(dim)]
    rows = []
    for t in range(num_transforms):
        sign = 1 if t % 2 else -1  # so that of an odd number not always the same one is moved twice
        order = sorted(
            range(dim), key=lambda i, t=t, sign=sign: ((codes[i] >> (t // 2 % digits)) & 1, sign * i)
        )
        rows.append(order[:half] if t % 2 == 0 else order[dim - half :])
    return torch.tensor(rows)


class CouplingLayers(nn.Module):
    """Coupling layers from noise u to y, at first the identity.

    Args:
        dim: d. One entry has no other to be told by: its layers are splines, with no network unless there is
            a context.
        num_transforms: T, how many layers.
        hidden_features: H, width of the two hidden layers of each network.
        spline: splines in place of affine maps.
        context: number of features of the context.

    >>> layers = CouplingLayers(3, num_transforms=2, hidden_features=8)
    >>> u = torch.randn(4, 3)
    >>> y, ladj, score = layers(u, -u)
    >>> bool(torch.equal(y, u)), score.shape
    (True, torch.Size([4, 3]))
    """

    moved: Tensor
    mask: Tensor

    def __init__(
        self, dim: int, *, num_transforms: int, hidden_features: int, spline: bool = False, context: int = 0
    ) -> None:
        super().__init__()
        self.spline, self.largest = spline or dim == 1, LARGEST_LOG_SCALE
        moved = moved_entries(dim, num_transforms)
        mask = torch.zeros(num_transforms, dim).scatter(1, moved, 1.0)  # 1 where an entry is moved
        self.register_buffer("moved", moved, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        t, h = num_transforms, hidden_features
        n_out = moved.shape[1] * PER_ENTRY if self.spline else 2 * dim
        fan_in = dim - moved.shape[1] + context
        self.last_bias = nn.Parameter(torch.zeros(t, n_out))
        self.first = _uniform(t, h, dim, fan_in=fan_in) if dim > 1 else None
        self.from_context = _uniform(t, h, context, fan_in=fan_in) if context else None
        self.last = nn.Parameter(torch.zeros(t, n_out, h)) if fan_in else None
        self.direct = nn.Parameter(torch.zeros(t, n_out, dim)) if not self.spline else None
        if fan_in:
            self.first_bias = _uniform(t, h, fan_in=fan_in)
            self.second, self.second_bias = _uniform(t, h, h, fan_in=h), _uniform(t, h, fan_in=h)

    def forward(
        self, u: Tensor, score: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y (N, d), log|det dy/du| (N,) and the score at y, without gradient.

        Args:
            u: (N, d).
            score: (N, d), d log q / du; None if that at y is not wanted.
            context: (M, F) with N = n M; row i of u goes with row i mod M.
        """
        x, total = u, u.new_zeros(len(u))
        step = _spline_step if self.spline else partial(_affine_step, largest=self.largest)
        for moved, weights in zip(self.moved, self._weights(), strict=True):
            x, ladj, score = step(x, score, moved, weights, context)
            total = total + ladj
        return x, total, score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u (N, d) and log|det dy/du| (N,) for y (N, d); `context` as for `forward`."""
        x, total = y, y.new_zeros(len(y))
        for moved, weights in zip(self.moved.flip(0), reversed(self._weights()), strict=True):
            phi = _network(x, weights, context)[0]
            if self.spline:
                spline = _spline(phi)
                entry = spline.inv(x[:, moved])
                x, ladj = x.index_copy(1, moved, entry), spline.call_and_ladj(entry)[1]
            else:
                a, shift = phi.chunk(2, 1)
                ladj = self.largest * a.tanh()
                x = (x - shift) * (-ladj).exp()
            total = total + ladj.sum(-1)
        return x, total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Layers that were saved before there was a straight way stay as they were."""
        if self.direct is not None and prefix + "direct" not in state_dict:
            self.direct, self.largest = None, _LARGEST_BEFORE
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _weights(self) -> Sequence["_Network | Tensor"]:
        """Those of each layer; phi itself where there is nothing that could tell it."""
        if self.last is None:
            return self.last_bias.unbind(0)
        last, last_bias, direct = self.last, self.last_bias, self.direct
        if not self.spline:  # rows of a, which is taken as a share of the largest, and of the shift
            mask = torch.cat([self.mask / self.largest, self.mask], 1)
            last, last_bias = last * mask[..., None], last_bias * mask
            direct = None if direct is None else direct * mask[..., None] * (1.0 - self.mask)[:, None]
        first = None if self.first is None else self.first * (1.0 - self.mask)[:, None]
        hidden = (first, self.from_context, self.first_bias, self.second, self.second_bias)
        tensors = (*hidden, last, last_bias, direct)
        count = len(self.moved)
        return [
            _Network(*row)
            for row in zip(*((None,) * count if w is None else w.unbind(0) for w in tensors), strict=True)
        ]


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-1.0, 1.0) * fan_in**-0.5)


def _spline(phi: Tensor) -> Any:
    """Splines of the moved entries from (N, m P)."""
    phi = phi.unflatten(-1, (-1, PER_ENTRY))
    return RationalQuadraticSpline(phi[..., : 2 * BINS].unflatten(-1, (2, BINS)), phi[..., 2 * BINS :])


def _network(x: Tensor, weights: _Network | Tensor, context: Tensor | None) -> tuple[Tensor, _Pull]:
    """phi (N, P) and the function that takes rows (N, P) to their products with dphi/dx (N, d)."""
    if isinstance(weights, Tensor):
        return weights.expand(len(x), -1), lambda rows: torch.zeros_like(x)
    w, bias = weights, weights.first_bias
    if context is not None and w.from_context is not None:
        bias = functional.linear(context, w.from_context, bias).repeat(len(x) // len(context), 1)
    a1 = bias if w.first is None else torch.addmm(bias, x, w.first.mT)
    a2 = torch.addmm(w.second_bias, functional.silu(a1), w.second.mT)

    def pull(rows: Tensor) -> Tensor:
        if w.first is None:
            return torch.zeros_like(x)
        hidden = (rows @ w.last).mul_(_silu_slope(a2)) @ w.second
        pulled = hidden.mul_(_silu_slope(a1)) @ w.first
        return pulled if w.direct is None else torch.addmm(pulled, rows, w.direct)

    phi = torch.addmm(w.last_bias, functional.silu(a2), w.last.mT)
    return phi if w.direct is None else torch.addmm(phi, x, w.direct.mT), pull


def _silu_slope(a: Tensor) -> Tensor:
    share = a.sigmoid()
    return torch.addcmul(share, share, a * (1.0 - share))


def _affine_step(
    x: Tensor,
    score: Tensor | None,
    moved: Tensor,
    weights: _Network | Tensor,
    context: Tensor | None,
    *,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, log|det J| and the score there; a and the shift of kept entries are zero."""
    phi, pull = _network(x, weights, context)
    a, shift = phi.chunk(2, 1)
    slope = a.tanh()
    scale = (largest * slope).exp()
    y, ladj = torch.addcmul(shift, scale, x), largest * slope.sum(-1)
    if score is not None:
        with torch.no_grad():
            by_log_scale = torch.addcmul(torch.ones_like(x), score, x)  # <v_y, y> + sum log D by s
            by_a = by_log_scale * (largest - largest * slope.square())
            score = score / scale
            score = score - pull(torch.cat([by_a, score], 1))
    return y, ladj, score


def _spline_step(
    x: Tensor, score: Tensor | None, moved: Tensor, weights: _Network | Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, log|det J| and the score there."""
    phi, pull = _network(x, weights, context)
    entry = x[:, moved]
    if score is not None and not entry.requires_grad:
        entry = entry.detach().requires_grad_()
    y, ladj = _spline(phi).call_and_ladj(entry)
    if score is not None:
        (by_entry,) = torch.autograd.grad(ladj.sum(), entry, retain_graph=True)
        beside = (score[:, moved] - by_entry) * (-ladj.detach()).exp()
        (by_phi,) = torch.autograd.grad((beside * y + ladj).sum(), phi, retain_graph=True)
        with torch.no_grad():
            score = score.index_copy(1, moved, beside) - pull(by_phi)
    return x.index_copy(1, moved, y), ladj.sum(-1), score
