"""The automatic fit and its peers on targets with exact draws: how good, how long, and does it know.

One process for each (tool, target, seed), in the tool's own environment and with one thread, fits and saves
2000 draws; this script scores them: C2ST (.5 = a classifier cannot tell them from exact draws), sliced
Wasserstein distance, masses of modes, the log-evidence in its own standard errors. Every run is one line of
`results/auto_fit.jsonl`, written as it ends; what is there already is not run again, except visbi's lines
of another state of src/. A time limit counts CPU seconds, since other work may share the machine.

    make auto-fit
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Uniform

from auto_fit_page import Row, picture, read_rows, write_page
from scores import scores
from step_time import processor
from targets import GROUPS, NAMES, Group, Target, names_of, target

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
JAX_WORKER = "auto_fit_jax_worker.py"
TOOLS = {  # name -> (environment, worker)
    "visbi": ("visbi", "auto_fit_worker.py"),
    "visbi-gaussian": ("visbi", "auto_fit_worker.py"),
    "exact": ("visbi", "auto_fit_worker.py"),
    "sbi-maf-rKL": ("sbi", "auto_fit_worker.py"),
    "sbi-maf-fKL": ("sbi", "auto_fit_worker.py"),
    "sbi-nsf-rKL": ("sbi", "auto_fit_worker.py"),
    "numpyro-nuts": ("numpyro", JAX_WORKER),
    "blackjax-pathfinder": ("blackjax", JAX_WORKER),
    "blackjax-smc": ("blackjax", JAX_WORKER),
}
# Seeds by tool and group where none are given: a hundred fits of ours on the tuning targets; peers are slow.
SEEDS = {("visbi", "tuning"): 10}
SEEDS_ELSEWHERE = 3
SMALLEST_ERROR = 1e-3  # nats of log-evidence, below which no standard error is believed or asked for
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def source_state() -> str:
    """The git tree of src/, with a mark where it has uncommitted changes."""
    tree = _git("rev-parse", "--short=12", "HEAD:src")
    return f"{tree}{'+' if _git('status', '--porcelain', '--', 'src') else ''}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def limit_cpu(seconds: int) -> Callable[[], None]:
    """To be called in the worker's process before it starts."""

    def apply() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))

    return apply


def run_worker(python: str, worker: str, arguments: list[str], *, limit: int, patience: float) -> Row:
    """What the worker says, with `outcome` "done", "time limit" or "error", and the CPU seconds it had."""
    before = _children_cpu()
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(SOURCE)}
    try:
        done = subprocess.run(
            [python, str(HERE / "workers" / worker), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=patience * limit,
            preexec_fn=limit_cpu(limit),
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "time limit", "stopped_after": _children_cpu() - before}
    if done.returncode == -24 or done.returncode == -9:  # SIGXCPU, and SIGKILL for who ignores it
        return {"outcome": "time limit", "stopped_after": _children_cpu() - before}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"outcome": "error", "error": done.stderr[-1500:]}
    answer = json.loads(lines[-1])
    return {"outcome": answer.pop("outcome", "done"), **answer}


