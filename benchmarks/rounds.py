"""`infer` on two moons, SLCP and lynx-hare beside published numbers of SNLE and SNPE.

For each (task, budget of simulations, observation) one call of `infer` with its defaults, but for
`stop_early`, which is off, so that all spend the same; where the stopping rule would have ended it is said
beside. 2000 draws are scored by C2ST against 2000 exact ones. Every call is a line of `results/rounds.jsonl`,
written as it ends, and is not repeated. With `--workers 2` the networks of the ensemble train side by side,
and the wall clock is what is asked for.

With `--sbi-python` sbi's SNLE is run on the first observations, too, each time right after a call of ours.

    python benchmarks/rounds.py --sbi-python .venvs/sbi/bin/python
"""

import argparse
import json
import os
import statistics
import time
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_fit import source_state
from rounds_problems import PROBLEMS, Problem
from rounds_snle import SNLE_TASKS, measure_snle, snle_lines
from scores import sliced_wasserstein
from step_time import processor
from visbi.certificate import c2st
from visbi.core.random import seeded
from visbi.rounds import Inference, infer, reason_to_stop

HERE = Path(__file__).parent
DRAWS = 2000
BUDGETS, OBSERVATIONS = (1000, 10_000), (0, 1, 2, 3, 4)
PUBLISHED = {  # mean C2ST of Lueckmann et al. 2021 (figures of the supplement), 10 observations
    ("two_moons", 1000): {"SNLE": 0.657, "SNPE": 0.643},
    ("two_moons", 10_000): {"SNLE": 0.571, "SNPE": 0.554},
    ("two_moons", 100_000): {"SNLE": 0.582, "SNPE": 0.530},
    ("slcp", 1000): {"SNLE": 0.921},
    ("slcp", 10_000): {"SNLE": 0.713},
    ("slcp", 100_000): {"SNLE": 0.578},
}

Row = dict[str, Any]


