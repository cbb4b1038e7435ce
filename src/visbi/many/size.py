r"""How many observations fit into memory at once.

A chunk of F fits holds, at its widest, F times `_DRAWS` rows of theta with a few copies of them and what
mixtures say of them, and inside the potential a part of those rows with all that its gradient needs:

    F * _DRAWS * 8 * (_COPIES * D + _OTHERS)  +  _AT_ONCE * width  <=  memory        [bytes].

The width of a potential, in bytes a row, is measured: what autograd keeps for one row more. The other numbers
bound what was seen: 3.3 MB a fit for linear Gaussians of 10 parameters, 11 MB of 40, 15 MB where mixtures of
many
components were tried (two moons).
"""

import torch
from torch import Tensor

from visbi.potentials.base import BasePotential

__all__ = ["rows_per_chunk", "width"]

_DRAWS = 16_384  # that a certificate rests on
_AT_ONCE = 16_384  # rows in one call of the potential
_COPIES = 6  # of draws: z, theta, gradients and what is made on the way
_OTHERS = 110  # numbers for a draw whatever D: densities of components, weights
_MOST = 64  # a kill costs a chunk, and workers share whole ones


def rows_per_chunk(n_obs: int, dim: int, width: float, memory: float) -> int:
    """Observations in a chunk, 1 to 64, for `memory` bytes; a function of its arguments alone.

    >>> rows_per_chunk(1000, 2, 1000.0, 2**30), rows_per_chunk(1000, 200, 1000.0, 2**30)
    (64, 6)
    """
    left = memory - _AT_ONCE * width
    each = _DRAWS * 8 * (_COPIES * dim + _OTHERS)
    return max(1, min(_MOST, n_obs, int(left // each)))


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
    try:
        kept = {n: _kept(potential, theta[:n], x[:n] if in_rows else x, in_rows) for n in (few, many)}
    except Exception:  # noqa: BLE001 - NumPy in a potential, for one, refuses what has a gradient
        return 0.0
    return max(0.0, (kept[many] - kept[few]) / (many - few))


def _kept(potential: BasePotential, theta: Tensor, x: Tensor, in_rows: bool) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        leaf = theta.detach().clone().requires_grad_()
        if in_rows:
            potential.evaluate(leaf, x, x_is_iid=False)
        else:
            potential.evaluate(leaf, x)
    return total
