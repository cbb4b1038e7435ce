"""The examples of docs/calibration.md run in order and say what stands beside them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "calibration.md"


def test_page(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    names: dict[str, Any] = {"__name__": "calibration"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), names)
    shown = "".join(re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    # training differs in the last digits between machines: words must agree, numbers need not
    assert words(capsys.readouterr().out) == words(shown)
    assert names["found"].verdict == "calibrated" and names["found"].coverage.held(0.9)[0] > 0.84
    assert names["wrong"].verdict == "over-confident" and names["wrong"].coverage.held(0.9).max() < 0.75
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert set(names["figures"]) == {"ranks", "coverage", "tarp", "prior", "predictive"}


def words(text: str) -> list[str]:
    return re.sub(r"[<=] [-\d.e]+|[-+]?\d+(\.\d+)?(?![\w\]])", "", text).split()
