r"""How many observations fit into memory at once.

A chunk of F fits holds, at its widest, F times `_DRAWS` rows of theta with a few copies of them and what
mixtures say of them, and inside the potential a part of those rows with all that its gradient needs:

    F * _DRAWS * 8 * (_COPIES * D + _OTHERS)  +  _AT_ONCE * width  <=  memory        [bytes].

The width of a potential, in bytes a row, is measured: what autograd keeps for one row more. The other numbers
bound what was seen: 3.3 MB a fit for linear Gaussians of 10 parameters, 11 MB of 40, 15 MB where mixtures of
many components were tried (two moons).

Fits of a named family hold what autograd keeps of a step: for each particle, a draw of q and a row of the
potential, both measured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from visbi.families.base import Family
from visbi.potentials.base import BasePotential

__all__ = ["draw_width", "rows_per_chunk", "width"]

_DRAWS = 16_384  # that a certificate rests on
_AT_ONCE = 16_384  # rows in one call of the potential
_COPIES = 6  # of draws: z, theta, gradients and what is made on the way
_OTHERS = 110  # numbers for a draw whatever D: densities of components, weights
_MOST = 64  # a kill costs a chunk, and workers share whole ones


def rows_per_chunk(n_obs: int, dim: int, width: float, memory: float, *, step: float | None = None) -> int:
    """Observations in a chunk, 1 to 64, for `memory` bytes; a function of its arguments alone.

    Args:
        n_obs: observations.
        dim: D.
        width: of the potential, in bytes.
        memory: bytes.
        step: of a named family, bytes that a step of one fit keeps; None for q="auto".

    >>> rows_per_chunk(1000, 2, 1000.0, 2**30), rows_per_chunk(1000, 200, 1000.0, 2**30)
    (64, 6)
    >>> rows_per_chunk(1000, 2, 1000.0, 2**30, step=1e8)
    10
    """
    left = memory - _AT_ONCE * width if step is None else memory
    each = _DRAWS * 8 * (_COPIES * dim + _OTHERS) if step is None else step
    return max(1, min(_MOST, n_obs, int(left // max(each, 1.0))))


def draw_width(family: Family) -> float:
    """Bytes that autograd keeps for a draw of q and its density."""
    few, many = 32, 128
    kept = {n: _kept(lambda n=n: family.draw(n)) for n in (few, many)}
    return max(0.0, (kept[many] - kept[few]) / (many - few))


def width(potential: BasePotential, theta: Tensor, x: Tensor, *, in_rows: bool) -> float:
    """Bytes that the potential's gradient keeps for a row of theta; 0 where there is none.

    Args:
        potential: log p(theta | x) + const.
        theta: (M, D) in the prior's support.
        x: (M, ...) rows for them, or one observation as `evaluate` takes it if the potential does not take
            rows.
        in_rows: whether it does.
    """
    few, many = -(-len(theta) // 4), len(theta)
    if few == many:
        return 0.0

    def evaluated(n: int) -> None:
        leaf = theta[:n].detach().clone().requires_grad_()
        if in_rows:
            potential.evaluate(leaf, x[:n], x_is_iid=False)
        else:
            potential.evaluate(leaf, x)

    try:
        kept = {n: _kept(lambda n=n: evaluated(n)) for n in (few, many)}
    except Exception:  # noqa: BLE001 - NumPy in a potential, for one, refuses what has a gradient
        return 0.0
    return max(0.0, (kept[many] - kept[few]) / (many - few))


def _kept(work: Callable[[], object]) -> int:
    """Bytes that autograd keeps of some work."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return total
