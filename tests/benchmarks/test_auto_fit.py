"""The harness of the automatic fit: scores, limits, resuming, verdicts."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import auto_fit
from auto_fit import done_before, problem_arrays, run_worker, runs
from auto_fit_page import picture, read_rows, requirements, write_page
from scores import mode_mass_error, scores, sliced_wasserstein, unique_share
from target_parts import Modes
from targets import target
from workers.auto_fit_worker import Counted


def row(name: str, seed: int = 0, tool: str = "visbi", **changes: Any) -> dict[str, Any]:
    goal = target(name)
    base = {
        "tool": tool,
        "target": name,
        "seed": seed,
        "group": goal.group,
        "dim": goal.dim,
        "outcome": "done",
        "cpu_seconds": 1.0,
        "draw_cpu_seconds": 0.0,
        "seconds": 2.0,
        "draw_seconds": 0.5,
        "n_values": 1000,
        "n_gradients": 2000,
        "report": {"status": "ok", "rung": "gaussian"},
        "raw_scores": {"c2st": 0.53, "sliced_wasserstein": 0.04, "mode_error": 0.02, "unique": 1.0},
        "scores": {"c2st": 0.51, "sliced_wasserstein": 0.03, "mode_error": 0.01, "unique": 1.0},
        "evidence_error": 0.001,
        "evidence_z": 0.5,
        "limit": 400,
        "load": [0.0, 0.0],
        "processor": "a processor",
        "source": "abc" if tool == "visbi" else None,
    }
    return base | changes


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    return {text.split(",")[0].split(" (")[0]: met for text, _, met in requirements(rows)}


def scored(c2st: float) -> dict[str, Any]:
    return {"c2st": c2st, "sliced_wasserstein": 0.1, "mode_error": 0.01, "unique": 1.0}


def tables(page: str) -> list[list[list[str]]]:
    """Cells of every table, the line of heads first."""
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("| ")]
    return [[line.strip("| ").split(" | ") for line in block if "---" not in line] for block in blocks]


def test_sliced_wasserstein_of_a_shift_and_of_nothing() -> None:
    theta = torch.randn(3000, 1, dtype=torch.float64)
    assert sliced_wasserstein(theta, theta) == 0.0
    assert sliced_wasserstein(10 * theta + 10, 10 * theta) == pytest.approx(1.0, abs=0.05)


def test_mode_mass_error_and_unique_share() -> None:
    modes = Modes(lambda theta: (theta[:, 0] > 0).long(), torch.tensor([0.5, 0.5]))
    theta = torch.tensor([[-1.0], [1.0], [1.0], [1.0]])
    assert mode_mass_error(theta, modes) == pytest.approx(0.25)
    assert unique_share(theta) == 0.5


def test_scores_of_exact_draws_and_of_broken_ones() -> None:
    goal = target("mixture4_d2")
    good = scores(goal.sample(500, 1), goal, 0)
    assert good["c2st"] is not None and good["c2st"] < 0.58
    assert good["mode_error"] is not None and good["mode_error"] < 0.08
    assert scores(torch.full((500, 2), torch.nan), goal, 0)["c2st"] == 1.0


def test_counted_rows() -> None:
    counted = Counted(target("shell_d2").potential)
    counted(torch.zeros(5, 2))
    counted(torch.zeros(7, 2, requires_grad=True))
    with torch.no_grad():
        counted(torch.zeros(11, 2, requires_grad=True))
    assert (counted.values, counted.gradients) == (16, 7)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("print('noise'); print('{\"x\": 1}')", "done"),
        ("raise SystemExit('broken')", "error"),
        ("while True: pass", "time limit"),
        ("import time; time.sleep(60)", "time limit"),
    ],
)
def test_outcomes(program: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "worker.py").write_text(program)
    monkeypatch.setattr(auto_fit, "HERE", tmp_path)
    answer = run_worker(sys.executable, "worker.py", [], limit=1, patience=2.0)
    assert answer["outcome"] == outcome
    assert answer.get("x") == (1 if outcome == "done" else None)
    assert ("stopped_after" in answer) == (outcome == "time limit")
    assert answer.get("stopped_after", 0.0) < 1.9  # CPU seconds, not those of the clock


def test_what_is_there_is_not_run_again() -> None:
    rows = [row("shell_d2"), row("shell_d2", tool="sbi-maf-rKL")]
    assert done_before(rows, ("visbi", "shell_d2", 0), "abc", any_source=False)
    assert not done_before(rows, ("visbi", "shell_d2", 0), "def", any_source=False)
    assert done_before(rows, ("visbi", "shell_d2", 0), "def", any_source=True)
    assert done_before(rows, ("sbi-maf-rKL", "shell_d2", 0), "def", any_source=False)
    assert not done_before(rows, ("visbi", "shell_d2", 1), "abc", any_source=False)


def test_seeds_where_none_are_given() -> None:
    wanted = runs(["visbi", "sbi-maf-rKL"], ["slcp", "shell_d2", "ball_d4"], None)
    counts = Counter((tool, name) for tool, name, _ in wanted)
    assert counts.pop(("visbi", "slcp")) == 10
    assert len(counts) == 5 and set(counts.values()) == {3}
    assert [seed for *_, seed in wanted] == sorted(seed for *_, seed in wanted)
    assert runs(["visbi"], ["slcp"], [7, 4]) == [("visbi", "slcp", 4), ("visbi", "slcp", 7)]


def test_verdict_on_cheap_targets() -> None:
    def verdict(ours: float, theirs: float) -> tuple[str, bool | None]:
        dear = [row("slcp"), row("slcp", tool="sbi-maf-rKL", cpu_seconds=21.0)]
        own = [row("mixture4_d2", seed, cpu_seconds=ours) for seed in range(3)]
        rows = [*dear, *own, row("mixture4_d2", tool="sbi-maf-rKL", cpu_seconds=theirs)]
        return next((value, met) for text, value, met in requirements(rows) if "cheap" in text)

    assert verdict(0.25, 13.0) == ("mixture4_d2 52.0", True)
    assert verdict(0.25, 12.0) == ("mixture4_d2 48.0", False)
    assert verdict(0.26, 26.0) == ("not measured", None)


def test_verdicts_pass_and_fail() -> None:
    slow = row("mixture4_d2", tool="sbi-maf-rKL", cpu_seconds=30.0)
    good = [row("mixture4_d2", seed, cpu_seconds=0.2) for seed in range(3)]
    assert set(verdicts([*good, slow]).values()) == {True}
    accepted = row("mixture4_d2", scores=scored(0.7))
    assert verdicts([accepted])["no false acceptance"] is False
    assert verdicts([accepted])["C2ST of draws"] is False
    flagged = row("mixture4_d2", scores=scored(0.7), report={"status": "suspect"})
    assert verdicts([flagged])["no false acceptance"] is True
    assert verdicts([row("mixture4_d2", report={"status": "failed"})])["false alarms"] is False
    assert (
        verdicts([row("mixture4_d2", evidence_z=-4.0)])[
            "log-evidence within 3 standard errors in at least 95%"
        ]
        is False
    )
    assert verdicts([row("mixture4_d2", n_values=299_000)])["evaluations for D up to 10"] is False
    assert verdicts([row("mixture4_d2", outcome="error", error="")]) == {}
    assert verdicts([*good, row("mixture4_d2", 7, outcome="error", error="")])["every run ends"] is False
    assert verdicts(good)["the same"] is None


def test_page_and_picture(tmp_path: Path) -> None:
    rows = [
        row("mixture4_d2"),
        row("mixture4_d2", scores=scored(0.777)),  # the later line stands
        row("shell_d8"),
        row("shell_d8", 1, outcome="error", error="x"),
        row("shell_d8", tool="sbi-maf-rKL", outcome="time limit", stopped_after=321.0),
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    write_page(read_rows(path), tmp_path / "page.md")
    picture(read_rows(path), tmp_path / "picture.png")
    page = (tmp_path / "page.md").read_text()
    assert "0.777" in page and "> 321" in page and "not within 321 s" in page and "ok x 1, error x 1" in page
    assert "Requirements, held out targets" in page and (tmp_path / "picture.png").stat().st_size > 1000
    write_page([], tmp_path / "empty.md")
    assert "Nothing measured" in (tmp_path / "empty.md").read_text()


def test_tables_have_median_and_worst_of_all_that_is_asked_for(tmp_path: Path) -> None:
    worse = {"c2st": 0.59, "sliced_wasserstein": 0.08, "mode_error": 0.05, "unique": 1.0}
    bad: dict[str, Any] = {"scores": scored(0.55), "raw_scores": worse, "evidence_z": -2.5, "seconds": 4.0}
    rows = [row("mixture4_d2"), row("mixture4_d2", 1), row("mixture4_d2", 2, **bad), row("ball_d4")]
    rows.append(row("mixture4_d2", tool="numpyro-nuts", seconds=9.5, n_gradients=67_000))
    rows.append(row("mixture4_d2", tool="blackjax-pathfinder", n_values=None, n_gradients=None))
    write_page(rows, tmp_path / "page.md")
    found = tables((tmp_path / "page.md").read_text())
    assert dict(zip(found[0][0][4:14], found[0][1][4:14], strict=True)) == {
        "C2ST of q": "0.530 (0.590)",
        "C2ST of draws": "0.510 (0.550)",
        "sliced W of q": "0.040 (0.080)",
        "sliced W of draws": "0.030 (0.100)",
        "mode mass off": "0.010 (0.010)",
        "log-evidence off": "+0.001 (+0.001)",
        "in se": "+0.5 (-2.5)",
        "CPU s": "1.00 (1.00)",
        "wall s": "2.50 (4.50)",
        "evaluations": "3,000 (3,000)",
    }
    peers = found[-1]
    assert peers[0] == ["target", "visbi", "blackjax-pathfinder", "numpyro-nuts"]
    assert peers[1:] == [
        ["mixture4_d2", "0.03 (0.10), 2.5 s, 3k", "0.03, 2.5 s, -", "0.03, 10.0 s, 68k"],
    ]


def test_problem_for_jax() -> None:
    bounded, unbounded = problem_arrays(target("edge_d10")), problem_arrays(target("schools_centred"))
    assert bounded["high"].tolist() == [1.0] * 10 and "prior_loc" not in bounded
    assert unbounded["prior_scale"][0] == 5.0 and unbounded["check_theta"].shape == (64, 10)
