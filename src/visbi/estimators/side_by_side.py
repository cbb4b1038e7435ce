r"""Networks of one architecture as one network, whose weights have a leading axis: an ensemble in one pass.

Small networks on small batches cost what their operations cost to call, not what they compute, and K
networks side by side call each of them once. With batches of 50 and two dimensions, two networks take the
time of one; with batches of 400 and eight dimensions 1.6 times that. Each computes what it would alone, up to
rounding: where rows do not divide into vector instructions, which of them are left over depends on all rows.
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from visbi.core.checks import violation

__all__ = ["side_by_side"]

M = TypeVar("M", bound=nn.Module)


class _Linear(nn.Module):
    """K linear layers, masked or not: (K, N, in) -> (K, N, out); parameters are named as theirs are."""

    mask: Tensor | None

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))
        mask = getattr(layers[0], "mask", None)  # of the architecture, so the same in all
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        weight = self.weight if self.mask is None else self.weight * self.mask
        return torch.baddbmm(self.bias[:, None], y, weight.mT)


def side_by_side(networks: Sequence[M]) -> M:
    """One network that maps (K, N, ...) to (K, N, ...): slice k goes through `networks[k]`; they are copied.

    Args:
        networks: K of one architecture, whose parameters all belong to linear layers with a bias, and which
            otherwise act on the last axis alone.

    Raises:
        TypeError: another layer has parameters.

    >>> net = side_by_side([nn.Sequential(nn.Linear(2, 3), nn.SiLU()) for _ in range(4)])
    >>> net(torch.zeros(4, 5, 2)).shape
    torch.Size([4, 5, 3])
    """
    together = copy.deepcopy(networks[0])
    for name, layer in networks[0].named_modules():
        shapes = {which: p.ndim for which, p in layer.named_parameters(recurse=False)}
        if shapes == {"weight": 2, "bias": 1}:  # torch's and zuko's have no class in common
            above, _, own = name.rpartition(".")
            layers = [network.get_submodule(name) for network in networks]
            setattr(together.get_submodule(above), own, _Linear(layers))
        elif shapes:
            expected = "parameters in linear layers with a bias only"
            raise TypeError(violation("networks", expected, f"{type(layer).__name__} at {name!r}"))
    return together
