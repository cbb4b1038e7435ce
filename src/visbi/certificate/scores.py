r"""Scores beside k-hat: is q proportional to p?

For draws theta ~ g, regress exp(log p) on exp(log q) through the origin; the coefficient of determination r^2
is 1 if q is proportional to p where g puts its draws. g = q is the score `prop`, g = the prior `prop_prior`.
Both sides are scaled by their largest value first, so the score does not depend on the potential's constant.
"""

import torch
from torch import Tensor

__all__ = ["proportionality"]


def proportionality(log_p: Tensor, log_q: Tensor) -> float:
    """r^2 of p against q through the origin, at most 1; 1 means proportional, 0 or less unrelated.

    Args:
        log_p: (N,), unnormalised. log_q: (N,).

    >>> log_q = torch.randn(100)
    >>> round(proportionality(log_q + 3.0, log_q), 6)
    1.0
    """
    log_p, log_q = log_p.detach().double(), log_q.detach().double()
    valid = (log_p < torch.inf) & (log_q < torch.inf)  # -inf is a density of zero, NaN and +inf are none
    log_p, log_q = log_p[valid], log_q[valid]
    if not bool(log_p.isfinite().any() and log_q.isfinite().any()):
        return 0.0
    p, q = torch.exp(log_p - log_p.max()), torch.exp(log_q - log_q.max())
    slope = (p * q).sum() / q.square().sum()
    spread = (p - p.mean()).square().sum()
    residual = (p - slope * q).square().sum()
    if float(spread) == 0.0:
        return 1.0 if float(residual) < 1e-12 * len(p) else 0.0
    return float(1.0 - residual / spread)
