"""docs/contract.md shows the rows and tests of `contract_rows`, each row has a test, and each test exists."""

import ast
from pathlib import Path

import pytest

from contract_rows import PENDING, SECTIONS, Row
from write_contract_table import PAGE, line, named_tests, word

TESTS = Path(__file__).parent
ROWS = [row for rows in SECTIONS.values() for row in rows]


def defined(path: Path) -> set[str]:
    """Names of the tests in a file; of those in classes, with and without the class before."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names.add(node.name)
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inner = {n.name for n in node.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}
            names |= {node.name} | {f"{node.name}::{name}" for name in inner}
    return names


def test_every_row_has_a_test() -> None:
    assert [row.item for row in ROWS if not row.tests] == []


def test_every_test_exists_but_for_those_pending() -> None:
    missing = set()
    for name in named_tests():
        file, _, test = name.partition("::")
        if not (TESTS / file).exists() or test not in defined(TESTS / file):
            missing.add(name)
    assert missing == PENDING  # one that is there now is no longer pending


def test_numbers_are_complete() -> None:
    items = {title: [row.item for row in rows] for title, rows in SECTIONS.items()}
    assert items["Numbered cases that broke users of existing tools"] == [str(i) for i in range(1, 26)]
    assert items["Defects found by reading sbi 0.27"] == [str(i) for i in range(1, 13)]


def test_every_numbered_test_is_named_in_a_row() -> None:
    written = {f"test_regressions.py::{name}" for name in defined(TESTS / "test_regressions.py")}
    assert written <= set(named_tests())


@pytest.mark.parametrize("kind", ["regression", "defect"])
def test_numbered_tests_carry_their_number(kind: str) -> None:
    titles = {"regression": "Numbered cases that broke users of existing tools"}
    for row in SECTIONS[titles.get(kind, "Defects found by reading sbi 0.27")]:
        assert any(f"::test_{kind}_{int(row.item):02d}_" in name for name in row.tests)


def cells(text: str) -> list[list[str]]:
    """The four cells of every line of the tables in a page: item, promise, tests, outcomes."""
    lines = [entry for entry in text.splitlines() if entry.startswith("| ") and not entry.startswith("| |")]
    return [[cell.strip() for cell in entry.strip("|").split("|")] for entry in lines]


def test_the_page_shows_these_rows() -> None:
    nothing = {name: set() for name in named_tests()}
    rows = cells("\n".join(line(row, nothing) for row in ROWS))
    assert [row[:3] for row in cells(PAGE.read_text())] == [row[:3] for row in rows]


def test_the_page_has_an_outcome_for_every_test() -> None:
    outcomes = [row[3].split("<br>") for row in cells(PAGE.read_text())]
    assert [len(each) for each in outcomes] == [len(row.tests) for row in ROWS]
    for row, words in zip(ROWS, outcomes, strict=True):
        for name, outcome in zip(row.tests, words, strict=True):
            assert outcome in (("not yet written",) if name in PENDING else ("pass", "skipped"))


def test_words() -> None:
    assert word({"passed", "skipped"}) == "pass"
    assert word({"passed", "failed"}) == "**fails**"
    assert (word({"skipped"}), word(set())) == ("skipped", "not run")


def test_promises_are_one_line_without_a_bar() -> None:
    for row in ROWS:
        assert isinstance(row, Row) and "\n" not in row.says and "|" not in row.item + row.says
