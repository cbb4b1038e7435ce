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

import torch
from torch import Tensor

from visbi.certificate import rows
from visbi.certificate.rows import MIN_DRAWS
from visbi.core.checks import violation

__all__ = [
    "MIN_DRAWS",
    "divergences",
    "effective_sample_size",
    "log_evidence",
    "pareto_smooth",
    "resample",
    "total_variation",
    "unseen_mass",
]


def _row(log_w: Tensor) -> Tensor:
    return rows.cleaned(torch.as_tensor(log_w).flatten()[None])


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
    smooth, khat = rows.pareto_smooth(_row(log_w))
    return smooth[0], float(khat)


def unseen_mass(smooth: Tensor, khat: float, *, sigmas: float = 0.0) -> float:
    """The mass of p in the fitted tail above the largest weight: what q's draws did not reach, extrapolated.

    A tail may be heavy and still hold nothing: for a q that is right to a tenth of a percent k-hat describes
    the shape of that tenth. The M smoothed weights are quantiles of the fitted distribution up to 1 - 1/(2M);
    their sum misses a share of the whole of about (2M)^(k - 1).

    Args:
        smooth: (N,) normalised log-weights of `pareto_smooth`. khat: its k-hat.
        sigmas: by how many of its standard errors, (1 + k) / sqrt(M), k-hat is raised first; near k = 1 the
            extrapolation hangs on its digits.
    """
    return float(rows.unseen_mass(rows.tail_mass(smooth[None]), smooth.new_tensor([khat]), sigmas=sigmas))


def effective_sample_size(log_w: Tensor) -> float:
    """(sum w)^2 / sum w^2, a count between 0 and N.

    >>> effective_sample_size(torch.zeros(100))
    100.0
    """
    return float(rows.effective_sample_size(_row(log_w)))


def log_evidence(log_w: Tensor) -> tuple[float, float]:
    """log of the mean weight, which estimates log of the integral of p, and its standard error.

    The error is that of the mean weight relative to it, sqrt((N / ESS - 1) / N).

    >>> log_evidence(torch.full((100,), 2.0))
    (2.0, 0.0)
    """
    value, error = rows.log_evidence(_row(log_w))
    return float(value), float(error)


def divergences(log_w: Tensor) -> tuple[float, float]:
    """KL(q || p) = log Z - E_q[log w] and KL(p || q) = E_p[log w] - log Z, in nats, never negative.

    Where draws of q have a potential of -inf, the first is infinite; weights that miss part of p make the
    second too small.

    >>> divergences(torch.zeros(100))
    (0.0, 0.0)
    """
    reverse, forward = rows.divergences(_row(log_w))
    return float(reverse), float(forward)


def total_variation(log_w: Tensor) -> float:
    """Distance in total variation between q and the normalised p, between 0 and 1.

    >>> total_variation(torch.zeros(100))
    0.0
    """
    return float(rows.total_variation(_row(log_w)))


def resample(log_w: Tensor, n: int) -> Tensor:
    """Indices (n,) drawn with probability proportional to the weights, systematically, in random order.

    One uniform number serves for all, so that index i comes up n w_i times, rounded up or down.

    >>> resample(torch.log(torch.tensor([0.0, 1.0] * 20)), 4).remainder(2).tolist()
    [1, 1, 1, 1]
    """
    log_w = _row(log_w)[0]
    if not bool(torch.isfinite(log_w).any()):
        raise ValueError(violation("log_w", "at least one finite log-weight", "none"))
    edges = torch.softmax(log_w, 0).cumsum(0)
    points = (torch.rand((), dtype=torch.float64) + torch.arange(n)) / n
    index = torch.searchsorted(edges, points.to(edges.device) * edges[-1])
    return index[torch.randperm(n, device=index.device)]
