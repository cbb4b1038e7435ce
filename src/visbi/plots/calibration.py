"""Figures of calibration: ranks, coverage, TARP, and the observation among simulations.

A band holds its whole curve unless the test behind the curve rejects at the figure's share of alpha: where
the posterior is right, the chance that any curve of a result leaves its band is alpha at most.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from visbi.certificate import SBC, TARP, Coverage, PredictiveCheck
from visbi.certificate.oddity import entry_scores
from visbi.certificate.uniformity import Curve
from visbi.core.checks import violation
from visbi.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from visbi.calibration import Calibration

__all__ = ["calibration_figures", "coverage_plot", "predictive_plot", "rank_plot", "tarp_plot"]

_BINS = 20
_PER_BIN = 5  # ranks expected in each, at least
_PANEL = (3.3, 2.2)
_COLOUR, _OFF = style.COLOURS[:2]
_MOST_NAMED = 12  # entries of x whose names stand below the axis


def calibration_figures(calibration: "Calibration") -> dict[str, "Figure"]:
    """All figures of a calibration, by name: "ranks", "coverage", "tarp", and with x_o "prior" and
    "predictive".

    >>> import torch
    >>> from visbi.calibration import calibrate
    >>> theta = torch.randn(100, 1)
    >>> x = theta + torch.randn(100, 1)
    >>> list(calibration_figures(calibrate(x / 2 + 0.5**0.5 * torch.randn(50, 100, 1), theta, x)))
    ['ranks', 'coverage', 'tarp']
    """
    figures = {
        "ranks": rank_plot(calibration.sbc),
        "coverage": coverage_plot(calibration.coverage),
        "tarp": tarp_plot(calibration.tarp),
    }
    x_o = calibration.x_o
    if x_o is not None and calibration.prior is not None:
        figures["prior"] = predictive_plot(x_o, calibration.x, calibration.prior)
    if x_o is not None and calibration.predictive is not None and calibration.predictions is not None:
        figures["predictive"] = predictive_plot(x_o, calibration.predictions, calibration.predictive)
    return figures


def rank_plot(result: SBC) -> "Figure":
    """For each quantity, a histogram of the ranks, and their cumulative share less that of uniform ones.

    The grey band of the histogram holds each bar in 99 % of the cases; that of the curve holds all of it with
    probability 1 - alpha / Q over the Q quantities.

    >>> import torch
    >>> from visbi.certificate import sbc
    >>> len(rank_plot(sbc(torch.randn(100, 2), torch.randn(50, 100, 2))).axes)
    4
    """
    figure = style.figure((2 * _PANEL[0], _PANEL[1] * len(result.names)))
    panels = figure.subplots(len(result.names), 2, squeeze=False)
    alpha = result.alpha / len(result.names)
    for i, (row, colour) in enumerate(zip(panels, style.cycle(len(panels)), strict=True)):
        _histogram(row[0], result.ranks[:, i].numpy(), result.n_draws, colour)
        _difference(row[1], result.curves[i], alpha, colour)
        row[0].set_title(f"{result.names[i]}: {result.verdicts[i]}", fontsize=9, loc="left")
    panels[-1][0].set_xlabel(f"rank among {result.n_draws} draws")
    panels[-1][1].set_xlabel("rank, as a share")
    return figure


def coverage_plot(result: Coverage) -> "Figure":
    """What regions hold beside what they should; below the diagonal they are too small.

    >>> import torch
    >>> from visbi.certificate import expected_coverage
    >>> len(coverage_plot(expected_coverage(torch.randn(100, 2), torch.randn(50, 100, 2))).axes)
    1
    """
    curves = dict(zip(result.names, result.curves, strict=True))
    return _curves(curves, result.alpha / len(curves), result.verdict, "level of the region", "truths inside")


def tarp_plot(result: TARP) -> "Figure":
    """The expected coverage of balls around random points beside their level.

    >>> import torch
    >>> from visbi.certificate import tarp
    >>> len(tarp_plot(tarp(torch.randn(100, 2), torch.randn(50, 100, 2))).axes)
    1
    """
    alpha = result.alpha / (1 + len(result.names))  # its share beside the biases
    return _curves({"TARP": result.curve}, alpha, result.verdict, "level of the ball", "truths inside")


def predictive_plot(x_o: Tensor, x: Tensor, result: PredictiveCheck) -> "Figure":
    """The entries of x_o over bands that hold 50 and 90 % of the simulations, on their scale; those off in
    red.

    Every entry is shown in units of its simulations: their median at 0, their 1 % tails at -1 and 1, as in
    `PredictiveCheck.oddity`.

    Args:
        x_o, x: as they went into the check.
        result: of `prior_predictive_check` or `predictive_check`.

    Raises:
        ValueError: x_o of another shape than that of the check, or x of another than (n, *x_o.shape).

    >>> import torch
    >>> from visbi.certificate import prior_predictive_check
    >>> x_o, x = torch.randn(8), torch.randn(200, 8)
    >>> len(predictive_plot(x_o, x, prior_predictive_check(x_o, x)).axes)
    1
    """
    shape = tuple(result.oddity.shape)
    if tuple(x_o.shape) != shape:
        raise ValueError(violation("x_o", f"shape {shape}", tuple(x_o.shape)))
    if tuple(x.shape[1:]) != shape:
        raise ValueError(violation("x", f"rows of shape {shape}", tuple(x.shape[1:])))
    rows = np.concatenate([style.array("x", x).reshape(len(x), -1), style.array("x_o", x_o).reshape(1, -1)])
    scores = entry_scores(rows)
    limit = 1.2 * max(1.0, float(np.abs(scores[-1][np.isfinite(scores[-1])]).max(initial=0.0)))
    scores = scores.clip(-limit, limit)  # an entry may be infinitely far
    place = np.arange(rows.shape[1])
    off = np.isin(result.names, result.entries)
    figure = style.figure((7.0, 3.2))
    axes = figure.add_subplot()
    for level in (-1.0, 1.0):
        axes.axhline(level, color="0.7", lw=0.8, ls=":")
    style.bands(axes, place, scores[:-1], _COLOUR)
    axes.plot(place[~off], scores[-1][~off], "o", ms=4, color="black", zorder=3)
    axes.plot(place[off], scores[-1][off], "X", ms=7, color=_OFF, zorder=4)
    if len(place) <= _MOST_NAMED:
        axes.set_xticks(place, list(result.names), rotation=45, ha="right", fontsize=7)
    else:
        style.whole_ticks(axes)
        axes.set_xlabel("entry of x")
    axes.set_ylabel("1 % tails at ±1")
    axes.set_title(result.verdict, fontsize=9, loc="left")
    axes.margins(x=0.02)
    style.open_spines(axes)
    style.legend_of_bands(figure)
    return figure


def _histogram(axes: Any, ranks: np.ndarray, n_draws: int, colour: str) -> None:
    from scipy.stats import binom

    bins = max(2, min(_BINS, n_draws + 1, len(ranks) // _PER_BIN))
    edges = np.linspace(0, n_draws + 1, bins + 1).round() - 0.5
    expected = np.diff(edges) / (n_draws + 1)
    low, high = binom.ppf(0.005, len(ranks), expected), binom.ppf(0.995, len(ranks), expected)
    counts = np.histogram(ranks, edges)[0]
    width = np.diff(edges) / np.diff(edges).mean()  # heights per bin of average width
    axes.stairs(high / width, edges, baseline=low / width, fill=True, color="0.85")
    axes.stairs(counts / width, edges, color=colour, lw=1.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("observations")
    style.open_spines(axes)


def _difference(axes: Any, curve: Curve, alpha: float, colour: str) -> None:
    low, high = curve.band(alpha)
    axes.fill_between(curve.levels, low - curve.levels, high - curve.levels, color="0.85", lw=0)
    axes.axhline(0.0, color="0.5", lw=0.8)
    axes.plot(curve.levels, curve.shares - curve.levels, color=colour, lw=1.4)
    axes.set_ylabel("share - uniform")
    style.open_spines(axes)


def _curves(curves: Mapping[str, Curve], alpha: float, title: str, xlabel: str, ylabel: str) -> "Figure":
    figure = style.figure((4.2, 4.0))
    axes = figure.add_subplot()
    first = next(iter(curves.values()))  # one number of observations and one of draws, so one band
    axes.fill_between(first.levels, *first.band(alpha), color="0.85", lw=0)
    axes.plot([0, 1], [0, 1], color="0.5", lw=0.8)
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(curve.levels, curve.shares, lw=1.4, label=name, **style.line_style(number))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9, loc="left")
    style.open_spines(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure
