"""Names for tensors and callables that several rooms share.

Shapes are part of the names' documentation: N particles or draws, D parameters, S simulations.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["LogDensity", "Seed", "Shape", "ZScore"]

LogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""An unnormalised log-density: theta (N, D) -> (N,)."""

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]

Seed: TypeAlias = int | Tensor | None
"""A seed, or None for torch's global generator."""

ZScore: TypeAlias = Literal["none", "independent", "structured"]
