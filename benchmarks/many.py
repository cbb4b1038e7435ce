"""`fit_many` beside loops of single fits: time for an observation, C2ST against exact draws, calibration.

For each model, in one run: 1000 observations of prior and simulator by `fit_many`, in one process and in
two; a few of them with a family named; a few by loops of our own single fits (q="auto", and the default
family) and of sbi's, each with its own defaults, in processes of their own; C2ST of draws for 50 observations
against exact ones; and SBC over all fits of the linear Gaussian, with q as it is and deliberately narrowed.
Seconds are those with 1000 draws for each observation.

    make many
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_fit import source_state
from many_models import DRAWS, NAMES, Model, model
from step_time import processor
from visbi import __version__, fit_many
from visbi.certificate import c2st
from visbi.certificate.sbc import sbc
from visbi.core.random import seeded

HERE = Path(__file__).parent
ROOT = HERE.parent
Row = dict[str, Any]
_NARROWED = 0.8
NAMED, NAMED_OBS = ("gaussian", "maf"), 4
WAYS = {  # kinds of rows that tell seconds, as the page calls them
    "together, 2 processes": "`fit_many`, 2 processes",
    "named": '`fit_many`, q="{family}"',
    "alone": "{tool}, a loop",
}
_RANKED = 99  # draws that a truth is ranked among


def together(name: str, n_obs: int, n_scored: int) -> list[Row]:
    """Rows of `fit_many`, of its draws' C2ST, and of SBC where the model is the right one."""
    goal = model(name)
    truth, x = goal.observe(n_obs)
    fit_many(
        goal.potential, goal.prior, x[:2], seed=2, show_progress_bar=False, quality_control=False
    )  # loads
    started = time.process_time(), time.perf_counter()
    posteriors = fit_many(
        goal.potential, goal.prior, x, seed=1, show_progress_bar=False, quality_control=False
    )
    with seeded(3):
        theta = posteriors.sample((DRAWS,))
    cpu, wall = time.process_time() - started[0], time.perf_counter() - started[1]
    load = os.getloadavg()[0]
    counts = {
        name: dict(Counter(getattr(r, name) for r in posteriors.reports)) for name in ("status", "rung")
    }
    rows: list[Row] = [
        {"what": "together", "n_obs": n_obs, "cpu_seconds": cpu, "seconds": wall, "load": load, **counts},
        _scored(goal, x, theta, n_scored),
        _in_two_processes(goal, x),
        *(_named(goal, x, family) for family in NAMED),
    ]
    if name.startswith("linear"):
        rows += _ranked(truth, theta)
    return rows


def _in_two_processes(goal: Model, x: torch.Tensor) -> Row:
    """The same fits and draws by two workers, which have been started before."""
    keywords: dict[str, Any] = {"workers": 2, "show_progress_bar": False, "quality_control": False}
    fit_many(goal.potential, goal.prior, x[:4], seed=2, chunk_size=2, **keywords)
    started = time.perf_counter()
    posteriors = fit_many(goal.potential, goal.prior, x, seed=1, **keywords)
    posteriors.sample((DRAWS,))
    return {"what": "together, 2 processes", "n_obs": len(x), "seconds": time.perf_counter() - started}


def _named(goal: Model, x: torch.Tensor, family: str) -> Row:
    """A family trained abreast for some of the observations."""
    x = x[:NAMED_OBS]
    started = time.process_time(), time.perf_counter()
    posteriors = fit_many(
        goal.potential, goal.prior, x, family, seed=1, show_progress_bar=False, quality_control=False
    )
    posteriors.sample((DRAWS,))
    cpu, wall = time.process_time() - started[0], time.perf_counter() - started[1]
    return {"what": "named", "family": family, "n_obs": len(x), "cpu_seconds": cpu, "seconds": wall}


def _scored(goal: Model, x: torch.Tensor, theta: torch.Tensor, n_scored: int) -> Row:
    chosen = [round(i * (len(x) - 1) / (n_scored - 1)) for i in range(n_scored)]
    with seeded(4):
        found = [c2st(theta[:, i], goal.draw(x[i], len(theta)).to(theta)) for i in chosen]
    return {"what": "c2st", "median": statistics.median(found), "worst": max(found), "values": found}


def _ranked(truth: torch.Tensor, theta: torch.Tensor) -> list[Row]:
    rows = []
    for what, factor in (("sbc", 1.0), ("sbc, narrowed", _NARROWED)):
        mean = theta.mean(0)
        found = sbc(truth, (mean + factor * (theta - mean))[:_RANKED], seed=5)
        ranks = {"p_value": found.p_value, "verdict": found.verdict, "said": str(found)}
        rows.append({"what": what, "factor": factor, "n_obs": len(truth), "n_draws": _RANKED, **ranks})
    return rows


