"""Figures: the posterior in pairs, the prediction over the data, the trace of a fit.

Every function returns a matplotlib Figure and touches no global state, so it works without a display and inside any
program. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import violation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pair_plot", "predictive_band", "trace_plot"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MASS = (0.5, 0.9)  # of the contours
_BINS = 60
_SMOOTHING = 1.2  # in bins, against the noise of a histogram


def pair_plot(
    draws: Mapping[str, Tensor] | Tensor,
    names: Sequence[str] | None = None,
    *,
    size: float = 1.6,
) -> "Figure":
    """Marginals on the diagonal, contours of 50 and 90 % of the mass below it, for one or several sets of draws.

    Args:
        draws: (N, D), or several such sets by name, drawn over one another.
        names: of the D parameters.
        size: inches per panel.

    Raises:
        ValueError: sets of different D, or names that do not fit.

    >>> figure = pair_plot({"q": torch.randn(500, 2)}, ["a", "b"])
    >>> len(figure.axes)
    3
    """
    sets = {"": draws} if isinstance(draws, Tensor) else dict(draws)
    arrays = {label: np.asarray(values.detach().cpu().double()) for label, values in sets.items()}
    dims = {array.shape[-1] for array in arrays.values()}
    if len(dims) != 1:
        raise ValueError(violation("draws", "sets with equally many parameters", sorted(dims)))
    dim = dims.pop()
    names = [f"theta_{i + 1}" for i in range(dim)] if names is None else list(names)
    if len(names) != dim:
        raise ValueError(violation("names", f"{dim} names", len(names)))
    together = np.concatenate(list(arrays.values()))
    ranges = np.quantile(together, [0.001, 0.999], axis=0).T
    figure = _figure((size * dim + 0.6, size * dim + 0.6))
    grid = figure.add_gridspec(dim, dim, wspace=0.08, hspace=0.08)
    for i in range(dim):
        for j in range(i + 1):
            axes = figure.add_subplot(grid[i, j])
            for colour, array in zip(_cycle(len(arrays)), arrays.values(), strict=True):
                if i == j:
                    _marginal(axes, array[:, i], ranges[i], colour)
                else:
                    _contours(axes, array[:, [j, i]], ranges[j], ranges[i], colour)
            _label(axes, names, i, j, dim)
    if len(arrays) > 1 or "" not in arrays:
        handles = [_line(colour) for colour in _cycle(len(arrays))]
        figure.legend(handles, list(arrays), loc="upper right", frameon=False, bbox_to_anchor=(0.95, 0.95))
    return figure


def predictive_band(
    time: Sequence[float],
    simulations: Mapping[str, Tensor],
    data: Mapping[str, Sequence[float]],
    *,
    xlabel: str = "",
    ylabel: str = "",
) -> "Figure":
    """Bands that hold 50 and 90 % of posterior predictive simulations, with the data over them.

    Args:
        time: (T,) positions.
        simulations: per series, (N, T).
        data: per series, (T,).
        xlabel, ylabel: of the axes.

    >>> figure = predictive_band([0, 1], {"hare": torch.rand(50, 2)}, {"hare": [0.4, 0.6]})
    >>> len(figure.axes)
    1
    """
    figure = _figure((7.0, 2.6 * len(simulations) + 0.4))
    panels = figure.subplots(len(simulations), 1, sharex=True, squeeze=False)[:, 0]
    for axes, colour, (name, values) in zip(panels, _cycle(len(simulations)), simulations.items(), strict=True):
        array = np.asarray(values.detach().cpu().double())
        for mass, alpha in zip(reversed(_MASS), (0.2, 0.4), strict=True):
            low, high = np.quantile(array, [0.5 - mass / 2, 0.5 + mass / 2], axis=0)
            axes.fill_between(time, low, high, color=colour, alpha=alpha, lw=0, label=f"{mass:.0%} of predictions")
        axes.plot(time, np.median(array, axis=0), color=colour, lw=1.2, label="median")
        axes.plot(time, list(data[name]), "o", ms=4, color="black", label="data")
        axes.set_ylabel(f"{name}\n{ylabel}" if ylabel else name)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    panels[-1].set_xlabel(xlabel)
    return figure


def trace_plot(losses: Mapping[str, Sequence[float]], *, ylabel: str = "loss", xlabel: str = "step") -> "Figure":
    """Losses against steps, one panel per fit; the axis is cut to the range after the first twentieth.

    >>> len(trace_plot({"q": [3.0, 2.0, 1.5]}).axes)
    1
    """
    figure = _figure((7.0, 2.2 * len(losses) + 0.4))
    panels = figure.subplots(len(losses), 1, squeeze=False)[:, 0]
    for axes, colour, (name, values) in zip(panels, _cycle(len(losses)), losses.items(), strict=True):
        array = np.asarray(values, dtype=float)
        axes.plot(np.arange(1, len(array) + 1), array, color=colour, lw=0.8)
        settled = array[len(array) // 20 :]
        settled = settled[np.isfinite(settled)]
        if len(settled):
            low, high = settled.min(), np.quantile(settled, 0.99)
            margin = 0.08 * max(high - low, 1e-9)
            axes.set_ylim(low - margin, high + margin)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_ylabel(ylabel)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(xlabel)
    return figure


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=120, layout="constrained")


def _cycle(n: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(n)]


def _line(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, lw=2)


def _marginal(axes: Any, values: np.ndarray, limits: np.ndarray, colour: str) -> None:
    from scipy.ndimage import gaussian_filter1d

    counts, edges = np.histogram(values, bins=_BINS, range=tuple(limits), density=True)
    axes.plot(0.5 * (edges[1:] + edges[:-1]), gaussian_filter1d(counts, _SMOOTHING, mode="nearest"), color=colour, lw=1.4)
    axes.set_xlim(*limits)
    axes.set_ylim(bottom=0)


def _contours(axes: Any, values: np.ndarray, x_limits: np.ndarray, y_limits: np.ndarray, colour: str) -> None:
    from scipy.ndimage import gaussian_filter

    counts, x_edges, y_edges = np.histogram2d(*values.T, bins=_BINS // 2, range=[x_limits, y_limits])
    density = gaussian_filter(counts, _SMOOTHING).T
    order = np.sort(density.ravel())[::-1]
    mass = order.cumsum() / max(order.sum(), 1e-300)
    levels = sorted({float(order[min(np.searchsorted(mass, m), order.size - 1)]) for m in _MASS})
    if len(levels) > 0 and levels[0] > 0:
        centres = (0.5 * (e[1:] + e[:-1]) for e in (x_edges, y_edges))
        axes.contour(*centres, density, levels=levels, colors=colour, linewidths=(0.8, 1.4)[: len(levels)])
    axes.set_xlim(*x_limits)
    axes.set_ylim(*y_limits)


def _label(axes: Any, names: Sequence[str], i: int, j: int, dim: int) -> None:
    axes.tick_params(labelsize=6)
    axes.spines[["top", "right"]].set_visible(False)
    if i == j:
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    if j > 0 or i == j:
        axes.tick_params(labelleft=False)
    elif i > j:
        axes.set_ylabel(names[i], fontsize=9)
    if i == dim - 1:
        axes.set_xlabel(names[j], fontsize=9)
        axes.tick_params(axis="x", rotation=45)
    else:
        axes.tick_params(labelbottom=False)
