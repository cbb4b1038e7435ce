"""The example on the page about families runs and does what the page says."""

import re
from pathlib import Path

import torch

from visbi.families import CONDITIONAL_NAMES, FAMILY_NAMES
from visbi.families.mixture import MixtureBody

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_example() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"__name__": "page"}
    exec(compile(block, str(PAGE), "exec"), names)
    posterior = names["posterior"]
    assert isinstance(posterior.q.body, MixtureBody) and posterior.q.body.n_components == 4
    theta = posterior.sample((2000,))
    right = theta[theta.sum(-1) > 0]
    assert 0.35 < len(right) / 2000 < 0.65
    torch.testing.assert_close(right.mean(0), torch.ones(2), atol=0.1, rtol=0)
    assert posterior.report.status == "ok"


def test_the_table_has_every_name() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    amortised = {
        name: cells[3].strip() != "no" for cells in rows for name in re.findall(r"`(\w+)`", cells[0])
    }
    assert sorted(amortised) == sorted(FAMILY_NAMES)
    assert {name for name, has in amortised.items() if has} == set(CONDITIONAL_NAMES)