def alone(tool: str, name: str, count: int, n_obs: int, python: str) -> Row:
    """A loop of single fits to observations spread over all of them."""
    _, x = model(name).observe(n_obs)
    chosen = [round(i * (n_obs - 1) / max(count - 1, 1)) for i in range(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        np.savez(path, x=x[chosen].numpy())
        worker = [python, str(HERE / "workers" / "many_worker.py"), tool, name, str(path)]
        done = subprocess.run(worker, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{tool} failed on {name}")
    return {"what": "alone", "tool": tool, "n_obs": count, **json.loads(done.stdout.splitlines()[-1])}


def page(rows: list[Row]) -> str:
    """The result as a page of Markdown."""
    first = rows[0]
    loads = [row["load"] for row in rows]
    columns = "CPU s each | wall s each | CPU, times `fit_many` | wall, times | C2ST median (worst)"
    lines = [
        "# Many observations",
        "",
        f"visbi {first['versions']['visbi']}, torch {first['versions']['torch']}, {first['processor']}, one "
        f"thread, {first['when']}; load average {min(loads):.1f} to {max(loads):.1f} (other work ran beside, "
        "which wall seconds feel). Seconds for one observation, with its first 1000 draws; of loops the mean "
        "over the observations tried, each fit with the tool's defaults; maf is the default family of both. "
        "C2ST of 1000 draws for each of 50 observations against exact ones.",
        "",
        f"| model | way | observations | {columns} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        (base,) = [row for row in own if row["what"] == "together"]
        (score,) = [row for row in own if row["what"] == "c2st"]
        cpu, wall = base["cpu_seconds"] / base["n_obs"], base["seconds"] / base["n_obs"]
        said = f"{score['median']:.3f} ({score['worst']:.3f})"
        lines.append(f"| {name} | `fit_many` | {base['n_obs']} | {cpu:.4f} | {wall:.4f} | 1 | 1 | {said} |")
        lines += [f"| {name} | {_timed(row, cpu, wall)}" for row in own if row["what"] in WAYS]
    lines += ["", "What `fit_many` said of its fits:", ""]
    for row in rows:
        if row["what"] == "together":
            counts = [", ".join(f"{n} {what}" for what, n in row[key].items()) for key in ("status", "rung")]
            lines.append(f"- {row['model']}: {counts[0]}; answered by {counts[1]}.")
    lines += ["", "Simulation-based calibration, 99 draws a fit, over all parameters (Holm):", ""]
    for row in rows:
        if row["what"].startswith("sbc"):
            how = "as they are" if row["factor"] == 1.0 else f"shrunk by {row['factor']} about their mean"
            said = f"p = {row['p_value']:.3g}, {row['verdict']}"
            lines.append(f"- {row['model']}, {row['n_obs']} fits, draws {how}: {said}.")
    return "\n".join(lines) + "\n"


def _timed(row: Row, cpu: float, wall: float) -> str:
    """A way's cells: what it is, seconds an observation, and how many times those of `fit_many`."""
    count = row["n_obs"]
    way = WAYS[row["what"]].format(**row)
    if row["what"] == "alone":
        spent, took = (statistics.mean(row[key]) for key in ("cpu_seconds", "seconds"))
    else:
        spent, took = row.get("cpu_seconds", 0.0) / count, row["seconds"] / count
    cells = (_seconds(spent), _times(spent / cpu)) if spent else ("", "")
    return f"{way} | {count} | {cells[0]} | {_seconds(took)} | {cells[1]} | {_times(took / wall)} | |"


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.4f}"


def _times(number: float) -> str:
    return f"{number:.0f}" if number >= 2 else f"{number:.2f}"


def main() -> None:
    """Run all of it, write the lines and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--visbi-python", default=sys.executable)
    parser.add_argument("--sbi-python")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--n-obs", type=int, default=1000)
    parser.add_argument("--n-scored", type=int, default=50)
    parser.add_argument(
        "--counts", nargs=3, type=int, default=[10, 3, 2], help="single fits: auto, maf, sbi's maf"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    about = {
        "versions": {"visbi": __version__, "torch": torch.__version__},
        "processor": processor(),
        "source": source_state(),
    }
    tools = zip(("visbi-auto", "visbi-maf", "sbi-maf"), options.counts, strict=True)
    pythons = {"visbi": options.visbi_python, "sbi": options.sbi_python}
    wanted = [(tool, count) for tool, count in tools if count and pythons[tool.split("-")[0]]]
    path = options.output / "many.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[Row] = [row for row in map(json.loads, lines) if row["model"] not in options.models]
    for name in options.models:
        found = together(name, options.n_obs, options.n_scored)
        for tool, count in wanted:
            found.append(alone(tool, name, count, options.n_obs, pythons[tool.split("-")[0]]))
        for row in found:
            now = {"load": os.getloadavg()[0], "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
            rows.append({"model": name, **now, **about, **row})
            print(
                json.dumps({k: v for k, v in rows[-1].items() if k not in ("values", "source")}), flush=True
            )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (options.output / "many.md").write_text(page(rows))


if __name__ == "__main__":
    main()
