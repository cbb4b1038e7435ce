"""The example of docs/auto.md runs as it stands and ends with both modes in their shares."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "auto.md"


def test_two_modes(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), found)
    said = capsys.readouterr().out
    assert said.startswith(("ok: ", "corrected: ")) and "2 modes of weights" in said
    assert len(said.strip().splitlines()) <= 10
    draws = found["posterior"].sample((4000,))
    left = float((draws[:, 0] < 0).double().mean())
    assert left == pytest.approx(0.75, abs=0.03)
    # the potential integrates to (1 + 3) 2 pi .3^2 over the box
    evidence = torch.log(torch.tensor(4 * 2 * torch.pi * 0.09))
    at_mode = found["posterior"].log_prob(torch.full((1, 2), 2.0), normalized="potential")
    assert float(at_mode[0]) == pytest.approx(-float(evidence), abs=0.05)
