"""Figures are drawn, hold what they were given, and refuse what they cannot draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from visbi.plots import pair_plot, predictive_band, trace_plot

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def draws() -> torch.Tensor:
    return torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))


def _drawn(figure: Figure, folder: Path) -> Figure:
    """The figure, after a drawing that raises if it warns."""
    path = folder / "figure.png"
    figure.savefig(path)
    assert path.read_bytes().startswith(PNG)
    return figure


def test_pairs_of_one_set_have_no_legend(draws: torch.Tensor, tmp_path: Path) -> None:
    figure = _drawn(pair_plot(draws), tmp_path)
    assert len(figure.axes) == 6 and not figure.legends
    assert [axes.get_xlabel() for axes in figure.axes[-3:]] == ["theta_1", "theta_2", "theta_3"]


def test_pairs_of_several_sets(draws: torch.Tensor, tmp_path: Path) -> None:
    figure = _drawn(pair_plot({"q": draws, "p": draws + 1}, ["a", "b", "c"]), tmp_path)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["q", "p"]
    q, p = figure.axes[0].lines
    assert q.get_color() != p.get_color() and q.get_linestyle() != p.get_linestyle()
    assert figure.axes[1].get_ylabel() == "b" and figure.axes[-1].get_xlabel() == "c"


def test_marginal_is_a_density_at_the_right_place(draws: torch.Tensor) -> None:
    axes = pair_plot(3 + 0.5 * draws[:, :1]).axes[0]
    x, y = (np.asarray(values, dtype=float) for values in axes.lines[0].get_data())
    assert np.trapezoid(y, x) == pytest.approx(1.0, abs=0.02)
    assert np.trapezoid(x * y, x) == pytest.approx(3.0, abs=0.05)


def test_no_marginal_is_cut_off(draws: torch.Tensor) -> None:
    """The first set decided how high the panel is."""
    axes = pair_plot({"wide": draws, "narrow": 0.3 * draws}).axes[0]
    highest = max(np.asarray(line.get_ydata(), dtype=float).max() for line in axes.lines)
    assert axes.get_ylim() == pytest.approx((0, 1.05 * highest))


def test_contours_hold_half_and_nine_tenths() -> None:
    normal = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))
    (contours,) = (c for c in pair_plot(normal).axes[1].collections if c.get_paths())
    outer, inner = (path.vertices for path in contours.get_paths())
    for vertices, mass in ((outer, 0.9), (inner, 0.5)):
        radius = np.linalg.norm(np.asarray(vertices), axis=1).mean()
        assert radius == pytest.approx(np.sqrt(-2 * np.log(1 - mass)), rel=0.06)


@pytest.mark.parametrize("value", [0.0, 1e6])
def test_pairs_with_a_constant(draws: torch.Tensor, value: float, tmp_path: Path) -> None:
    draws[:, 1] = value
    _drawn(pair_plot(draws), tmp_path)


def test_pairs_leave_gradients_and_the_generator_alone(draws: torch.Tensor) -> None:
    state = torch.random.get_rng_state()
    pair_plot(draws.requires_grad_())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("sets", "names", "message"),
    [
        ({"a": torch.zeros(5, 2), "b": torch.zeros(5, 3)}, None, "equally many parameters"),
        ({}, None, "`draws`"),
        (torch.zeros(5), None, r"\(N, D\)"),
        (torch.zeros(0, 2), None, r"\(N, D\)"),
        (torch.full((5, 2), torch.nan), None, "finite"),
        (torch.zeros(5, 2), ["a"], "`names`: expected 2 names; got 1"),
    ],
)
def test_pairs_refuse(sets, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_plot(sets, names)


def test_band_has_whole_years(tmp_path: Path) -> None:
    figure = predictive_band(
        range(1900, 1921), {"hare": torch.rand(50, 21)}, {"hare": [0.5] * 21}, xlabel="year"
    )
    (axes,) = _drawn(figure, tmp_path).axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert {"1900", "1905", "1910"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert axes.get_xlabel() == "year"


def test_band_keeps_fractions_where_time_has_them(tmp_path: Path) -> None:
    figure = predictive_band([0.0, 0.1, 0.2], {"a": torch.rand(50, 3)}, {"a": [0, 0, 0]})
    (axes,) = _drawn(figure, tmp_path).axes
    assert not all(float(tick).is_integer() for tick in axes.get_xticks())


def test_band_holds_its_share() -> None:
    values = torch.arange(101.0)[:, None].expand(-1, 2)
    axes = predictive_band([0, 1], {"a": values}, {"a": [50, 50]}).axes[0]
    spans = [
        (c.get_paths()[0].vertices[:, 1].min(), c.get_paths()[0].vertices[:, 1].max())
        for c in axes.collections
    ]
    assert spans == [pytest.approx((25, 75)), pytest.approx((5, 95))]


@pytest.mark.parametrize(("shift", "at_zero"), [(0.0, True), (-3.0, False)])
def test_band_starts_at_zero_only_if_nothing_is_below(shift: float, at_zero: bool) -> None:
    axes = predictive_band([0, 1], {"a": torch.rand(50, 2) + shift}, {"a": [0.5 + shift] * 2}).axes[0]
    low, high = axes.get_ylim()
    assert bool(low == 0) == at_zero and low <= shift + 0.1 < high


@pytest.mark.parametrize(
    ("simulations", "data", "message"),
    [
        ({"a": torch.zeros(5, 3)}, {"a": [0, 0]}, r"`simulations`: expected 'a' of shape \(N, 2\)"),
        ({"a": torch.zeros(5, 2)}, {"a": [0]}, "`data`: expected 2 numbers for 'a'; got 1"),
        ({"a": torch.zeros(5, 2)}, {"b": [0, 0]}, "for 'a'; got none"),
    ],
)
def test_band_refuses(simulations, data, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictive_band([0, 1], simulations, data)


def test_trace_cuts_the_first_steps_off(tmp_path: Path) -> None:
    losses = [1e6, 1e5] + [2.0, 1.0] * 50
    figure = _drawn(trace_plot({"fit": losses, "other": [1.0]}, xlabel="step"), tmp_path)
    low, high = figure.axes[0].get_ylim()
    assert low < 1.0 < 2.0 < high < 3.0
    assert figure.axes[-1].get_xlabel() == "step"


def test_trace_without_a_finite_loss(tmp_path: Path) -> None:
    _drawn(trace_plot({"fit": [float("nan")] * 3, "none": []}), tmp_path)
