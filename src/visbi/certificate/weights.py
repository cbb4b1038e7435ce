r"""Importance weights: log w = log p(theta) - log q(theta) at draws theta ~ q.

If q were right, log w would be constant. How far it is from that says how good q is:

k-hat
    shape of the generalised Pareto distribution fitted to the excesses of the largest weights over their
    cut-off (Vehtari, Simpson, Gelman, Yao, Gabry 2024). Below .7 the smoothed weights can be used. For
    q = N(0, s^2) and p = N(0, 1) the true value is 1 - s^2 for s < 1.
ESS
    (sum w)^2 / sum w^2, the number of exact draws that the weighted ones are worth.
total variation
    sup_A |p(A) - q(A)| = E_q |w / Z - 1| / 2. A perfect classifier between draws of p and of q is right with
    probability (1 + TV) / 2, so this is what a two-sample test can see at best.

All of it in float64 and in log space: adding a constant to log p changes only the evidence.
"""

import math

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import violation

__all__ = [
    "MIN_DRAWS",
    "divergences",
    "effective_sample_size",
    "log_evidence",
    "pareto_smooth",
    "resample",
    "tail_excess",
    "total_variation",
    "unseen_mass",
]

_CONSTANT = 1e-3  # spread of log w below which the weights are constant and a tail has no shape
MIN_DRAWS = 25
"""Fewer leave a tail of less than the five points that a Pareto fit needs."""
_UNDERFLOW = -700.0  # exp of less is next to zero in float64


def _clean(log_w: Tensor) -> Tensor:
    log_w = torch.as_tensor(log_w).detach().double().flatten()
    if len(log_w) < MIN_DRAWS:
        raise ValueError(violation("log_w", f"at least {MIN_DRAWS} log-weights", len(log_w)))
    return torch.where(torch.isfinite(log_w), log_w, -torch.inf)


