"""Runs the tests that hold the contract and writes docs/contract.md: `make contract-table`.

Each row of `contract_rows` becomes a line with its tests and what came of them. Tests in `peers/` need sbi
and run in an environment of their own.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import visbi
from contract_rows import PENDING, SECTIONS, Row

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "contract.md"
HEAD = """# The contract, row by row

What `VIPosterior` promises, and the tests that fail if it is not kept. Written by `make contract-table`,
which runs them: edit `tests/contract_rows.py`, not this page.

Outcomes with visbi {visbi}, torch {torch}: {summary}.
"""


def named_tests() -> list[str]:
    """Every test that a row names, once."""
    return list(dict.fromkeys(name for rows in SECTIONS.values() for row in rows for name in row.tests))


def run(python: str, names: Iterable[str], *options: str) -> dict[str, set[str]]:
    """What became of the tests, by name without parameters: "passed", "skipped", "failed"."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", *options, f"--junitxml={report}"]
        subprocess.run([*command, *(f"tests/{name}" for name in names)], cwd=TESTS.parent, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        found: dict[str, set[str]] = defaultdict(set)
        for case in cases:
            bad = case.find("failure") is not None or case.find("error") is not None
            outcome = "failed" if bad else "passed" if case.find("skipped") is None else "skipped"
            for name in _names(case.get("classname", ""), case.get("name", "")):
                found[name].add(outcome)
    return found


def _names(classname: str, name: str) -> list[str]:
    """tests.core.test_x.TestY and test_z[1] as the test and the class that a row may name."""
    parts = classname.split(".")[1:]
    classes = [part for part in parts if part.startswith("Test")]
    file = "/".join(part for part in parts if part not in classes) + ".py"
    levels = [file, *classes, name.split("[")[0]]
    return ["::".join(levels[: i + 1]) for i in range(1, len(levels))]


def word(outcomes: set[str]) -> str:
    """One word for all cases of a test; one that was skipped, for want of a GPU, counts only if all were."""
    if "failed" in outcomes:
        return "**fails**"
    return "pass" if "passed" in outcomes else "skipped" if outcomes else "not run"


def line(row: Row, outcomes: dict[str, set[str]]) -> str:
    """A row of the table."""
    tests = "<br>".join(f"`{name}`" for name in row.tests)
    words = "<br>".join("not yet written" if name in PENDING else word(outcomes[name]) for name in row.tests)
    return f"| {row.item} | {row.says} | {tests} | {words} |"


def page(outcomes: dict[str, set[str]]) -> str:
    """The whole page."""
    words = [word(outcomes[name]) for name in named_tests() if name not in PENDING]
    counts = {kind: words.count(kind) for kind in ("pass", "**fails**", "skipped", "not run")}
    counts["not yet written"] = len(PENDING)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    parts = [HEAD.format(visbi=visbi.__version__, torch=torch.__version__.split("+")[0], summary=summary)]
    for title, rows in SECTIONS.items():
        table = [
            "| | what holds | tests | outcome |",
            "|---|---|---|---|",
            *(line(row, outcomes) for row in rows),
        ]
        parts.append(f"## {title}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page; 1 if a test fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peers-python", help="interpreter of an environment with sbi, for the tests in peers/"
    )
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    names = [name for name in named_tests() if name not in PENDING]
    theirs = [name for name in names if name.startswith("peers/")]
    outcomes: dict[str, set[str]] = defaultdict(set)
    outcomes.update(run(sys.executable, [name for name in names if name not in theirs]))
    if arguments.peers_python and theirs:
        outcomes.update(run(arguments.peers_python, theirs, "-m", "peers"))
    arguments.output.write_text(page(outcomes))
    return int(any("failed" in found for found in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
