r"""The numbers about importance weights for many q at once: `cleaned` log-weights (F, N), a row for each q.

What they mean stands in `certificate.weights`, which asks here for one row. A tail of M excesses y over its
cut-off gets a generalised Pareto distribution of shape k and scale s by the posterior mean of Zhang and
Stephens (2009): with b = -k / s, the largest excess y+ and a lower quartile y* of them,

    b_j = 1 / y+ + (1 - sqrt(m / (j - 1/2))) / (3 y*),   j = 1 ... m = 30 + floor(sqrt M),
    k_j = mean log(1 - b_j y),   weight of b_j  ~  exp(M (log(-b_j / k_j) - k_j - 1)),

b is the weighted mean of the b_j, k = mean log(1 - b y), s = -k / b, and k is drawn towards 1/2 as by ten
more excesses (Vehtari, Simpson, Gelman, Yao, Gabry 2024, whose smoothed weights are M quantiles of the fit).
"""

import math

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.logs import UNDERFLOW, log_sum_exp

__all__ = [
    "MIN_DRAWS",
    "cleaned",
    "divergences",
    "effective_sample_size",
    "log_evidence",
    "pareto_smooth",
    "tail_mass",
    "total_variation",
    "unseen_mass",
]

MIN_DRAWS = 25
"""Fewer leave a tail of less than the five points that a Pareto fit needs."""
_CONSTANT = 1e-3  # spread of log w below which the weights are constant and a tail has no shape
_PRIOR_SHAPE, _PRIOR_EXCESSES = 0.5, 10
_AT_ONCE = 2**22  # numbers


def cleaned(log_w: Tensor) -> Tensor:
    """(F, N) in float64 without gradient; -inf for what is not finite.

    Raises:
        ValueError: fewer than 25 columns.
    """
    log_w = log_w.detach().double()
    if log_w.shape[1] < MIN_DRAWS:
        raise ValueError(violation("log_w", f"at least {MIN_DRAWS} log-weights", log_w.shape[1]))
    return torch.where(torch.isfinite(log_w), log_w, -torch.inf)


