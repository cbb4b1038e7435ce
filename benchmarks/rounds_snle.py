"""sbi's SNLE beside `infer`: the same observations, budgets and scores; `rounds.py` runs and shows it."""

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rounds_problems import PROBLEMS
from step_time import processor
from visbi.certificate import c2st

__all__ = ["SNLE_TASKS", "measure_snle", "snle_lines"]

SNLE_TASKS = ("two_moons", "slcp")
"""Those of which numbers of SNLE are published."""

HERE = Path(__file__).parent
_KEPT = ("c2st", "c2st_network", "cpu_seconds", "seconds", "source")
Row = dict[str, Any]


def measure_snle(name: str, budget: int, number: int, python: str, limit: float, beside: Row) -> Row:
    """One run of sbi's SNLE and its scores; no further round begins after `limit` CPU seconds.

    `beside` is what `infer` did just before; its scores and times are kept in the row.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "draws.npz"
        worker = HERE / "workers" / "rounds_snle_worker.py"
        arguments = [name, str(budget), str(number), str(limit), str(out)]
        done = subprocess.run([python, str(worker), *arguments], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        took = json.loads(done.stdout.strip().splitlines()[-1])
        scores: Row = {}
        if out.exists():
            draws = torch.from_numpy(np.load(out)["draws"])
            reference = PROBLEMS[name].reference(number, len(draws))
            both = {kind: c2st(draws, reference, classifier=kind) for kind in ("network", "trees")}
            scores = {"c2st": max(both.values()), "c2st_network": both["network"]}
    return {
        "tool": "sbi-snle",
        "task": name,
        "budget": budget,
        "observation": number,
        **took,
        **scores,
        "beside": {key: beside[key] for key in _KEPT},
        "load": [load, os.getloadavg()[0]],
        "processor": processor(),
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def snle_lines(rows: list[Row], order: list[str]) -> list[str]:
    """A table of its runs, each with a call of `infer` `beside` it; nothing without any."""
    if not rows:
        return []
    lines = [
        "## Beside sbi's SNLE",
        "",
        "sbi 0.27's NLE in ten rounds with slice sampling, set up as for the published numbers "
        "(`workers/rounds_snle_worker.py`), and a call of `infer` with its defaults right before it. Both on "
        "one thread, with other work beside; CPU seconds. What had not ended at its limit is a lower bound.",
        "",
        "| task | simulations | observation | C2ST of SNLE (network) | of ours | CPU s | of ours | ratio |",
        f"|{'---|' * 8}",
    ]
    for row in sorted(rows, key=lambda r: (order.index(r["task"]), r["budget"], r["observation"])):
        ours, ended = row["beside"], "c2st" in row
        more = "" if ended else "> "
        rounds = "" if ended else f" ({len(row['cpu_after_rounds'])} of 10 rounds)"
        lines.append(
            f"| {row['task']} | {row['budget']:,} | {row['observation']} "
            f"| {_score(row) if ended else '-'} | {_score(ours)} "
            f"| {more}{row['cpu_seconds']:.0f}{rounds} | {ours['cpu_seconds']:.0f} "
            f"| {more}{row['cpu_seconds'] / ours['cpu_seconds']:.1f} |"
        )
    return [*lines, ""]


def _score(row: Row) -> str:
    return f"{row['c2st']:.3f} ({row['c2st_network']:.3f})"
