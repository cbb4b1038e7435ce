"""Modes among draws: how many, how heavy, and where.

Two draws belong to one mode if the density does not dip between them. Every draw is joined to those of its
nearest denser neighbours to which a straight line leads without a dip of more than `_DIP` nats below its
lower end; what hangs together is a mode (single linkage over a density, as in Chazal, Guibas, Oudot,
Skraba: Persistence-based clustering. 2013). Bent and funnel-shaped modes stay whole, because their lines
are short. The least dense tenth of the draws may lie in the valley between two modes: each of them joins the
nearest such neighbour alone, and so connects nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Mode", "find_modes"]

_DIP = 1.0
_NEIGHBOURS = 6
_VALLEY = 0.1  # share of the draws, the least dense ones, that connect nothing
_STEPS = 9  # points on a line, ends left out
_SMALLEST = 0.01  # share below which a mode is not told from stray draws
_DRAWS = 600
_AT_ONCE = 2**17  # distances held together: more do not fit into a cache


@dataclass(frozen=True)
class Mode:
    """A mode.

    Attributes:
        weight: its share of the draws.
        place: the densest of its draws, (D,) numbers.
    """

    weight: float
    place: tuple[float, ...]


def find_modes(
    z: Tensor, log_density: Callable[[Tensor], Tensor], places: Callable[[Tensor], Tensor] = lambda z: z
) -> tuple[Mode, ...]:
    """The modes among equally weighted draws, heaviest first.

    Args:
        z: (N, d) draws; the first 600 show which modes there are, all of them how heavy each is.
        log_density: (M, d) -> (M,), up to a constant.
        places: what to report for z (M, d), for example theta.

    >>> torch.manual_seed(0).__class__.__name__
    'Generator'
    >>> side = torch.where(torch.arange(400) < 300, 4.0, -4.0)[:, None]
    >>> z = side + torch.randn(400, 1)
    >>> def log_density(z):
    ...     return torch.logaddexp(-0.5 * (z - 4).square(), -0.5 * (z + 4).square())[:, 0]
    >>> [mode.weight for mode in find_modes(z, log_density)]
    [0.75, 0.25]
    """
    some = z[:_DRAWS]
    level = log_density(some)
    order = level.argsort(descending=True)
    some, level = some[order], level[order]
    label = _labels(some, level, log_density)
    scale = z.std(0).clamp_min(1e-300)
    nearest = _nearest(z / scale, some / scale)
    modes = []
    for which in label.unique().tolist():
        members = label == which
        if float(members.double().mean()) >= _SMALLEST:
            top = int(members.nonzero()[0])  # they are sorted by density
            modes.append((float(members[nearest].double().mean()), places(some[top : top + 1])[0]))
    total = sum(weight for weight, _ in modes)
    found = [Mode(weight / total, tuple(float(v) for v in place)) for weight, place in modes]
    return tuple(sorted(found, key=lambda mode: -mode.weight))


def _nearest(z: Tensor, places: Tensor) -> Tensor:
    """(N,) which of the places (n, d) is nearest to each of z (N, d)."""
    half = 0.5 * places.square().sum(1)
    step = max(1, _AT_ONCE // len(places))
    return torch.cat([torch.addmm(half, piece, places.T, alpha=-1).argmin(1) for piece in z.split(step)])


def _labels(z: Tensor, level: Tensor, log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """(n,) which of the draws (n, d), densest first, hang together.

    The nearest denser neighbour of each comes first, then the second, and so on; a line is looked at only if
    it would connect something.
    """
    n, d = z.shape
    y = (z - z.mean(0)) / z.std(0).clamp_min(1e-300)
    denser = torch.ones(n, n, dtype=torch.bool, device=z.device).tril(-1)
    distance = torch.where(denser, torch.cdist(y, y), torch.inf)
    near, neighbour = distance.topk(min(_NEIGHBOURS, n), largest=False)
    t = torch.linspace(0, 1, _STEPS + 2, dtype=z.dtype, device=z.device)[1:-1, None, None]
    label = torch.arange(n, device=z.device)
    low, tied = label >= (1 - _VALLEY) * n, torch.zeros_like(label, dtype=torch.bool)
    for k in range(near.shape[1]):
        j = neighbour[:, k]
        new = torch.where(low, ~tied, label != label[j]) & torch.isfinite(near[:, k])
        i, j = torch.where(new)[0], j[new]
        line = z[i] + t * (z[j] - z[i])
        lowest = log_density(line.reshape(-1, d)).reshape(_STEPS, -1).amin(0)
        flat = lowest > torch.minimum(level[i], level[j]) - _DIP
        i, j = i[flat], j[flat]
        tied[i] = True
        label = _joined(label, i, j)
    return label


def _joined(label: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Labels (n,), each the least index of what hangs together, after i and j (L,) were connected.

    Neighbours take the lower of their labels until none changes. To import scipy's graphs for it would take
    longer than a whole fit in a few dimensions.
    """
    while True:
        a, b = label[i], label[j]  # not of i and j themselves: whatever has their labels goes with them
        new = label.scatter_reduce(0, a, b, "amin")
        new = new.scatter_reduce(0, b, new[a], "amin")
        new = new[new]  # a label's own label may be lower
        if torch.equal(new, label):
            return label
        label = new
