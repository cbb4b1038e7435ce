"""Rows of theta and x: their shapes at the door, and sums over trials."""

from collections.abc import Callable

import torch
from torch import Tensor

from visbi.core.checks import finite_tensor, same_length, violation
from visbi.core.types import Shape

__all__ = ["as_rows", "paired", "simulations", "sum_over_trials"]

_PAIRS = 2**16  # pairs of theta and trial in one call of a network: bounds memory, not time


def simulations(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """theta (N, D) and x (N, ...) to train on, checked and floating.

    Raises:
        ValueError: no rows, theta not (N, D), x not (N, ...), different lengths, NaN or Inf.
    """
    theta, x = finite_tensor("theta", theta), finite_tensor("x", x)
    if theta.dim() != 2 or theta.shape[1] == 0:
        raise ValueError(violation("theta", "shape (N, D)", tuple(theta.shape)))
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(violation("x", "shape (N, ...) with at least one number in a row", tuple(x.shape)))
    same_length("theta", theta, "x", x)
    if theta.shape[0] == 0:
        raise ValueError(violation("theta` and `x", "at least one simulation", "none"))
    return _floating(theta), _floating(x).to(theta.device)


def _floating(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def as_rows(name: str, value: Tensor, event_shape: Shape) -> Tensor:
    """`value` if its shape is (N, *event_shape), or ValueError."""
    if tuple(value.shape[1:]) != tuple(event_shape) or value.dim() == 0:
        shape = ", ".join(map(str, ("N", *event_shape)))
        raise ValueError(violation(name, f"shape ({shape})", tuple(value.shape)))
    return value


def paired(theta: Tensor, x: Tensor) -> None:
    """Raise ValueError unless theta and x have equally many rows, or one of them a single one."""
    if 1 not in (theta.shape[0], x.shape[0]):
        same_length("theta", theta, "x", x)


def sum_over_trials(pairwise: Callable[[Tensor, Tensor], Tensor], rows: Tensor, trials: Tensor) -> Tensor:
    """sum_t pairwise(rows_n, trials_t), (N,), for rows (N, A) and trials (T, B).

    Args:
        pairwise: called with (n, 1, A) and (1, t, B); (n, t).
        rows, trials: the two sides.
    """
    parts = trials.split(_PAIRS)

    def summed(block: Tensor) -> Tensor:
        return torch.stack([pairwise(block[:, None], part[None]).sum(1) for part in parts]).sum(0)

    return torch.cat([summed(block) for block in rows.split(max(1, _PAIRS // max(1, trials.shape[0])))])
