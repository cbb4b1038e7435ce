r"""One coupling layer of many flows at once: its passes, forwards and backwards, by hand.

Arrays are (F, features, N): F flows, each with weights of its own, N points each. A layer (see
`families.coupling_layers`) has a network phi = W3 g(W2 g(W1 x_K + b1) + b2) + b3 + A x_K, g(a) =
a sigmoid(a), and a map y = f(x; phi) of each moved entry. What autograd would do in dozens of small
operations are these passes:

    network   phi from x_K; what the other two need is kept
    pull      rows r = d/dphi of something -> d/dx_K of it, by three products with transposed weights
    gradient  the same rows -> d/dW of it, three outer products

and for the map, with D = df/dx,

    carry     the score of the noise's density along with the points: v_y = (v_x - d log D / dx) / D, and
              r = d/dphi [<v_y, y> + sum log D] (Vaitl, Nicoli, Nakajima, Kessel 2022)
    back      c_x = D c_y, and r = d/dphi <c_y, y>
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from visbi.core.spline import RationalQuadraticSpline
from visbi.families.coupling_layers import BINS, LARGEST_LOG_SCALE, PER_ENTRY

__all__ = [
    "AffineMap",
    "LayerTape",
    "LayerWeights",
    "SplineMap",
    "gradient",
    "network",
    "plain_network",
    "pull",
]


class LayerWeights(NamedTuple):
    """Those of one layer in F flows, no entry of which the layer must not use.

    The biases are columns. Where nothing is kept there is no network, and phi is `last_bias`.
    """

    last_bias: Tensor  # (F, P, 1)
    first: Tensor | None = None  # (F, H, k)
    first_bias: Tensor | None = None
    second: Tensor | None = None
    second_bias: Tensor | None = None
    last: Tensor | None = None
    direct: Tensor | None = None  # (F, P, k)


@dataclass
class LayerTape:
    """What the passes of one layer keep for the next ones.

    The hidden layers and what is pulled through them are as large as all else together. They are written to
    the same memory at every step: fresh memory costs more than what is computed there.

    Args:
        hidden: four (F, H, N), each hidden layer and the slope of g there.
        pulled: two (F, H, N), rows on their way back through the network; layers may share them.
    """

    hidden: Sequence[Tensor]
    pulled: Sequence[Tensor]
    kept: Tensor = field(init=False)  # x_K
    entry: Any = None  # the map's own
    rows: Tensor = field(init=False)


def network(x: Tensor, w: LayerWeights, tape: LayerTape) -> Tensor:
    """phi (F, P, N)."""
    tape.kept = x
    if w.first is None or w.second is None or w.last is None:
        return w.last_bias.expand(-1, -1, x.shape[-1])
    assert w.first_bias is not None and w.second_bias is not None
    h1, g1, h2, g2 = tape.hidden
    _silu(torch.baddbmm(w.first_bias, w.first, x, out=h1), g1)
    _silu(torch.baddbmm(w.second_bias, w.second, h1, out=h2), g2)
    return _with_direct(torch.baddbmm(w.last_bias, w.last, h2), x, w)


def _with_direct(phi: Tensor, x: Tensor, w: LayerWeights) -> Tensor:
    return phi if w.direct is None else phi.baddbmm_(w.direct, x)


def _silu(a: Tensor, slope: Tensor) -> None:
    """a sigmoid(a) = a s in the place of a, and its derivative s + a s (1 - s) in that of `slope`."""
    torch.sigmoid(a, out=slope)
    a.mul_(slope)
    torch.lerp(a, _one(a), slope, out=slope)


@cache
def _one_of(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _one(like: Tensor) -> Tensor:
    return _one_of(like.dtype, like.device)


def plain_network(x: Tensor, w: LayerWeights, scratch: Tensor) -> Tensor:
    """phi (F, P, N) where no other pass is to follow; scratch: (2, F, H, N)."""
    if w.first is None or w.second is None or w.last is None:
        return w.last_bias.expand(-1, -1, x.shape[-1])
    assert w.first_bias is not None and w.second_bias is not None
    h1, h2 = scratch
    functional.silu(torch.baddbmm(w.first_bias, w.first, x, out=h1), inplace=True)
    functional.silu(torch.baddbmm(w.second_bias, w.second, h1, out=h2), inplace=True)
    return _with_direct(torch.baddbmm(w.last_bias, w.last, h2), x, w)


def pull(rows: Tensor, w: LayerWeights, tape: LayerTape) -> Tensor:
    """rows (F, P, N) times dphi/dx_K, (F, k, N)."""
    tape.rows = rows
    if w.first is None or w.second is None or w.last is None:
        return torch.zeros_like(tape.kept)
    _, g1, _, g2 = tape.hidden
    r2, r1 = tape.pulled
    torch.bmm(w.last.mT, rows, out=r2).mul_(g2)
    torch.bmm(w.second.mT, r2, out=r1).mul_(g1)
    pulled = torch.bmm(w.first.mT, r1)
    return pulled if w.direct is None else pulled.baddbmm_(w.direct.mT, rows)


def gradient(tape: LayerTape, into: LayerWeights) -> None:
    """The derivatives by the weights that belong to the rows last pulled, written into `into`."""
    rows = tape.rows
    torch.sum(rows, -1, keepdim=True, out=into.last_bias)
    if into.first is None or into.second is None or into.last is None:
        return
    assert into.first_bias is not None and into.second_bias is not None
    h1, _, h2, _ = tape.hidden
    r2, r1 = tape.pulled
    torch.bmm(rows, h2.mT, out=into.last)
    torch.bmm(r2, h1.mT, out=into.second)
    torch.bmm(r1, tape.kept.mT, out=into.first)
    torch.sum(r2, -1, keepdim=True, out=into.second_bias)
    torch.sum(r1, -1, keepdim=True, out=into.first_bias)
    if into.direct is not None:
        torch.bmm(rows, tape.kept.mT, out=into.direct)


class AffineMap:
    """y = exp(s) x + t, s = 6 tanh(a / 6), phi = (a, t)."""

    @staticmethod
    def forward(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Any]:
        """y (F, m, N), log|det| (F, N) and what the other passes need."""
        log_scale, flat, shift = _affine(phi)
        scale = log_scale.exp()
        return torch.addcmul(shift, scale, x), log_scale.sum(1), (x, scale, flat)

    @staticmethod
    def inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Any]:
        """x, log|det dy/dx| and what the other passes need."""
        log_scale, flat, shift = _affine(phi)
        scale = log_scale.exp()
        x = (y - shift).div_(scale)
        return x, log_scale.sum(1), (x, scale, flat)

    @staticmethod
    def plain_forward(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` where no other pass follows."""
        return AffineMap.forward(x, phi)[:2]

    @staticmethod
    def plain_inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse` where no other pass follows."""
        return AffineMap.inverse(y, phi)[:2]

    @staticmethod
    def carry(entry: Any, score: Tensor) -> tuple[Tensor, Tensor]:
        """v_y and rows (F, P, N)."""
        x, scale, flat = entry
        rows = score.new_empty(score.shape[0], 2 * score.shape[1], score.shape[2])
        by_a, new = rows.chunk(2, 1)
        torch.addcmul(_one(score), score, x, out=by_a)
        by_a.mul_(flat)
        torch.div(score, scale, out=new)
        return new, rows

    @staticmethod
    def back(entry: Any, c: Tensor) -> tuple[Tensor, Tensor]:
        """c_x and rows."""
        x, scale, flat = entry
        rows = c.new_empty(c.shape[0], 2 * c.shape[1], c.shape[2])
        by_a, by_shift = rows.chunk(2, 1)
        by_shift.copy_(c)
        new = c * scale
        torch.mul(new, x, out=by_a)
        by_a.mul_(flat)
        return new, rows


def _affine(phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, ds/da and t."""
    a, shift = phi.chunk(2, 1)
    slope = (a * (1 / LARGEST_LOG_SCALE)).tanh_()
    return LARGEST_LOG_SCALE * slope, torch.addcmul(_one(a), slope, slope, value=-1), shift


class SplineMap:
    """Monotone rational-quadratic splines; their few derivatives by autograd."""

    @staticmethod
    def forward(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Any]:
        """As of `AffineMap`."""
        x, phi = x.mT, phi.mT
        with torch.enable_grad():
            x, phi = x.detach().requires_grad_(), phi.detach().requires_grad_()
            y, ladj = _spline(phi).call_and_ladj(x)
        return y.detach().mT, ladj.detach().sum(-1), (x, phi, y, ladj)

    @staticmethod
    def inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Any]:
        """As of `AffineMap`."""
        x = _spline(phi.mT).inv(y.mT).mT
        _, ladj, entry = SplineMap.forward(x, phi)
        return x, ladj, entry

    @staticmethod
    def plain_forward(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """As of `AffineMap`."""
        y, ladj = _spline(phi.mT).call_and_ladj(x.mT)
        return y.mT, ladj.sum(-1)

    @staticmethod
    def plain_inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """As of `AffineMap`."""
        spline = _spline(phi.mT)
        x = spline.inv(y.mT)
        return x.mT, spline.call_and_ladj(x)[1].sum(-1)

    @staticmethod
    def carry(entry: Any, score: Tensor) -> tuple[Tensor, Tensor]:
        """As of `AffineMap`."""
        x, phi, y, ladj = entry
        with torch.enable_grad():
            (by_x,) = torch.autograd.grad(ladj.sum(), x, retain_graph=True)
            new = (score.mT - by_x) * (-ladj.detach()).exp()
            (rows,) = torch.autograd.grad((new * y + ladj).sum(), phi, retain_graph=True)
        return new.mT, rows.mT

    @staticmethod
    def back(entry: Any, c: Tensor) -> tuple[Tensor, Tensor]:
        """As of `AffineMap`."""
        x, phi, y, _ = entry
        with torch.enable_grad():
            by_x, rows = torch.autograd.grad((c.mT * y).sum(), (x, phi), retain_graph=True)
        return by_x.mT, rows.mT


def _spline(phi: Tensor) -> Any:
    """Splines of the moved entries from (F, N, m P)."""
    phi = phi.unflatten(-1, (-1, PER_ENTRY))
    return RationalQuadraticSpline(phi[..., : 2 * BINS].unflatten(-1, (2, BINS)), phi[..., 2 * BINS :])
