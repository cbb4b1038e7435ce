"""Choosing along the second axis of what has a leading fit axis: each fit its own rows."""

import torch
from torch import Tensor

__all__ = ["leading", "picked", "trues_first"]


def picked(z: Tensor, index: Tensor) -> Tensor:
    """Points (F, n, d) of z (F, N, d) by their indices (F, n).

    >>> z = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    >>> picked(z, torch.tensor([[1], [0]])).flatten().tolist()
    [2.0, 3.0]
    """
    return z.gather(1, index[..., None].expand(-1, -1, z.shape[-1]))


def trues_first(mask: Tensor) -> Tensor:
    """Indices (F, N) that bring what is True in mask (F, N) to the front and keep the order otherwise.

    >>> trues_first(torch.tensor([[False, True, True]])).tolist()
    [[1, 2, 0]]
    """
    return mask.byte().argsort(stable=True, dim=1, descending=True)


def leading(counts: Tensor, n: int) -> Tensor:
    """(F, n) bool: the first `counts` (F,) of each row.

    >>> leading(torch.tensor([1, 2]), 2).tolist()
    [[True, False], [True, True]]
    """
    return torch.arange(n, device=counts.device) < counts[:, None]
