"""The examples in CONTRIBUTING.md run, in order, and do what the text says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {"__name__": "contributing"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), found)
    return found


def test_family(names) -> None:
    theta, log_q = names["family"].sample_and_log_prob(200)
    torch.testing.assert_close(names["family"].log_prob(theta), log_q)
    draws = names["posterior"].sample((4000,))
    assert draws.mean(0).abs().max() < 0.05
    assert (draws.std(0) - 0.3 * (5 / 3) ** 0.5).abs().max() < 0.05


def test_objective(names) -> None:
    # the potential is normalised up to its tails outside the box, and q is near it
    assert abs(names["loss"].value) < 0.1
    assert all(parameter.grad.isfinite().all() for parameter in names["posterior"].q.trainable())


def test_simulator(names) -> None:
    assert len(names["runs"]) == 100
    task = names["task"]()
    theta = torch.tensor([[1.0], [2.6], [6.0]])
    assert task.log_likelihood(theta, task.x_o).argmax() == 1  # the counts' mean is 2.6
