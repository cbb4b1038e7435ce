r"""F coupling flows in one: weights stacked in one tensor, draws, densities and gradients in one call.

Each is the flow of `families.coupling`, z = m + L f(u). No autograd: gradients come from the passes of
`families.coupling_passes`. With v = d log q / dz at a draw and g the gradient of a potential there,

    path       sticking the landing, -E_u[ell(f(u)) - log q(f(u))] with q held fixed in log q (Roeder, Wu,
               Duvenaud 2017), has the cotangent v - g at z; it goes back through the layers once
    likelihood d log q(z) / dphi at a fixed z is minus the rows that carry the score from u to z

so a step of either is a pass through the networks, one back for the score and one back for the weights.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.families.base import log_standard_normal
from visbi.families.coupling import CouplingBody
from visbi.families.coupling_layers import LARGEST_LOG_SCALE
from visbi.families.coupling_passes import (
    AffineMap,
    LayerTape,
    LayerWeights,
    SplineMap,
    gradient,
    network,
    plain_network,
    pull,
)
from visbi.families.gaussian import UNIT

__all__ = ["CouplingStack", "Gradient", "Tape"]

_AT_ONCE = 1024  # points of all flows that go through the layers at once where nothing is kept
_PLACE = ("raw_loc", "raw_log_diag", "raw_below")


@dataclass(frozen=True)
class Gradient:
    """By the weights of the layers (F, P), and by the place (F, Q) in float64."""

    layers: Tensor
    place: Tensor

    def norm(self) -> Tensor:
        """(F,), over both."""
        layers = torch.linalg.vector_norm(self.layers, dim=1).double()
        return torch.hypot(layers, torch.linalg.vector_norm(self.place, dim=1))

    def mixed(self, other: "Gradient", share: Tensor) -> "Gradient":
        """(1 - share) times this and share (F,) times the other."""
        weight = share[:, None]
        return Gradient(
            torch.lerp(self.layers, other.layers, weight.to(self.layers)),
            torch.lerp(self.place, other.place, weight.to(self.place)),
        )


@dataclass
class Tape:
    """What a pass from u to y, or back, has left for the passes that give gradients.

    It is good until the next such pass of as many points, which writes to the same memory.
    """

    layers: list[LayerTape]
    y: Tensor  # (F, d, N)
    score: Tensor  # (F, d, N), d log q / dy


class CouplingStack:
    """F flows of one make.

    Args:
        bodies: at least one; copied.

    Attributes:
        dim: d.
        layers: (F, P), the weights of each flow's layers, without those that no layer uses.
        place: (F, Q), the parameters of each flow's m and L.

    Raises:
        ValueError: no flows, or unlike ones.

    >>> from visbi.families.coupling import CouplingBody
    >>> stack = CouplingStack([CouplingBody(3), CouplingBody(3)])
    >>> z, log_q, _ = stack.draw(5)
    >>> z.shape, bool(torch.allclose(stack.log_prob(z), log_q, atol=1e-5))
    (torch.Size([2, 5, 3]), True)
    """

    def __init__(self, bodies: Sequence[CouplingBody]) -> None:
        makes = sorted({str(_make(body)) for body in bodies})
        if len(makes) != 1:
            raise ValueError(violation("bodies", "at least one flow, all of one make", makes))
        like = bodies[0]
        if like.layers.largest != LARGEST_LOG_SCALE:
            raise ValueError(violation("bodies", "flows with a straight way", "ones saved before there was"))
        self._like = like
        self.dim, self._map = like.dim, SplineMap if like.layers.spline else AffineMap
        self._width = 0 if like.layers.last is None else like.layers.last.shape[-1]
        self._memory: tuple[Sequence[Tensor], Sequence[Sequence[Tensor]]] | None = None
        self._arrange(like)
        with torch.no_grad():
            self.layers = torch.stack([self._flat(body) for body in bodies])
            self.place = torch.stack([_flat_place(body) for body in bodies])

    # -- in and out ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """What the layers work in."""
        return self.layers.dtype

    def only(self, which: Tensor | Sequence[int]) -> "CouplingStack":
        """Some of the flows, copied: indices, or bools (F,)."""
        new = copy.copy(self)
        index = torch.as_tensor(which, device=self.layers.device)
        new.layers, new.place, new._memory = self.layers[index].clone(), self.place[index].clone(), None
        return new

    def one(self, i: int) -> CouplingBody:
        """The i-th flow as a body of its own."""
        body = copy.deepcopy(self._like)
        self.write(i, body)
        return body

    @torch.no_grad()
    def write(self, i: int, body: CouplingBody) -> None:
        """The i-th flow's weights into a body of the same make, in place."""
        parts = dict(zip(self._shapes, self._split(self.layers[i]), strict=True))
        for t, (kept, out) in enumerate(zip(self._kept, self._out, strict=True)):
            body.layers.last_bias[t, out] = parts["last_bias"][t, :, 0]
            if "last" in parts:
                body.layers.last[t, out] = parts["last"][t]  # type: ignore[index]
            if "direct" in parts:
                body.layers.direct[t][out[:, None], kept] = parts["direct"][t]  # type: ignore[index]
            if "first" in parts:
                body.layers.first[t][:, kept] = parts["first"][t]  # type: ignore[index]
        for name in ("first_bias", "second_bias"):
            if name in parts:
                getattr(body.layers, name).copy_(parts[name][..., 0])
        if "second" in parts:
            body.layers.second.copy_(parts["second"])
        start = 0
        for name in _PLACE:
            parameter = getattr(body.place, name)
            parameter.copy_(self.place[i, start : start + parameter.numel()])
            start += parameter.numel()

    def placed(self, loc: Tensor, scale_tril: Tensor) -> "CouplingStack":
        """Overwrite m (F, d) and L (F, d, d), in place."""
        diag = scale_tril.diagonal(dim1=-2, dim2=-1)
        i, j = torch.tril_indices(self.dim, self.dim, -1, device=loc.device)
        below = (scale_tril / diag[..., None])[:, i, j]
        self.place = torch.cat([loc, diag.log(), below], 1).to(self.place) / UNIT
        return self

    # -- densities ----------------------------------------------------------------------------------------

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tape]:
        """z (F, n, d) and log q (F, n), in float64, with the tape for `path_gradient`."""
        u = torch.randn(len(self), self.dim, n, dtype=self.dtype, device=self.layers.device)
        y, ladj, tapes = self._through(u)
        tape = Tape(tapes, y, self._carry(tapes, -u))
        log_q = log_standard_normal(u.mT).double() - ladj.double() - self._log_diag().sum(1, keepdim=True)
        return self._outward(y), log_q, tape

    def push(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|det dz/du| (F, N), in float64, from noise u (F, N, d)."""
        y, ladj = self._plainly(u.mT.to(self.dtype))
        return self._outward(y), ladj.double() + self._log_diag().sum(1, keepdim=True)

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u (F, N, d) and log|det dz/du| (F, N) there, in float64, from z (F, N, d)."""
        u, ladj = self._plainly(self._inward(z), backwards=True)
        return u.mT.double(), ladj.double() + self._log_diag().sum(1, keepdim=True)

    def log_prob(self, z: Tensor) -> Tensor:
        """(F, N) for z (F, N, d); -inf where it is too far out to be told."""
        u, ladj = self.pull(z)
        log_q = log_standard_normal(u) - ladj
        return torch.where(log_q.isnan(), -torch.inf, log_q)

    def pull_and_tape(self, z: Tensor) -> tuple[Tensor, Tensor, Tape]:
        """As `pull`, with a tape whose score is not there yet: `carry` gives it."""
        y = self._inward(z)
        u, ladj, tapes = self._through(y, backwards=True)
        log_det = ladj.double() + self._log_diag().sum(1, keepdim=True)
        return u.mT.double(), log_det, Tape(tapes, y, torch.empty_like(y))

    def carry(self, tape: Tape, score: Tensor) -> Tensor:
        """The score d log q / dz (F, N, d) from that of the noise's density at u; kept on the tape."""
        tape.score = self._carry(tape.layers, score.mT.to(self.dtype))
        return torch.linalg.solve_triangular(self._tril().mT, tape.score.double(), upper=True).mT

    # -- gradients ----------------------------------------------------------------------------------------

    def path_gradient(self, tape: Tape, by_z: Tensor, usable: Tensor) -> Gradient:
        """Of the mean over draws of log q(z) - ell(z), through z alone.

        Args:
            tape: of `draw`. by_z: d ell / dz (F, n, d). usable: (F, n) bool; others count as zero.
        """
        tril = self._tril()
        c = torch.where(usable[:, None], tape.score.double() - tril.mT @ by_z.mT, 0.0) / usable.shape[1]
        into, views = self._empty_gradient()
        order, arranged, _ = self._way(backwards=True)
        c_layer = c.to(self.dtype)
        for t in order:
            kept, moved = self._cut(c_layer.index_select(1, arranged[t]))
            moved, rows = self._map.back(tape.layers[t].entry, moved)
            kept = kept + pull(rows, self._weights(t), tape.layers[t])
            gradient(tape.layers[t], views[t])
            c_layer = torch.cat([kept, moved], 1)
        return Gradient(into, self._place_gradient(tape.y, c, tril))

    def likelihood_gradient(self, z: Tensor) -> tuple[Tensor, Gradient]:
        """log q (F, N) at fixed z (F, N, d), and the gradient of minus its mean."""
        u, log_det, tape = self.pull_and_tape(z)
        into, views = self._empty_gradient()
        tape.score = self._carry(tape.layers, -u.mT.to(self.dtype), views)
        into /= z.shape[1]
        place = self._place_gradient(tape.y, tape.score.double() / z.shape[1], self._tril())
        place[:, self.dim : 2 * self.dim] += UNIT
        return log_standard_normal(u) - log_det, Gradient(into, place)

    # -- one after the other ------------------------------------------------------------------------------

    def _through(self, x: Tensor, *, backwards: bool = False) -> tuple[Tensor, Tensor, list[LayerTape]]:
        """From u (F, d, N) to y or backwards, with log|det dy/du| (F, N) and a tape."""
        tapes, total = self._tapes(x.shape[-1]), x.new_zeros(x.shape[0], x.shape[2])
        move = self._map.inverse if backwards else self._map.forward
        order, into, last = self._way(backwards)
        for t in order:
            kept, moved = self._cut(x.index_select(1, into[t]))
            phi = network(kept, self._weights(t), tapes[t])
            moved, ladj, tapes[t].entry = move(moved, phi)
            total += ladj
            x = torch.cat([kept, moved], 1)
        return x.index_select(1, last), total, tapes

    def _plainly(self, x: Tensor, *, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """The same without a tape, a few points at a time, which stay in the processor's cache."""
        move = self._map.plain_inverse if backwards else self._map.plain_forward
        order, into, last = self._way(backwards)
        scratch = x.new_empty(2, len(self), self._width, min(_AT_ONCE // len(self) + 1, x.shape[-1]))
        parts = []
        for piece in x.split(scratch.shape[-1], -1):
            total = x.new_zeros(x.shape[0], piece.shape[2])
            if piece.shape[-1] < scratch.shape[-1]:
                scratch = x.new_empty(*scratch.shape[:3], piece.shape[-1])
            for t in order:
                kept, moved = self._cut(piece.index_select(1, into[t]))
                moved, ladj = move(moved, plain_network(kept, self._weights(t), scratch))
                total += ladj
                piece = torch.cat([kept, moved], 1)
            parts.append((piece.index_select(1, last), total))
        moved_to, totals = zip(*parts, strict=True)
        return torch.cat(moved_to, -1), torch.cat(totals, -1)

    def _way(self, backwards: bool) -> tuple[Sequence[int], Sequence[Tensor], Tensor]:
        """The layers in order, how to arrange entries on entering each, and after the last."""
        order = range(len(self._kept))
        return (
            (order[::-1], self._down, self._before[0]) if backwards else (order, self._up, self._before[-1])
        )

    def _tapes(self, n: int) -> list[LayerTape]:
        """One for each layer, in memory that is kept for the next time."""
        shape = (len(self), self._width, n)
        if self._memory is None or self._memory[0][0].shape != shape:
            like = {"dtype": self.dtype, "device": self.layers.device}
            hidden = torch.empty(len(self._kept), 4, *shape, **like)
            self._memory = torch.empty(2, *shape, **like).unbind(0), [own.unbind(0) for own in hidden]
        pulled, hidden = self._memory
        return [LayerTape(own, pulled) for own in hidden]

    def _carry(
        self, tapes: list[LayerTape], score: Tensor, views: list[LayerWeights] | None = None
    ) -> Tensor:
        order, into, last = self._way(backwards=False)
        for t in order:
            kept, moved = self._cut(score.index_select(1, into[t]))
            moved, rows = self._map.carry(tapes[t].entry, moved)
            kept = kept - pull(rows, self._weights(t), tapes[t])
            if views is not None:
                gradient(tapes[t], views[t])
            score = torch.cat([kept, moved], 1)
        return score.index_select(1, last)

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self._n_kept
        return x[:, :k], x[:, k:]

    # -- the Gaussian outside -----------------------------------------------------------------------------

    def _loc(self) -> Tensor:
        return UNIT * self.place[:, : self.dim]

    def _log_diag(self) -> Tensor:
        return UNIT * self.place[:, self.dim : 2 * self.dim]

    def _tril(self) -> Tensor:
        d = self.dim
        unit = torch.eye(d, dtype=self.place.dtype, device=self.place.device).repeat(len(self), 1, 1)
        i, j = self._below
        unit[:, i, j] = UNIT * self.place[:, 2 * d :]
        return self._log_diag().exp()[..., None] * unit

    def _outward(self, y: Tensor) -> Tensor:
        """z (F, N, d)."""
        return torch.baddbmm(self._loc()[:, None], y.mT.double(), self._tril().mT)

    def _inward(self, z: Tensor) -> Tensor:
        """y (F, d, N)."""
        centred = (z.double() - self._loc()[:, None]).mT
        return torch.linalg.solve_triangular(self._tril(), centred, upper=False).to(self.dtype)

    def _place_gradient(self, y: Tensor, c: Tensor, tril: Tensor) -> Tensor:
        """(F, Q) from the cotangent c (F, d, N) of y, float64: that of z is L^-T c."""
        sums = torch.cat([c.sum(-1, keepdim=True), c @ y.mT.double()], -1)
        sums = torch.linalg.solve_triangular(tril.mT, sums, upper=True)
        by_loc, by_tril = sums[..., 0], sums[..., 1:]
        i, j = self._below
        by_log_diag = (by_tril.tril() * tril).sum(-1)
        by_below = (by_tril * tril.diagonal(dim1=-2, dim2=-1)[..., None])[:, i, j]
        return UNIT * torch.cat([by_loc, by_log_diag, by_below], 1)

    # -- how weights lie ----------------------------------------------------------------------------------

    def _arrange(self, body: CouplingBody) -> None:
        """Which entries each layer keeps and moves, and the shapes of the weights that it uses."""
        layers, device = body.layers, body.layers.last_bias.device
        d, n_moved = self.dim, layers.moved.shape[1]
        self._n_kept = d - n_moved
        moved = [row.sort().values if not layers.spline else row for row in layers.moved.to(device)]
        every = torch.arange(d, device=device)
        self._kept = [every[torch.isin(every, row, invert=True)] for row in moved]
        after = [torch.cat(pair) for pair in zip(self._kept, moved, strict=True)]
        self._before = [order.argsort() for order in after]
        self._up = [after[0], *(b[a] for b, a in zip(self._before[:-1], after[1:], strict=True))]
        self._down = [*(b[a] for b, a in zip(self._before[1:], after[:-1], strict=True)), after[-1]]
        rows = layers.last_bias.shape[1]
        whole = torch.arange(rows, device=device)
        self._out = [whole if layers.spline else torch.cat([row, d + row]) for row in moved]
        t, p, h = len(moved), len(self._out[0]), self._width
        self._shapes: dict[str, tuple[int, ...]] = {"last_bias": (t, p, 1)}
        if h:
            self._shapes |= {
                "first": (t, h, self._n_kept),
                "first_bias": (t, h, 1),
                "second": (t, h, h),
                "second_bias": (t, h, 1),
                "last": (t, p, h),
            }
            if layers.direct is not None:
                self._shapes["direct"] = (t, p, self._n_kept)
        self._below = tuple(torch.tril_indices(d, d, -1, device=device))

    def _flat(self, body: CouplingBody) -> Tensor:
        layers = body.layers
        parts = [torch.stack([layers.last_bias[t, out] for t, out in enumerate(self._out)])]
        if layers.last is not None and layers.first is not None:
            parts.append(torch.stack([layers.first[t][:, kept] for t, kept in enumerate(self._kept)]))
            parts += [layers.first_bias, layers.second, layers.second_bias]
            parts.append(torch.stack([layers.last[t, out] for t, out in enumerate(self._out)]))
        if layers.direct is not None:
            places = enumerate(zip(self._out, self._kept, strict=True))
            parts.append(torch.stack([layers.direct[t][out[:, None], kept] for t, (out, kept) in places]))
        return torch.cat([part.detach().flatten() for part in parts])

    def _split(self, flat: Tensor) -> list[Tensor]:
        """(..., P) into views (..., T, ...) by name."""
        pieces = flat.split([math.prod(shape) for shape in self._shapes.values()], -1)
        return [
            piece.unflatten(-1, shape) for piece, shape in zip(pieces, self._shapes.values(), strict=True)
        ]

    def _by_layer(self, flat: Tensor) -> list[LayerWeights]:
        views = [view.unbind(1) for view in self._split(flat)]
        return [LayerWeights(*row) for row in zip(*views, strict=True)]

    def _weights(self, t: int) -> LayerWeights:
        if self.__dict__.get("_views_of") is not self.layers:
            self._views_of, self._views = self.layers, self._by_layer(self.layers)
        return self._views[t]

    def _empty_gradient(self) -> tuple[Tensor, list[LayerWeights]]:
        into = torch.empty_like(self.layers)
        return into, self._by_layer(into)


def _flat_place(body: CouplingBody) -> Tensor:
    return torch.cat([getattr(body.place, name).detach() for name in _PLACE]).double()


def _make(body: CouplingBody) -> tuple[object, ...]:
    layers = body.layers
    width = None if layers.first is None else layers.first.shape[1]
    return body.dim, len(layers.moved), width, layers.spline, layers.last_bias.dtype, layers.largest
