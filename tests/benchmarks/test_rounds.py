"""The benchmark of `infer`: its references against quadrature, its rows and its page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rounds
from amortized_tasks import two_moons_draws
from rounds_problems import PROBLEMS
from visbi.core.random import seeded
from visbi.simulators.zoo import two_moons


@pytest.mark.parametrize("x", [(0.0, 0.0), (0.3, 0.2), (-0.3, -0.5)])
def test_two_moons_draws_against_quadrature(x: tuple[float, float]) -> None:
    x_o = torch.tensor(x, dtype=torch.float64)
    with seeded(0):
        draws = two_moons_draws(x_o, 20_000)
    axis = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    weights = torch.softmax(two_moons.log_likelihood(theta, x_o), 0)
    mean = weights @ theta
    sd = (weights @ (theta - mean).square()).sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.03
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.02
    square = (theta.sum(-1).abs(), draws.sum(-1).abs())
    assert float(square[1].mean()) == pytest.approx(float(weights @ square[0]), abs=0.003)


def test_observations_are_runs_at_draws_of_the_prior() -> None:
    first, again, other = (PROBLEMS["slcp"].observation(k) for k in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (8,)
    lynx = PROBLEMS["lynx_hare"]
    assert torch.equal(lynx.observation(0), lynx.observation(1)) and lynx.reference(0, 500).shape == (500, 8)


def row(task: str, budget: int, number: int, c2st: float, workers: int = 1) -> dict[str, Any]:
    errors = {"q": 0.01, "likelihood": 0.2, "moved": 0.1, "q_status": "ok"}
    return {
        "tool": "visbi",
        "task": task,
        "budget": budget,
        "observation": number,
        "workers": workers,
        "simulations": budget,
        "seconds": 100.0,
        "cpu_seconds": 50.0,
        "c2st": c2st,
        "c2st_network": c2st - 0.01,
        "stops_after": budget,
        "c2st_there": c2st,
        "report": {"status": "ok"},
        "rounds": [errors],
        "spend_on": "more simulations",
        "source": "abc",
        "load": [1.0, 2.0],
        "processor": "a processor",
        "torch": "2",
    }


def test_page() -> None:
    rows = [row("two_moons", 1000, 0, 0.5), row("two_moons", 1000, 1, 0.6), row("slcp", 10_000, 0, 0.7)]
    text = rounds.page(rows)
    assert "| two_moons | 1,000 | 2 | 0.550 (0.540) | 0.600 | 0.657 | 0.643 | 50 | 100 | ok |" in text
    assert "| slcp | 10,000 | 1 | 0.700 (0.690) | 0.700 | 0.713 | - |" in text
    assert "two_moons at 1,000 (3 of 5), two_moons at 10,000 (5 of 5), slcp at 1,000 (5 of 5)" in text
    assert "workers" not in text
    shared = [*rows, row("two_moons", 1000, 0, 0.5, 2), row("two_moons", 1000, 1, 0.6, 2)]
    assert "With 2 workers, two_moons at 1,000: 100 s by the clock (2 observations" in rounds.page(shared)
    assert "| two_moons | 1,000 | 2 | 0.550 (0.540) |" in rounds.page(shared)
    assert text.count("more simulations") == 3 and "Nothing measured" in rounds.page([])


def test_page_beside_snle() -> None:
    ours = row("slcp", 1000, 0, 0.6)
    theirs = {"tool": "sbi-snle", "task": "slcp", "budget": 1000, "observation": 0, "beside": ours}
    ended = theirs | {
        "cpu_seconds": 600.0,
        "c2st": 0.9,
        "c2st_network": 0.88,
        "cpu_after_rounds": [60.0] * 10,
    }
    cut = theirs | {"budget": 10_000, "cpu_seconds": 555.0, "cpu_after_rounds": [60.0, 555.0]}
    text = rounds.page([ours, cut, ended])
    assert "| slcp | 1,000 | 0 | 0.900 (0.880) | 0.600 (0.590) | 600 | 50 | 12.0 |" in text
    assert "| slcp | 10,000 | 0 | - | 0.600 (0.590) | > 555 (2 of 10 rounds) | 50 | > 11.1 |" in text
    assert text.count("| slcp | 1,000 |") == 3
    assert "## Beside" not in rounds.page([ours])


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, int, int, int]] = []

    def measured(name: str, budget: int, number: int, workers: int) -> dict[str, Any]:
        run.append((name, budget, number, workers))
        return row(name, budget, number, 0.6, workers)

    monkeypatch.setattr(rounds, "measure", measured)
    options = [
        "rounds.py",
        "--output",
        str(tmp_path),
        "--budgets",
        "1000",
        "--tasks",
        "slcp",
        "--observations",
    ]
    for observations in (["0"], ["0", "1"], ["0", "1"]):
        monkeypatch.setattr("sys.argv", [*options, *observations])
        rounds.main()
    assert run == [("slcp", 1000, 0, 1), ("slcp", 1000, 1, 1)]
    monkeypatch.setattr("sys.argv", [*options, "0", "--workers", "2"])
    rounds.main()
    assert run[2:] == [("slcp", 1000, 0, 2)]
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["observation"] for line in lines] == [0, 1, 0]
    assert "| slcp | 1,000 | 2 |" in (tmp_path / "rounds.md").read_text()
