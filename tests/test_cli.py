"""The command `visbi`: what it offers, and what it hands to the demonstration."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import visbi.demo
from visbi.cli import app

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and what was printed, without colours, on a wide terminal."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, ANSI.sub("", result.output)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, Any]]]:
    """What the command hands to `run_demo`, which does nothing here."""
    seen: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr(visbi.demo, "run_demo", lambda output, **keywords: seen.append((output, keywords)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that the command leaves torch's threads as they are
    return seen


def test_help() -> None:
    code, text = run("--help")
    assert code == 0 and "demo" in text and "Lynx and hare" in text


def test_nothing_shows_the_help() -> None:
    assert "demo" in run()[1]


def test_help_of_demo() -> None:
    code, text = run("demo", "--help")
    assert code == 0
    for option in ("--output", "--quick", "--seed", "--workers"):
        assert option in text


def test_defaults(calls) -> None:
    assert run("demo")[0] == 0
    ((output, keywords),) = calls
    assert output == Path("demo-output")
    assert (
        keywords["effort"] is visbi.demo.FULL
        and keywords["seed"] == 0
        and keywords["workers"] == visbi.demo.WORKERS
    )


def test_options(calls, tmp_path: Path) -> None:
    code, _ = run("demo", "--quick", "--seed", "7", "--workers", "2", "--output", str(tmp_path / "here"))
    assert code == 0
    ((output, keywords),) = calls
    assert output == tmp_path / "here"
    assert keywords["effort"] is visbi.demo.QUICK and keywords["seed"] == 7 and keywords["workers"] == 2


def test_progress_is_printed(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visbi.demo, "run_demo", lambda output, *, say, **_: say("three words here"))
    assert "three words here" in run("demo")[1]


@pytest.mark.parametrize(("given", "threads"), [(None, 1), ("2", 2)])
def test_one_thread_unless_the_user_says_otherwise(
    calls, monkeypatch, given: str | None, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    try:
        assert run("demo", "--quick")[0] == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_refuses_an_unknown_option() -> None:
    code, text = run("demo", "--sed", "1")
    assert code == 2 and "--sed" in text