def pareto_smooth(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed, normalised log-weights (F, N) and k-hat (F,)."""
    finite = torch.isfinite(log_w)
    smooth = torch.log_softmax(log_w, 1)  # NaN where none is finite
    khat = log_w.new_full((len(log_w),), torch.inf)
    counts = finite.sum(1)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        if count == 0:
            smooth[rows] = -math.log(log_w.shape[1])
        elif count >= MIN_DRAWS:
            values = log_w[rows][finite[rows]].view(len(rows), count)
            found, khat[rows] = _smooth_finite(values)
            smooth[rows] = smooth[rows].masked_scatter(finite[rows], found)
    return smooth, khat


def _smooth_finite(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of log-weights that are all finite."""
    values = log_w - log_w.amax(1, keepdim=True)
    raw = torch.log_softmax(values, 1)
    khat = values.new_full((len(values),), torch.inf)
    size = _tail_size(values.shape[1])
    top = torch.topk(values, size + 1)
    tail = top.values
    constant = (values.std(1) < _CONSTANT) | (tail[:, 0] - tail[:, -1] < _CONSTANT)
    khat[constant] = -torch.inf
    excess = tail.clamp_min(UNDERFLOW).exp()
    cutoff = excess[:, -1:]
    # the fit is scaled by the lower quartile of the excesses; where that is zero it returns any number
    fitted = ~constant & (excess[:, size - int(size / 4 + 0.5)] > cutoff[:, 0])
    if not bool(fitted.any()):
        return raw, khat
    excess, cutoff = excess[fitted, :-1] - cutoff[fitted], cutoff[fitted]
    shape, scale = _pareto_fit(excess)
    khat[fitted] = torch.where(torch.isfinite(shape), shape, torch.inf)
    below = torch.arange(size - 0.5, 0.0, -1.0, dtype=shape.dtype, device=shape.device) / size  # from the top
    quantiles = cutoff + scale[:, None] * torch.expm1(-shape[:, None] * torch.log1p(-below)) / shape[:, None]
    quantiles = quantiles.log().minimum(tail[fitted, :1])
    sound = torch.isfinite(quantiles).all(1) & (scale > 0)
    rows = fitted.nonzero()[sound, 0]
    better = values[rows].clamp_min(UNDERFLOW).scatter(1, top.indices[rows, :-1], quantiles[sound])
    raw[rows] = torch.log_softmax(better, 1)
    return raw, khat


def _pareto_fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale (F,) of the tails with excesses (F, M), in descending order."""
    m = 30 + math.isqrt(excess.shape[1])
    at_once = max(1, _AT_ONCE // (m * excess.shape[1]))
    parts = [_pareto_fit_part(part, m) for part in excess.split(at_once)]
    return torch.cat([shape for shape, _ in parts]), torch.cat([scale for _, scale in parts])


def _pareto_fit_part(y: Tensor, m: int) -> tuple[Tensor, Tensor]:
    size = y.shape[1]
    quartile = y[:, size - int(size / 4 + 0.5), None]
    grid = torch.arange(0.5, m, dtype=y.dtype, device=y.device)
    b = 1.0 / y[:, :1] + (1.0 - (m / grid).sqrt()) / (3.0 * quartile)
    k = torch.log1p(-b[..., None] * y[:, None]).mean(-1)
    weights = torch.softmax(size * ((-b / k).log() - k - 1.0), 1)
    b = (b * weights).sum(1)
    k = torch.log1p(-b[:, None] * y).mean(1)
    return (size * k + _PRIOR_EXCESSES * _PRIOR_SHAPE) / (size + _PRIOR_EXCESSES), -k / b


def _tail_size(n: int) -> int:
    """How many of n weights make the tail."""
    return int(min(3 * math.sqrt(n), n / 5))


def tail_mass(smooth: Tensor) -> tuple[Tensor, Tensor]:
    """How many weights make the tail (F,), and the sum of their excesses over its cut-off (F,)."""
    if not len(smooth):
        return smooth.new_zeros(0), smooth.new_zeros(0)
    counts = torch.isfinite(smooth).sum(1).tolist()
    size = torch.tensor([_tail_size(count) for count in counts], device=smooth.device)
    top = torch.topk(smooth, int(size.max()) + 1).values.exp()
    over = top - top.gather(1, size[:, None])
    in_tail = torch.arange(top.shape[1], device=size.device) < size[:, None]
    return size, torch.where(in_tail, over, 0.0).sum(1)


def unseen_mass(tail: tuple[Tensor, Tensor], khat: Tensor, *, sigmas: float = 0.0) -> Tensor:
    """(F,): the part of the fitted tail above the largest weight seen; see `weights.unseen_mass`.

    Args:
        tail: of `tail_mass`.
        khat: (F,).
        sigmas: by how many standard errors k-hat is raised.
    """
    size, seen = tail
    k = khat + sigmas * (1.0 + khat.clamp_min(0.0)) / size.sqrt()
    share = (2.0 * size) ** (k - 1.0)
    mass = torch.where(k < 1.0, seen * share / (1.0 - share), torch.inf)
    return torch.where(khat == -torch.inf, 0.0, mass)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of every row, (F,)."""
    log_w = log_w - log_w.amax(1, keepdim=True)  # NaN where none is finite
    return torch.exp(2 * log_sum_exp(log_w, 1) - log_sum_exp(2 * log_w, 1)).nan_to_num(0.0)


def log_evidence(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean weight and its standard error, (F,) each."""
    n = log_w.shape[1]
    error = ((n / effective_sample_size(log_w) - 1.0).clamp_min(0.0) / n).sqrt()
    return log_sum_exp(log_w, 1) - math.log(n), error


def divergences(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) and KL(p || q), (F,) each, in nats."""
    finite = torch.isfinite(log_w)
    log_z = log_sum_exp(log_w, 1) - math.log(log_w.shape[1])
    forward = (torch.softmax(log_w, 1) * torch.where(finite, log_w, 0.0)).sum(1) - log_z
    reverse = log_z - log_w.mean(1)
    some = finite.any(1)
    return tuple(torch.where(some, kl.clamp_min(0.0), torch.inf) for kl in (reverse, forward))  # type: ignore[return-value]


def total_variation(log_w: Tensor) -> Tensor:
    """Distance between q and the normalised p, (F,)."""
    relative = torch.exp(log_w - log_sum_exp(log_w, 1)[:, None] + math.log(log_w.shape[1]))
    return (0.5 * (relative - 1.0).abs().mean(1)).nan_to_num(1.0)