def measure(name: str, budget: int, number: int, workers: int) -> Row:
    """One call of `infer` and its scores."""
    problem = PROBLEMS[name]
    load = os.getloadavg()[0]
    began, worked = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the status is in the row
        result = infer(
            problem.task.simulator,
            problem.task.prior,
            problem.observation(number),
            simulations=budget,
            stop_early=False,
            workers=workers,
            seed=number,
            show_progress_bar=False,
        )
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {
        "tool": "visbi",
        "task": name,
        "budget": budget,
        "observation": number,
        "workers": workers,
        "simulations": result.n_simulations,
        "seconds": seconds,
        "cpu_seconds": cpu,
        **scored(result, problem, number),
        "report": {key: value for key, value in asdict(result.posterior.report).items() if key != "modes"},
        "rounds": [
            {
                "n_used": each.n_used,
                "epochs": [len(trace.validation) for trace in each.likelihood.traces],
                "held_out": [trace.best_loss for trace in each.likelihood.traces],
                **asdict(each.errors),
            }
            for each in result.rounds
        ],
        "spend_on": result.errors.spend_on,
        "source": source_state(),
        "load": [load, os.getloadavg()[0]],
        "processor": processor(),
        "torch": torch.__version__,
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def scored(result: Inference, problem: Problem, number: int) -> Row:
    """C2ST of the last round, and of the round at which the stopping rule would have ended."""
    reference = problem.reference(number, DRAWS)
    errors = [each.errors for each in result.rounds]
    ends = next((i for i in range(len(errors)) if reason_to_stop(errors[: i + 1])), len(errors) - 1)
    with seeded(number):
        draws = [result.rounds[i].posterior.sample((DRAWS,)) for i in (-1, ends)]
    both = {kind: c2st(draws[0], reference, classifier=kind) for kind in ("network", "trees")}
    early = ends < len(errors) - 1
    row: Row = {
        "c2st": max(both.values()),
        "c2st_network": both["network"],
        "sliced_wasserstein": sliced_wasserstein(draws[0], reference),
        "stops_after": sum(len(runs) + runs.n_failed for runs in result.simulations[: ends + 1]),
        "c2st_there": c2st(draws[1], reference) if early else max(both.values()),
    }
    return row | (_moments(draws[0], reference) if problem.own_observation else {})


def _moments(draws: Tensor, reference: Tensor) -> Row:
    """The worst mean, in the reference's sds, and the ratio of sds farthest from one."""
    a, b = draws.double(), reference
    off, ratio = (a.mean(0) - b.mean(0)) / b.std(0), a.std(0) / b.std(0)
    return {
        "worst_mean_off": float(off[off.abs().argmax()]),
        "worst_sd_ratio": float(ratio[(ratio - 1).abs().argmax()]),
    }


def read(path: Path) -> list[Row]:
    """The rows so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{"tool": "visbi", "workers": 1, **json.loads(line)} for line in lines]


def page(rows_of_both: list[Row]) -> str:
    """The result as a page of Markdown."""
    every_row = [row for row in rows_of_both if row["tool"] == "visbi"]
    rows = [row for row in every_row if row["workers"] == 1]
    keys = sorted({(list(PROBLEMS).index(row["task"]), row["task"], row["budget"]) for row in rows})
    lines = [
        "# Sequential inference beside published numbers",
        "",
        f"`infer` with its defaults on CPU, one thread. C2ST of {DRAWS} draws against {DRAWS} exact ones, "
        "the larger of a network's and boosted trees' accuracy (.5 = cannot be told apart, noise about .01); "
        "in brackets that of the network alone, the kind that the published numbers were made with (on "
        "10,000 draws). Means over observations by seeds of our own; published: means over the ten of "
        "Lueckmann et al., Benchmarking simulation-based inference, AISTATS 2021, whose MCMC on the learned "
        "likelihood takes 9 to 29 minutes of these at 10,000 simulations. Lynx and hare: one observation, "
        "seeds of the method; the reference is long NUTS on the exact likelihood.",
        *([_machine(every_row)] if every_row else ["Nothing measured."]),
        "",
        "| task | simulations | observations | C2ST (network) | worst | SNLE | SNPE | CPU s | wall s "
        "| status | error of q | of the likelihood | moved | stops after | C2ST there |",
        f"|{'---|' * 15}",
    ]
    lines += [_line(task, budget, rows) for _, task, budget in keys]
    lines += ["", _missing(rows)]
    lines += [
        "",
        *_by_workers(every_row),
        *snle_lines([row for row in rows_of_both if row["tool"] != "visbi"], list(PROBLEMS)),
        "## Each call",
        "",
        "| task | simulations | observation | C2ST | CPU s | status | errors |",
    ]
    lines += [f"|{'---|' * 7}"]
    for row in sorted(
        rows, key=lambda row: (list(PROBLEMS).index(row["task"]), row["budget"], row["observation"])
    ):
        last = row["rounds"][-1]
        moments = (
            f"; mean off {row['worst_mean_off']:+.2f} sd, ratio of sd {row['worst_sd_ratio']:.2f} at worst"
            if "worst_mean_off" in row
            else ""
        )
        lines.append(
            f"| {row['task']} | {row['budget']:,} | {row['observation']} | {row['c2st']:.3f} "
            f"({row['c2st_network']:.3f}) | {row['cpu_seconds']:.0f} | {row['report']['status']} "
            f"| q {last['q']:.3f}, likelihood {last['likelihood']:.3f}, moved {last['moved']:.3f}: "
            f"{row['spend_on']}{moments} |"
        )
    return "\n".join(lines) + "\n"


def _missing(rows: list[Row]) -> str:
    """What of the whole was not run; a budget beside the usual ones is part of it once it was begun."""
    budgets = sorted({*BUDGETS, *(row["budget"] for row in rows)})
    there = {(row["task"], row["budget"], row["observation"]) for row in rows}
    gaps = []
    for task in PROBLEMS:
        for budget in budgets:
            n = sum((task, budget, number) in there for number in OBSERVATIONS)
            if n < len(OBSERVATIONS):
                gaps.append(f"{task} at {budget:,} ({len(OBSERVATIONS) - n} of {len(OBSERVATIONS)})")
    return f"Not run: {', '.join(gaps)}." if gaps else "All was run."


def _by_workers(rows: list[Row]) -> list[str]:
    """What the wall clock says where networks train side by side."""
    keys = sorted({(row["workers"], row["task"], row["budget"]) for row in rows if row["workers"] > 1})
    lines = []
    for workers, task, budget in keys:
        own = [row for row in rows if (row["workers"], row["task"], row["budget"]) == (workers, task, budget)]
        seconds, loads = [row["seconds"] for row in own], [row["load"][0] for row in own]
        lines += [
            f"With {workers} workers, {task} at {budget:,}: {statistics.mean(seconds):.0f} s by the clock "
            f"({len(own)} observations, {min(seconds):.0f} to {max(seconds):.0f}, load average "
            f"{max(loads):.1f} at most when they began), C2ST "
            f"{statistics.mean(row['c2st'] for row in own):.3f}.",
            "",
        ]
    return lines


def _machine(rows: list[Row]) -> str:
    loads = [load for row in rows for load in row["load"]]
    sources = ", ".join(sorted({row["source"] for row in rows}))
    processors, versions = (", ".join(sorted({row[key] for row in rows})) for key in ("processor", "torch"))
    return (
        f"{processors}; load average {min(loads):.1f} to {max(loads):.1f} on two cores (other work ran "
        f"beside, which wall seconds feel); torch {versions}; tree of src/: {sources}."
    )


def _line(task: str, budget: int, rows: list[Row]) -> str:
    own = [row for row in rows if (row["task"], row["budget"]) == (task, budget)]

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in own)

    def last(key: str) -> float:
        return statistics.mean(row["rounds"][-1][key] for row in own)

    published = PUBLISHED.get((task, budget), {})
    cells = [
        task,
        f"{budget:,}",
        str(len(own)),
        f"{mean('c2st'):.3f} ({mean('c2st_network'):.3f})",
        f"{max(row['c2st'] for row in own):.3f}",
        *(f"{published[tool]:.3f}" if tool in published else "-" for tool in ("SNLE", "SNPE")),
        f"{mean('cpu_seconds'):.0f}",
        f"{mean('seconds'):.0f}",
        ", ".join(sorted({row["report"]["status"] for row in own})),
        *(f"{last(key):.3f}" for key in ("q", "likelihood", "moved")),
        f"{mean('stops_after'):,.0f}",
        f"{mean('c2st_there'):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is asked for and not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--observations", nargs="+", type=int, default=list(OBSERVATIONS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sbi-python")
    parser.add_argument("--snle-observations", nargs="+", type=int, default=[0])
    parser.add_argument("--snle-limit", type=float, default=4000.0, help="CPU seconds of one run of SNLE")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rounds.jsonl"
    theirs = options.snle_observations if options.sbi_python and options.workers == 1 else []
    wanted = [
        (tool, name, budget, number)
        for budget in options.budgets
        for tool, numbers in (("visbi", options.observations), ("sbi-snle", theirs))
        for number in numbers
        for name in options.tasks
        if tool == "visbi" or name in SNLE_TASKS
    ]
    for tool, name, budget, number in [] if options.page_only else wanted:
        key = (tool, name, budget, number, options.workers)
        there = [
            tuple(row[k] for k in ("tool", "task", "budget", "observation", "workers")) for row in read(path)
        ]
        if key in there:
            continue
        if tool == "visbi":
            row = measure(name, budget, number, options.workers)
        else:
            ours = measure(name, budget, number, 1)
            row = measure_snle(name, budget, number, options.sbi_python, options.snle_limit, ours)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{tool} on {name}, {budget} simulations, observation {number}: "
            f"C2ST {row.get('c2st', float('nan')):.3f}, {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )
    (options.output / "rounds.md").write_text(page(read(path)))


if __name__ == "__main__":
    main()
