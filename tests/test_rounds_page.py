"""The examples of docs/rounds.md run as they stand, in order, and end near the right posterior."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "rounds.md"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the examples leave behind, and what they print."""
    said: list[str] = []
    names: dict[str, Any] = {"print": lambda *values: said.append(" ".join(map(str, values))), "said": said}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def exact_moments(x_o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sd of theta given x_o by summing over a grid."""
    axis = torch.linspace(-3, 3, 601, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    mean = torch.cat([theta, theta.square().sum(-1, keepdim=True)], -1)
    weights = torch.softmax(-0.5 * ((x_o - mean) / 0.3).square().sum(-1), 0)
    centre = weights @ theta
    return centre, (weights @ (theta - centre).square()).sqrt()


def test_one_call(found: dict[str, Any]) -> None:
    mean, sd = exact_moments(found["x_o"].double())
    theta = found["theta"].double()
    assert float(((theta.mean(0) - mean) / sd).abs().max()) < 0.4
    assert float((theta.std(0) / sd - 1).abs().max()) < 0.3
    said = found["said"][0]
    assert "error of q" in said and "error of the learned likelihood" in said
    assert re.search(r"spend next on: (more simulations|nothing)", said)


def test_the_first_likelihood_is_tested_by_later_runs(found: dict[str, Any]) -> None:
    assert found["test"].verdict in found["said"][1]


def test_a_store_is_read(found: dict[str, Any]) -> None:
    first, second = found["result"], found["again"]
    assert first.errors == second.errors and torch.equal(first.simulations[1].x, second.simulations[1].x)


def test_by_hand(found: dict[str, Any]) -> None:
    mean, sd = exact_moments(found["x_o"].double())
    draws = found["draws"].double()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.6
    q, likelihood = map(float, found["said"][2].split())
    assert 0 <= q < 0.05 and 0 < likelihood < 0.6
