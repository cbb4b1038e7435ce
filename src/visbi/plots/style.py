"""What the figures have in common: colours, bands, frames."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from visbi.core.checks import finite_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "MASS",
    "SHADES",
    "array",
    "bands",
    "cycle",
    "figure",
    "legend_of_bands",
    "line",
    "line_style",
    "open_spines",
    "whole_ticks",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Those of Okabe and Ito."""
MASS = (0.5, 0.9)
"""Inside contours and bands."""
SHADES = (0.25, 0.2)
"""Of the inner band, which lies on the outer one, and of the outer one."""


def figure(size: tuple[float, float]) -> "Figure":
    """A figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=120, layout="constrained")


def cycle(n: int) -> list[str]:
    """n colours."""
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def array(name: str, values: Tensor) -> np.ndarray:
    """A finite tensor as float64, or ValueError."""
    return np.asarray(finite_tensor(name, values).detach().cpu().double())


def line(**style: Any) -> Any:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of a set, so that colour alone tells nothing apart."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[number % 4]}


def whole_ticks(axes: Any) -> None:
    """Ticks of x at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def open_spines(axes: Any) -> None:
    """No frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def bands(axes: Any, time: Any, values: np.ndarray, colour: str) -> None:
    """Median of values (N, T) over time (T,), and what holds the middle half and nine tenths."""
    for mass, alpha in zip(MASS, SHADES, strict=True):
        low, high = np.quantile(values, [0.5 - mass / 2, 0.5 + mass / 2], axis=0)
        axes.fill_between(time, low, high, color=colour, alpha=alpha, lw=0)
    axes.plot(time, np.median(values, axis=0), color=colour, lw=1.2)


def legend_of_bands(figure: "Figure") -> None:
    """In grey, because it holds for the colours of all panels."""
    from matplotlib.patches import Patch

    handles = [line(color="black", marker="o", ms=4, ls=""), line(color="0.3", lw=1.2)]
    handles += [Patch(color="0.3", alpha=alpha, lw=0) for alpha in (sum(SHADES), SHADES[1])]
    labels = ["data", "median", *(f"{100 * mass:.0f} % of predictions" for mass in MASS)]
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="outside upper center")