def pareto_smooth(log_w: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed, normalised log-weights (N,) and k-hat.

    Weights that are NaN or infinite count as zero, and zero weights say nothing about the tail. Constant
    weights give k-hat = -inf: a tail without spread has no shape. Where no tail can be fitted, because fewer
    than 25 weights are left or they are too uneven for float64, k-hat is +inf and nothing is smoothed; if
    none is left the weights are uniform.

    Args:
        log_w: (N,), N >= 25.

    >>> log_w = -0.5 * torch.linspace(-3, 3, 1000).square()
    >>> smooth, khat = pareto_smooth(log_w)
    >>> round(float(smooth.exp().sum()), 6), khat < 0.5
    (1.0, True)
    """
    log_w = _clean(log_w)
    finite = torch.isfinite(log_w)
    if not bool(finite.any()):
        return torch.full_like(log_w, -math.log(len(log_w))), math.inf
    raw = torch.log_softmax(log_w, 0)
    values = log_w[finite] - log_w[finite].max()
    if len(values) < MIN_DRAWS:
        return raw, math.inf
    size = _tail_size(len(values))
    tail = torch.topk(values, size + 1).values
    if float(values.std()) < _CONSTANT or float(tail[0] - tail[-1]) < _CONSTANT:
        return raw, -math.inf
    # the fit is scaled by the lower quartile of the excesses; where that is zero it returns any number
    quartile = tail[size - int(size / 4 + 0.5)].clamp_min(_UNDERFLOW)
    if float(quartile.exp() - tail[-1].clamp_min(_UNDERFLOW).exp()) <= 0.0:
        return raw, math.inf
    smooth, khat = _pareto_fit(values)
    if not bool(torch.isfinite(smooth).all()):
        return raw, khat
    return torch.log_softmax(torch.full_like(log_w, -torch.inf).masked_scatter(finite, smooth), 0), khat


def _pareto_fit(values: Tensor) -> tuple[Tensor, float]:
    """Smoothed log-weights and k-hat of log-weights with largest value 0; k-hat +inf where the fit breaks."""
    from arviz_stats.base import array_stats  # type: ignore[attr-defined]

    with np.errstate(all="ignore"):
        # its argument is minus the log-weights, as in leave-one-out cross-validation
        smooth, khat = array_stats.psislw(-values.clamp_min(_UNDERFLOW).cpu().numpy())
    khat = float(khat)
    return torch.as_tensor(smooth).to(values), khat if math.isfinite(khat) else math.inf


def _tail_size(n: int) -> int:
    """How many of n weights make the tail, as in arviz-stats."""
    return int(min(3 * math.sqrt(n), n / 5))


def tail_excess(smooth: Tensor, khat: float) -> float:
    """Share of p's mass in the fitted tail above its cut-off, seen and unseen; infinite for k-hat >= 1.

    A tail may be heavy and still hold nothing: for a q that is right to a tenth of a percent k-hat describes
    the shape of that tenth. The M smoothed weights are quantiles of the fitted distribution up to 1 - 1/(2M);
    their sum misses a share of the whole of about (2M)^(k - 1).

    Args:
        smooth: (N,) normalised log-weights of `pareto_smooth`. khat: its k-hat.

    >>> tail_excess(torch.full((100,), -math.log(100)), -math.inf)
    0.0
    """
    if khat == -math.inf:
        return 0.0
    if khat >= 1.0:
        return math.inf
    size, seen = _tail(smooth)
    return seen / (1.0 - _unseen_share(size, khat))


def unseen_mass(smooth: Tensor, khat: float, *, sigmas: float = 0.0) -> float:
    """The part of `tail_excess` above the largest weight seen: what q's draws did not reach, extrapolated.

    Args:
        smooth: (N,) normalised log-weights of `pareto_smooth`. khat: its k-hat.
        sigmas: by how many of its standard errors, (1 + k) / sqrt(M), k-hat is raised first; near k = 1 the
            extrapolation hangs on its digits.
    """
    if not math.isfinite(khat):
        return 0.0 if khat < 0 else math.inf
    size, seen = _tail(smooth)
    k = khat + sigmas * (1.0 + max(khat, 0.0)) / math.sqrt(size)
    if k >= 1.0:
        return math.inf
    share = _unseen_share(size, k)
    return seen * share / (1.0 - share)


def _tail(smooth: Tensor) -> tuple[int, float]:
    """How many weights make the tail, and the sum of their excesses over its cut-off."""
    size = _tail_size(int(torch.isfinite(smooth).sum()))
    top = torch.topk(smooth, size + 1).values.exp()
    return size, float((top[:-1] - top[-1]).sum())


def _unseen_share(size: int, khat: float) -> float:
    return (2.0 * size) ** (khat - 1.0)


def effective_sample_size(log_w: Tensor) -> float:
    """(sum w)^2 / sum w^2, a count between 0 and N.

    >>> effective_sample_size(torch.zeros(100))
    100.0
    """
    log_w = _clean(log_w)
    if not bool(torch.isfinite(log_w).any()):
        return 0.0
    log_w = log_w - log_w.max()
    return float(torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0)))


def log_evidence(log_w: Tensor) -> tuple[float, float]:
    """log of the mean weight, which estimates log of the integral of p, and its standard error.

    The error is that of the mean weight relative to it, sqrt((N / ESS - 1) / N).

    >>> log_evidence(torch.full((100,), 2.0))
    (2.0, 0.0)
    """
    log_w = _clean(log_w)
    n = len(log_w)
    ess = effective_sample_size(log_w)
    if ess == 0.0:
        return -math.inf, math.inf
    return float(torch.logsumexp(log_w, 0)) - math.log(n), math.sqrt(max(n / ess - 1.0, 0.0) / n)


def divergences(log_w: Tensor) -> tuple[float, float]:
    """KL(q || p) = log Z - E_q[log w] and KL(p || q) = E_p[log w] - log Z, in nats, never negative.

    Where draws of q have a potential of -inf, the first is infinite; weights that miss part of p make the
    second too small.

    >>> divergences(torch.zeros(100))
    (0.0, 0.0)
    """
    clean = _clean(log_w)
    finite = clean.isfinite()
    if not bool(finite.any()):
        return math.inf, math.inf
    log_z = torch.logsumexp(clean, 0) - math.log(len(clean))
    values = torch.where(finite, clean, 0.0)
    forward = (torch.softmax(clean, 0) * values).sum() - log_z
    reverse = log_z - clean.mean()
    return max(float(reverse), 0.0), max(float(forward), 0.0)


def total_variation(log_w: Tensor) -> float:
    """Distance in total variation between q and the normalised p, between 0 and 1.

    >>> total_variation(torch.zeros(100))
    0.0
    """
    log_w = _clean(log_w)
    if not bool(torch.isfinite(log_w).any()):
        return 1.0
    relative = torch.exp(log_w - torch.logsumexp(log_w, 0) + math.log(len(log_w)))
    return 0.5 * float((relative - 1.0).abs().mean())


def resample(log_w: Tensor, n: int) -> Tensor:
    """Indices (n,) drawn with probability proportional to the weights, systematically, in random order.

    One uniform number serves for all, so that index i comes up n w_i times, rounded up or down.

    >>> resample(torch.log(torch.tensor([0.0, 1.0] * 20)), 4).remainder(2).tolist()
    [1, 1, 1, 1]
    """
    log_w = _clean(log_w)
    if not bool(torch.isfinite(log_w).any()):
        raise ValueError(violation("log_w", "at least one finite log-weight", "none"))
    edges = torch.softmax(log_w, 0).cumsum(0)
    points = (torch.rand((), dtype=torch.float64) + torch.arange(n)) / n
    index = torch.searchsorted(edges, points.to(edges.device) * edges[-1])
    return index[torch.randperm(n, device=index.device)]
