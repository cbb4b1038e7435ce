"""A potential at many thetas for each of many observations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visbi.potentials.base import BasePotential

__all__ = ["evaluate_each"]

_AT_ONCE = 16_384  # theta in a call, and
_BYTES = 2**27  # of x, which come again for each of them


def evaluate_each(
    potential: BasePotential, theta: Sequence[Tensor], x: Sequence[Tensor], *, in_rows: bool
) -> list[Tensor]:
    """log p(theta | x) + const, (n_f,) for each of theta (n_f, D) and x, as `evaluate` takes it."""
    with torch.no_grad():
        if not in_rows:
            pairs = [
                (piece, x_o) for each, x_o in zip(theta, x, strict=True) for piece in each.split(_AT_ONCE)
            ]
            values = torch.cat([potential.evaluate(piece, x_o) for piece, x_o in pairs])
        else:
            observed = torch.cat(list(x))
            counts = torch.tensor([len(each) for each in theta], device=observed.device)
            owner = torch.arange(len(theta), device=observed.device).repeat_interleave(counts)
            at_once = max(1, min(_AT_ONCE, _BYTES // max(observed[:1].nbytes, 1)))
            pieces = zip(torch.cat(list(theta)).split(at_once), owner.split(at_once), strict=True)
            values = torch.cat(
                [potential.evaluate(piece, observed[whose], x_is_iid=False) for piece, whose in pieces]
            )
    return list(values.double().split([len(each) for each in theta]))
