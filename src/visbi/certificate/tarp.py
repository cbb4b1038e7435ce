r"""TARP: tests of accuracy with random points; coverage without densities.

Around a reference point r, the share f of draws that lie nearer to r than the truth does is uniform if q is
right, for any r that knows nothing of the truth but x. The expected coverage probability of level c is the
share of observations with f < c; a q whose curve is the diagonal for every r is right (Lemos, Coogan,
Hezaveh, Perreault-Levasseur: Sampling-based accuracy testing of posterior estimators for general inference.
2023).

Beside the curve:

    ATC   area between the upper half of the curve and the diagonal, negative where q is over-confident
    bias  if the truths lie to one side of the draws, f is small for references on that side and large on the
          other: the correlation of f with the direction from the draws' mean to r, times sqrt(n), is
          standard normal if q is right. This is ours.

Balls around wrong places hold too little as narrow ones do: what looks over-confident is bias if the
parameters' ranks speak of a shift more than of a spread (`ranks.lie_aside`), as for expected coverage.

References are uniform in the box that holds the middle 99 % of all draws; distances are in units of its
sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visbi.certificate.ranks import (
    ALPHA,
    checked_names,
    checked_pairs,
    clear,
    lie_aside,
    p_text,
    ranks_among,
    spread_score,
    unit,
)
from visbi.certificate.uniformity import Curve, curve, holm, kolmogorov_smirnov
from visbi.core.checks import finite_tensor, in_interval, violation
from visbi.core.random import seeded
from visbi.core.types import Seed

__all__ = ["TARP", "tarp"]

_INSIDE = 0.99  # share of draws between the sides of the box, in each parameter
_ATC_DEVIATION = (1 / 6 - (3 / 8) ** 2) ** 0.5  # of 1 - max(f, 1/2), f uniform


@dataclass(frozen=True, eq=False)
class TARP:
    """What TARP found.

    Attributes:
        verdict: "calibrated", "over-confident", "under-confident", "biased", or "miscalibrated" where the
            curve is off in another way.
        p_value: of curve and bias together, corrected for their number (Holm).
        curve: `levels` and, as `shares`, the expected coverage; `p_value` that it is the diagonal.
        ks_p_value: the same from the test of Kolmogorov and Smirnov.
        atc: area between curve and diagonal above level 1/2, negative where q is over-confident.
        bias: (D,) scores, standard normal if q is right, positive where the truths lie above the draws.
        names: of the D parameters.
        ranks: (n_obs,) draws nearer to the reference than the truth, 0 .. n_draws.
        alpha: chance of a false alarm.
    """

    verdict: str
    p_value: float
    curve: Curve
    ks_p_value: float
    atc: float
    bias: np.ndarray
    names: tuple[str, ...]
    ranks: Tensor
    alpha: float

    def __str__(self) -> str:
        p = p_text(self.p_value)
        numbers = f"area to curve {self.atc:+.3f}, {p}"
        if self.verdict == "calibrated":
            return f"calibrated: balls around random points hold the truths they should ({numbers})"
        if self.verdict == "biased":
            i = int(np.abs(self.bias).argmax())
            side = "above" if self.bias[i] > 0 else "below"
            return f"biased: the truths lie {side} the draws of {self.names[i]} ({p})"
        how = {"over-confident": "too few", "under-confident": "too many", "miscalibrated": "not the"}
        return f"{self.verdict}: balls around random points hold {how[self.verdict]} truths ({numbers})"


def tarp(
    theta: Tensor,
    draws: Tensor,
    *,
    references: Tensor | None = None,
    names: Sequence[str] | None = None,
    alpha: float = ALPHA,
    seed: Seed = None,
) -> TARP:
    """Coverage of balls around random points.

    Args:
        theta: true parameters, (n_obs, D).
        draws: of q(theta | x) for the x of each, (n_draws, n_obs, D), independent.
        references: (n_obs, D), which may depend on x but not on `theta`; None draws them.
        names: of the D parameters.
        alpha: chance that a right q is called wrong.
        seed: of references and ties; None for torch's global generator.

    Raises:
        ValueError: shapes that do not fit, less than 20 observations or 10 draws, numbers not finite, or
            `alpha` not in (0, 1).

    >>> from visbi.core.random import seeded
    >>> with seeded(1):
    ...     theta = torch.randn(500, 1)
    ...     x = theta + torch.randn(500, 1)
    ...     wide = x / 2 + 1.2 * torch.randn(100, 500, 1)
    >>> print(tarp(theta, wide, seed=1))
    under-confident: balls around random points hold too many truths (area to curve +0.052, p < 1e-15)
    """
    theta, draws = checked_pairs(theta, draws)
    alpha = in_interval("alpha", alpha, 0, 1)
    n_draws, _, dim = draws.shape
    labels = checked_names(names, dim)
    low, side = _box(draws)
    theta, draws = (theta - low) / side, (draws - low) / side
    with seeded(seed):
        if references is None:
            points = torch.rand(theta.shape, dtype=torch.float64)
        else:
            points = (_checked_references(references, theta) - low) / side
        ranks = ranks_among((theta - points).norm(dim=-1), (draws - points).norm(dim=-1))
        ks_p_value = kolmogorov_smirnov(ranks, n_draws + 1)
        aside = lie_aside(ranks_among(theta, draws), n_draws)
    found = curve(ranks, torch.arange(n_draws + 1))
    f = unit(ranks, n_draws)
    atc = float((1 - f.clamp_min(0.5)).mean()) - 3 / 8
    bias = _bias(f, points - draws.mean(0))
    corrected = holm(np.array([found.p_value, *(2 * torch.special.ndtr(-bias.abs())).tolist()]))
    return TARP(
        verdict=_verdict(
            corrected < alpha,
            narrow=max(-atc * len(f) ** 0.5 / _ATC_DEVIATION, float(spread_score(f, n_draws)), key=abs),
            bias=float(bias.abs().max()),
            aside=aside,
        ),
        p_value=float(corrected.min()),
        curve=found,
        ks_p_value=ks_p_value,
        atc=atc,
        bias=bias.numpy(),
        names=labels,
        ranks=ranks,
        alpha=alpha,
    )


def _box(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Lower corner and sides, (D,), of what holds most draws; they know nothing of the truth but x."""
    every = draws.flatten(0, 1).sort(0).values
    cut = int(0.5 * (1 - _INSIDE) * len(every))
    low, high = every[cut], every[-1 - cut]
    return low, torch.where(high > low, high - low, 1.0)


def _checked_references(references: Tensor, theta: Tensor) -> Tensor:
    references = finite_tensor("references", references).detach().cpu().double()
    if references.shape != theta.shape:
        raise ValueError(violation("references", f"shape {tuple(theta.shape)}", tuple(references.shape)))
    return references


def _bias(f: Tensor, away: Tensor) -> Tensor:
    """Scores (D,) from f (n,) and the ways (n, D) from the draws' mean to the reference."""
    way = away / away.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    way = way - way.mean(0)
    deviation = (way.square().mean(0) / 12).sqrt()
    return (-(f - f.mean())[:, None] * way).mean(0) / deviation.clamp_min(1e-300) * len(f) ** 0.5


def _verdict(wrong: np.ndarray, *, narrow: float, bias: float, aside: bool) -> str:
    """From what is wrong, curve first, then biases, and from the clearest scores of narrowness and bias."""
    if not wrong.any():
        return "calibrated"
    if wrong[1:].any() and bias >= abs(narrow):
        return "biased"
    if -narrow >= clear(2):
        return "under-confident"
    if aside or (wrong[1:].any() and narrow < clear(2)):
        return "biased"
    return "over-confident" if narrow >= clear(2) else "miscalibrated"
