"""What ascents are tried on."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.fitting.budget import Budget
from visbi.fitting.target import Target
from visbi.priors import coordinates

__all__ = ["stretched", "target_of"]


def target_of(log_p: Callable[[Tensor], Tensor], dim: int, budget: Budget | None = None) -> Target:
    """ell(z) of a log-density given in z itself: the prior is N(0, I)."""
    prior = Independent(Normal(torch.zeros(dim).double(), 1.0), 1)
    return Target(log_p, coordinates(prior), *([] if budget is None else [budget]))


def stretched(dim: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a rotated Gaussian whose scales run from 1e-4 to 1."""
    torch.manual_seed(dim)
    turn = torch.linalg.qr(torch.randn(dim, dim).double()).Q
    return 0.3 * torch.randn(dim).double(), turn @ torch.logspace(-8, 0, dim).double().diag() @ turn.T
