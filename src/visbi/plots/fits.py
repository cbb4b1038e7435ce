"""Figures: the posterior in pairs, the prediction over the data, the trace of a fit.

Every function returns a matplotlib Figure and touches no global state, so it works without a display and
inside any program.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from visbi.core.checks import violation
from visbi.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pair_plot", "predictive_band", "trace_plot"]

_BINS = 60
_SMOOTHING = 1.2  # in bins, against the noise of a histogram
_HEADROOM = 1.05  # times the highest density that a panel shows


def pair_plot(
    draws: Mapping[str, Tensor] | Tensor,
    names: Sequence[str] | None = None,
    *,
    size: float = 1.6,
) -> "Figure":
    """Marginals on the diagonal, contours of 50 and 90 % of the mass below it, for one or several sets of
    draws.

    Args:
        draws: (N, D), or several such sets by name, drawn over one another.
        names: of the D parameters.
        size: inches per panel.

    Raises:
        ValueError: draws that are not (N, D) or not finite, sets of different D, or names that do not fit.

    >>> import torch
    >>> figure = pair_plot({"q": torch.randn(500, 2)}, ["a", "b"])
    >>> len(figure.axes)
    3
    """
    sets = {"": draws} if isinstance(draws, Tensor) else dict(draws)
    arrays = {label: style.array("draws", values) for label, values in sets.items()}
    shapes = [array.shape for array in arrays.values()]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise ValueError(violation("draws", "sets of shape (N, D)", shapes))
    if len({shape[1] for shape in shapes}) != 1:
        raise ValueError(violation("draws", "one set or several, with equally many parameters", shapes))
    dim = shapes[0][1]
    names = [f"theta_{i + 1}" for i in range(dim)] if names is None else list(names)
    if len(names) != dim:
        raise ValueError(violation("names", f"{dim} names", len(names)))
    ranges = _ranges(np.concatenate(list(arrays.values())))
    figure = style.figure((size * dim + 0.6, size * dim + 0.6))
    grid = figure.add_gridspec(dim, dim, wspace=0.08, hspace=0.08)
    for i in range(dim):
        for j in range(i + 1):
            axes = figure.add_subplot(grid[i, j])
            for number, array in enumerate(arrays.values()):
                if i == j:
                    _marginal(axes, array[:, i], ranges[i], style.line_style(number))
                else:
                    _contours(axes, array[:, [j, i]], ranges[j], ranges[i], style.line_style(number))
            _label(axes, names, i, j, dim)
    figure.align_labels()
    if not isinstance(draws, Tensor):
        handles = [style.line(lw=1.6, **style.line_style(number)) for number in range(len(arrays))]
        figure.legend(handles, list(arrays), loc="upper right", frameon=False, bbox_to_anchor=(0.98, 0.98))
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
        xlabel, ylabel: of the axes; positions that are all whole numbers get ticks at whole numbers.

    Raises:
        ValueError: simulations or data of another length than `time`, not finite, or a series without data.

    >>> import torch
    >>> figure = predictive_band([0, 1], {"hare": torch.rand(50, 2)}, {"hare": [0.4, 0.6]})
    >>> len(figure.axes)
    1
    """
    arrays = {name: style.array("simulations", values) for name, values in simulations.items()}
    for name, array in arrays.items():
        if array.shape[1:] != (len(time),) or len(array) == 0:
            raise ValueError(violation("simulations", f"{name!r} of shape (N, {len(time)})", array.shape))
        if name not in data or len(data[name]) != len(time):
            got = len(data[name]) if name in data else "none"
            raise ValueError(violation("data", f"{len(time)} numbers for {name!r}", got))
    figure = style.figure((7.0, 2.4 * len(arrays) + 0.6))
    panels = figure.subplots(len(arrays), 1, sharex=True, squeeze=False)[:, 0]
    for axes, colour, (name, array) in zip(panels, style.cycle(len(arrays)), arrays.items(), strict=True):
        style.bands(axes, time, array, colour)
        axes.plot(time, list(data[name]), "o", ms=4, color="black", zorder=3)
        axes.set_ylabel(f"{name}\n{ylabel}" if ylabel else name)
        if array.min() >= 0 and min(data[name]) >= 0:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        style.open_spines(axes)
    if all(float(t).is_integer() for t in time):
        style.whole_ticks(panels[-1])
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    style.legend_of_bands(figure)
    return figure


def trace_plot(
    losses: Mapping[str, Sequence[float]], *, ylabel: str = "loss", xlabel: str = "step"
) -> "Figure":
    """Losses against steps, one panel per fit; the axis is cut to the range after the first twentieth.

    Args:
        losses: per fit, one number a step.
        ylabel: of every panel.
        xlabel: below the last one.

    >>> len(trace_plot({"q": [3.0, 2.0, 1.5]}).axes)
    1
    """
    figure = style.figure((7.0, 2.2 * len(losses) + 0.4))
    panels = figure.subplots(len(losses), 1, squeeze=False)[:, 0]
    for axes, colour, (name, values) in zip(panels, style.cycle(len(losses)), losses.items(), strict=True):
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
        axes.margins(x=0.02)
        style.open_spines(axes)
        style.whole_ticks(axes)
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    return figure


def _ranges(values: np.ndarray) -> np.ndarray:
    """(D, 2): what holds nearly all values, and a little more, so that no contour is cut off."""
    low, high = np.quantile(values, [0.001, 0.999], axis=0)
    margin = 0.08 * (high - low) + 1e-9 * (1 + np.abs(low))
    return np.stack([low - margin, high + margin], axis=1)


def _marginal(axes: Any, values: np.ndarray, limits: np.ndarray, look: dict[str, Any]) -> None:
    from scipy.ndimage import gaussian_filter1d

    counts, edges = np.histogram(values, bins=_BINS, range=tuple(limits), density=True)
    density = gaussian_filter1d(counts, _SMOOTHING, mode="nearest")
    axes.plot(0.5 * (edges[1:] + edges[:-1]), density, lw=1.2, **look)
    axes.set_xlim(*limits)
    axes.set_ylim(0, max(axes.get_ylim()[1], _HEADROOM * float(density.max())))  # of all that are drawn here


def _contours(
    axes: Any, values: np.ndarray, x_limits: np.ndarray, y_limits: np.ndarray, look: dict[str, Any]
) -> None:
    from scipy.ndimage import gaussian_filter

    counts, x_edges, y_edges = np.histogram2d(*values.T, bins=_BINS // 2, range=[x_limits, y_limits])
    density = gaussian_filter(counts, _SMOOTHING).T
    order = np.sort(density.ravel())[::-1]
    mass = order.cumsum() / max(order.sum(), 1e-300)
    levels = sorted({float(order[min(np.searchsorted(mass, m), order.size - 1)]) for m in style.MASS})
    if levels[0] > 0:
        centres = (0.5 * (e[1:] + e[:-1]) for e in (x_edges, y_edges))
        axes.contour(
            *centres,
            density,
            levels=levels,
            colors=look["color"],
            linestyles=look["linestyle"],
            linewidths=1.0,
        )
    axes.set_xlim(*x_limits)
    axes.set_ylim(*y_limits)


def _label(axes: Any, names: Sequence[str], i: int, j: int, dim: int) -> None:
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)
    style.open_spines(axes)
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
