"""The benchmark of many observations: exact draws from a table, and the page from its lines."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import many
import many_models
from visbi.core.random import seeded
from visbi.simulators.zoo import linear_gaussian


def test_draws_from_the_grid_are_exact() -> None:
    """Two narrow Gaussians, one to three, a few cells of the first grid wide."""

    def evaluate(theta: Tensor, x: Tensor) -> Tensor:
        sides = [-0.5 * ((theta - sign * x) / 0.02).square().sum(-1) for sign in (1, -1)]
        return torch.logaddexp(sides[0], sides[1] + 1.0986)

    with seeded(1):
        theta = many_models._from_grid(SimpleNamespace(evaluate=evaluate), torch.tensor([0.3, -0.5]), 20_000)
    right = theta[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.25, abs=0.01)
    assert (theta[right].mean(0) - torch.tensor([0.3, -0.5])).abs().max() < 1e-3
    assert (theta[right].std(0) / 0.02 - 1).abs().max() < 0.03
    assert len(theta.unique(dim=0)) == 20_000  # spread within the cells


def test_the_linear_gaussian_knows_its_posterior() -> None:
    goal = many_models.model("linear_gaussian_10")
    theta, x = goal.observe(4)
    assert theta.shape == x.shape == (4, 10) and torch.equal(x, goal.observe(4)[1])
    draws = goal.draw(x[0], 2000)
    # the potential less the exact log-density is the evidence, the same everywhere
    exact = linear_gaussian.task(10).posterior(x[0])  # type: ignore[misc]
    gap = goal.potential(draws, x[:1]) - exact.log_prob(draws)
    assert float(gap.std()) < 1e-3


def row(**entries: Any) -> dict[str, Any]:
    about = {"versions": {"visbi": "0", "torch": "2"}, "processor": "a processor", "when": "now", "load": 1.0}
    return {"model": "m", **about, **entries}


def test_the_page_says_how_many_times() -> None:
    rows = [
        row(
            what="together", n_obs=10, cpu_seconds=1.0, seconds=2.0, status={"ok": 10}, rung={"a mixture": 10}
        ),
        row(what="c2st", median=0.51, worst=0.53, values=[0.51]),
        row(what="sbc", factor=1.0, n_obs=10, p_value=0.4, verdict="calibrated"),
        row(what="sbc, narrowed", factor=0.8, n_obs=10, p_value=1e-9, verdict="over-confident"),
        row(what="alone", tool="sbi-maf", n_obs=2, cpu_seconds=[20.0, 40.0], seconds=[40.0, 80.0]),
    ]
    said = many.page(rows)
    assert "| m | `fit_many` | 10 | 0.1000 | 0.2000 | 1 | 1 | 0.510 (0.530) |" in said
    assert "| m | sbi-maf, a loop | 2 | 30.00 | 60.00 | 300 | 300 | |" in said
    assert "draws as they are: p = 0.4, calibrated." in said and "10 ok; answered by 10 a mixture." in said
    assert "shrunk by 0.8 about their mean: p = 1e-09, over-confident." in said
