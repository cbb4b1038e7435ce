"""Figures of calibration show the numbers they are made of."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

from calibration_cases import cases
from visbi.certificate import expected_coverage, predictive_check, prior_predictive_check, sbc, tarp
from visbi.core.random import seeded
from visbi.plots import coverage_plot, predictive_plot, rank_plot, tarp_plot

NARROW = cases(400, 100, scale=0.6)


def drawn(figure: Any) -> Any:
    figure.savefig(BytesIO())
    return figure


def curve_and_band(axes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The last line's heights, and whether each lies inside of the band."""
    x, y = axes.lines[-1].get_data()
    band = axes.collections[0].get_paths()[0]
    inside = band.contains_points(np.stack([x, y], 1), radius=1e-9) | band.contains_points(
        np.stack([x, y], 1), radius=-1e-9
    )
    return np.asarray(y), inside


def test_ranks() -> None:
    likelihood = {"likelihood": NARROW.log_likelihood}
    result = sbc(NARROW.theta, NARROW.draws, log_densities=likelihood, names=["a", "b"], seed=1)
    axes = drawn(rank_plot(result)).axes
    assert [each.get_title(loc="left") for each in axes[::2]] == [
        f"{name}: {verdict}" for name, verdict in zip(result.names, result.verdicts, strict=True)
    ]
    heights, edges, _ = axes[0].patches[-1].get_data()
    assert edges[0] == -0.5 and edges[-1] == 100.5
    # bars of bins of unlike widths are heights of a density
    assert (heights * np.diff(edges)).sum() == pytest.approx(400 * np.diff(edges).mean())
    assert heights[0] > 1.5 * np.median(heights)
    heights, inside = curve_and_band(axes[1])
    assert heights == pytest.approx(result.curves[0].shares - result.curves[0].levels)
    assert not inside.all()


def test_right_curves_stay_in_their_bands() -> None:
    right = cases(400, 100)
    for axes in (
        drawn(rank_plot(sbc(right.theta, right.draws, seed=1))).axes[1],
        drawn(coverage_plot(expected_coverage(right.theta, right.draws, seed=1))).axes[0],
        drawn(tarp_plot(tarp(right.theta, right.draws, seed=1))).axes[0],
    ):
        assert curve_and_band(axes)[1].all()


def test_coverage_and_tarp_below_the_diagonal() -> None:
    coverage = expected_coverage(NARROW.theta, NARROW.draws, NARROW.log_q, seed=1)
    (axes,) = drawn(coverage_plot(coverage)).axes
    heights, inside = curve_and_band(axes)
    assert heights == pytest.approx(coverage.curves[0].shares)
    assert (heights[25:45] < coverage.curves[0].levels[25:45]).all() and not inside.all()
    assert axes.get_title(loc="left") == "over-confident"
    (axes,) = drawn(tarp_plot(tarp(NARROW.theta, NARROW.draws, seed=1))).axes
    assert axes.get_title(loc="left") == "over-confident" and not curve_and_band(axes)[1].all()


@pytest.mark.parametrize("width", [6, 40])
def test_entries_that_are_off_are_marked(width: int) -> None:
    with seeded(0):
        x, x_o = torch.randn(300, width), torch.randn(width)
    x_o[2] = 8.0
    (axes,) = drawn(predictive_plot(x_o, x, prior_predictive_check(x_o, x))).axes
    familiar, off = axes.lines[-2:]
    assert off.get_xdata().tolist() == [2] and off.get_ydata()[0] > 2
    assert len(familiar.get_xdata()) == width - 1 and np.abs(familiar.get_ydata()).max() < 1.5
    assert (axes.get_xticklabels()[0].get_text() == "x[0]") == (width == 6)


def test_an_infinitely_odd_entry_of_an_image() -> None:
    with seeded(0):
        x = torch.randn(200, 2, 3)
    x[:, 1, 1] = 0.0
    x_o = x[0].clone()
    x_o[1, 1] = 1.0
    check = predictive_check(x_o, x[1:])
    (axes,) = drawn(predictive_plot(x_o, x[1:], check)).axes
    assert check.entries == ("x[1, 1]",) and axes.lines[-1].get_xdata().tolist() == [4]


def test_another_x_is_refused() -> None:
    x = torch.randn(200, 3)
    check = prior_predictive_check(x[0], x)
    with pytest.raises(ValueError, match=r"`x_o`: expected shape \(3,\)"):
        predictive_plot(torch.zeros(2), x[:, :2], check)
    with pytest.raises(ValueError, match="`x`"):
        predictive_plot(x[0], x[:, :2], check)
