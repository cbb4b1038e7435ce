"""Losses of simulations whose mean is to decide something: no single one of them shall."""

import torch
from torch import Tensor

__all__ = ["within_reach"]

_FAR = 20.0  # widths of the middle half


def within_reach(losses: Tensor) -> Tensor:
    """Losses (N,), at most 20 widths of their middle half above the median; NaN where one is.

    One simulation far outside of the others may lose a million nats, and whether it loses more or less would
    decide when training ends, or what is better than what.

    >>> within_reach(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 1e6])).tolist()
    [1.0, 2.0, 3.0, 4.0, 5.0, 53.5]
    """
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=losses.device)
    low, median, high = losses.double().quantile(quarters)
    limit = torch.where(high > low, median + _FAR * (high - low), torch.inf)
    return losses.clamp_max(limit.to(losses))