def _children_cpu() -> float:
    """CPU seconds of all workers that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def problem_arrays(goal: Target) -> dict[str, np.ndarray]:
    """What `targets_jax` needs: constants, the prior, and densities at exact draws to compare with."""
    arrays = {key: value.double().numpy() for key, value in goal.constants.items()}
    inner = getattr(goal.prior, "base_dist", goal.prior)
    if isinstance(inner, Uniform):
        arrays |= {"low": inner.low.double().numpy(), "high": inner.high.double().numpy()}
    else:
        arrays |= {"prior_loc": inner.mean.double().numpy(), "prior_scale": inner.stddev.double().numpy()}
    theta = goal.sample(64, 77)
    return arrays | {"check_theta": theta.numpy(), "check_value": goal.potential(theta).double().numpy()}


def measure(tool: str, name: str, seed: int, python: str, *, limit: int, patience: float) -> Row:
    """One run and its scores."""
    goal = target(name)
    row: Row = {"tool": tool, "target": name, "seed": seed, "group": goal.group, "dim": goal.dim}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draws.npz"
        if TOOLS[tool][1] == JAX_WORKER:
            np.savez(Path(folder) / "problem.npz", **problem_arrays(goal))
        worker = TOOLS[tool][1]
        row |= run_worker(python, worker, [tool, name, str(seed), str(path)], limit=limit, patience=patience)
        if row["outcome"] == "done":
            with np.load(path) as saved:
                draws = {key: torch.from_numpy(saved[key]) for key in saved.files}
            row["scores"] = scores(draws["draws"], goal, seed)
            if "raw" in draws:
                row["raw_scores"] = scores(draws["raw"], goal, seed)
    report = row.get("report", {})
    if goal.log_evidence is not None and report.get("log_evidence") is not None:
        row["evidence_error"] = report["log_evidence"] - goal.log_evidence
        if report.get("log_evidence_se") is not None:
            row["evidence_z"] = row["evidence_error"] / max(report["log_evidence_se"], SMALLEST_ERROR)
    row["limit"] = limit
    row["load"] = [load, os.getloadavg()[0]]
    row["processor"] = processor()
    row["when"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return row


def runs(tools: list[str], names: list[str], seeds: list[int] | None) -> list[tuple[str, str, int]]:
    """(tool, target, seed) of what is asked for, seed by seed; without `seeds` as many as `SEEDS` says."""
    groups: dict[str, Group] = {name: group for group in GROUPS for name in names_of(group)}
    each = {
        (tool, name): seeds or range(SEEDS.get((tool, groups[name]), SEEDS_ELSEWHERE))
        for tool in tools
        for name in names
    }
    every = sorted({seed for own in each.values() for seed in own})
    return [(*pair, seed) for seed in every for pair, own in each.items() if seed in own]


def done_before(rows: list[Row], key: tuple[str, str, int], source: str, *, any_source: bool) -> bool:
    """Whether a line of that run is there, for visbi from the same state of src/."""
    own = [row for row in rows if (row["tool"], row["target"], row["seed"]) == key]
    if not key[0].startswith("visbi"):
        return bool(own)
    return any(any_source or row["source"] == source for row in own)


def say(row: Row) -> None:
    """One line for whoever watches."""
    line = f"{row['tool']:20s} {row['target']:20s} {row['seed']}  {row['outcome']}"
    if row["outcome"] == "done":
        own, raw = row["scores"], row.get("raw_scores", {})
        line += f"  C2ST {own['c2st']:.3f}"
        line += f" (raw {raw['c2st']:.3f})" if raw else ""
        line += f"  {row['cpu_seconds'] + row['draw_cpu_seconds']:.1f} CPU s"
        line += f"  {row['n_values']} + {row['n_gradients']} rows  {row.get('report', {}).get('status', '')}"
    elif row["outcome"] == "error":
        line += "  " + row["error"].strip().splitlines()[-1][:150] if row["error"].strip() else ""
    print(line, flush=True)


def main() -> None:
    """Run what is asked for and not there yet, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for environment in sorted({environment for environment, _ in TOOLS.values()}):
        parser.add_argument(f"--{environment}-python", help=f"python of the environment of {environment}")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=["visbi", "sbi-maf-rKL"])
    parser.add_argument("--targets", nargs="+", choices=NAMES, help="instead of groups")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["tuning", "held out"])
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: 0 to 9 of visbi on tuning targets, else 0 to 2"
    )
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds of one run")
    parser.add_argument("--patience", type=float, default=8.0, help="wall seconds for each of them")
    parser.add_argument(
        "--any-source", action="store_true", help="keep visbi's lines of other states of src/"
    )
    parser.add_argument("--again", action="store_true", help="run also what is there already")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    lines = options.output / "auto_fit.jsonl"
    names = options.targets or [name for group in options.groups for name in names_of(group)]
    source = source_state()
    for tool, name, seed in [] if options.page_only else runs(options.tools, names, options.seeds):
        if not options.again and done_before(
            read_rows(lines), (tool, name, seed), source, any_source=options.any_source
        ):
            continue
        python = getattr(options, f"{TOOLS[tool][0]}_python")
        if python is None:
            parser.error(f"{tool} needs --{TOOLS[tool][0]}-python")
        row = measure(tool, name, seed, python, limit=options.limit, patience=options.patience)
        row["source"] = source if tool.startswith("visbi") else None
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(row)
    rows = read_rows(lines)
    write_page(rows, options.output / "auto_fit.md")
    picture(rows, options.output / "auto_fit.png")


if __name__ == "__main__":
    main()
