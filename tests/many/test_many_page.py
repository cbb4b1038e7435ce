"""The example of docs/many.md runs as it stands and gives what its comments say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "many.md"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), found)
    said = capsys.readouterr().out
    assert said.startswith("6 posteriors over 2 parameters: 5 ok, 1 failed") and len(said.splitlines()) <= 10
    theta, x = found["theta"], found["x"]
    assert theta.shape == (1000, 6, 2) and found["density"].shape == (1000, 6)
    fitted = [0, 1, 2, 4, 5]
    assert ((theta.mean(0) - x)[fitted]).abs().max() < 0.05 and theta[:, 3].isnan().all()
    assert torch.equal(found["x_failed"][:, 1], x[3:4, 1]) and len(found["x_failed"]) == 1
    assert found["one"].report == found["again"].reports[2] and len(found["rows"]) == 6
