"""The example in README.md runs as it stands and ends with a posterior that is right."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "README.md"


def test_ten_lines(capsys) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), found)
    assert capsys.readouterr().out.startswith("ok: ")
    # x = theta + .3 noise under a wide box: the posterior is N(x_o, .3^2)
    theta = found["theta"]
    assert (theta.mean(0) - found["x_o"][0]).abs().max() < 0.06
    assert (theta.std(0) - 0.3).abs().max() < 0.03
