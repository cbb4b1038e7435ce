"""The page for users of sbi: its example without sbi runs, its names are there, its claims are tested."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coming-from-sbi.md").read_text()
TESTS = {
    name
    for path in ROOT.glob("tests/**/test_*.py")
    for name in re.findall(r"\bdef (test_\w+)", path.read_text())
}


def blocks(*, with_sbi: bool) -> list[str]:
    """The page's Python, up to where sbi is left behind or from there on."""
    found = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    split = next(i for i, block in enumerate(found) if "sbi" not in block.replace("visbi", ""))
    return found[:split] if with_sbi else found[split:]


def test_example_without_sbi() -> None:
    (block,) = blocks(with_sbi=False)
    names: dict[str, Any] = {}
    exec(compile(block, "coming-from-sbi.md", "exec"), names)
    assert (names["samples"].mean(0) - names["x_o"]).abs().max() < 0.08
    assert (names["samples"].std(0) - 0.3).abs().max() < 0.05
    assert names["posterior"].report.status == "ok"


def test_every_name_of_ours_is_there() -> None:
    names = set(re.findall(r"`visbi\.([\w.]+)", PAGE))
    assert len(names) > 12
    for name in names:
        module, _, attribute = f"visbi.{name}".rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_every_claim_names_a_test() -> None:
    section = PAGE.split("## What differs")[1]
    rows = [
        row for row in section.splitlines() if row.startswith("|") and not row.startswith(("| sbi", "|---"))
    ]
    assert len(rows) > 25
    for row in rows:
        cited = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert cited and set(cited) <= TESTS, row


def test_every_difference_that_is_tested_is_named() -> None:
    assert sorted(name for name in TESTS if name.startswith("test_differs") and name not in PAGE) == []
