r"""Does `VIPosterior` with nothing but its defaults reach the exact posterior of the linear Gaussian?

The judge is C2ST, the held-out accuracy of a classifier between draws of q and exact draws: .5 if it cannot
tell them apart. Draws of q are raw, without importance weights.

`train()`: every family under every divergence at D = 2, four of them also at D = 1, 5 and 10, x known
likelihood; 2000 draws from each side. The target has correlated parameters and sds of about .45 under a prior
N(0, I); for `gaussian_diag` its parameters are independent.

`train_amortized()`: 20 observations that no fit saw, under a Gaussian and a box prior; the likelihood, or the
likelihood-to-evidence ratio, is learnt from simulations first. There the network's own error counts too; it
is shown beside, as the best accuracy that any classifier could have between the learnt posterior and the
exact one.

That best accuracy is (1 + TV) / 2, with TV the total variation, which densities give without a classifier:
TV = E_q (1 - p / q)_+, p the exact posterior. C2ST estimates a lower bound of it, with a standard error of
.008.

One line of JSON for every finished cell goes to `contract_c2st.jsonl`: a killed run goes on where it stopped.
A cell counts as finished if its line was made from the same `src/visbi` and the same script.

    make contract-c2st
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

import visbi
from contract_c2st_learnt import LEARNT, PRIORS, learn, learnt_variation, observations
from step_time import processor
from visbi.certificate.twosample import c2st
from visbi.core.random import seeded
from visbi.families.names import FAMILY_NAMES
from visbi.fitting.config import METHODS
from visbi.posterior import VIPosterior
from visbi.simulators.zoo import linear_gaussian

HERE = Path(__file__).parent
SOURCES = ("src/visbi", "benchmarks/contract_c2st.py", "benchmarks/contract_c2st_learnt.py")
SEEDS = (0, 1, 2)
EVERY_DIMENSION = ("maf", "nsf", "nice", "gaussian")
OTHER_DIMENSIONS = (1, 5, 10)
DRAWS = 2000
MANY_DRAWS = 20_000  # for total variations
SINGLE_TARGET, AMORTIZED_TARGET = 0.55, 0.58


@dataclass(frozen=True)
class Cell:
    """One fit: a family, a divergence and D, or what is learnt and the prior's kind."""

    part: str
    name: str
    method: str
    dim: int
    seed: int


def cells(seeds: Iterable[int]) -> list[Cell]:
    """All of them; one seed after the other, so that a killed run has seen everything once."""
    found = [Cell("amortized", kind, prior, 2, SEEDS[0]) for kind in LEARNT for prior in PRIORS]
    for seed in seeds:
        found += [Cell("single", name, method, 2, seed) for name in FAMILY_NAMES for method in METHODS]
        found += [
            Cell("single", name, method, dim, seed)
            for dim in OTHER_DIMENSIONS
            for name in EVERY_DIMENSION
            for method in METHODS
        ]
    return found


def measure(cell: Cell) -> dict[str, Any]:
    """Everything that the page says about one cell."""
    began, worked = time.perf_counter(), time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _single(cell) if cell.part == "single" else _amortized(cell)
    return {
        **asdict(cell),
        **found,
        "warnings": sorted({str(warning.message) for warning in caught}),
        "cell_seconds": time.perf_counter() - began,
        "cell_cpu_seconds": time.process_time() - worked,
    }


def _single(cell: Cell) -> dict[str, Any]:
    matrix = torch.eye(cell.dim) if cell.name == "gaussian_diag" else None
    task = linear_gaussian.task(cell.dim, matrix=matrix)
    assert task.log_likelihood is not None and task.posterior is not None
    log_likelihood, prior = task.log_likelihood, task.prior

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return log_likelihood(theta, x_o) + prior.log_prob(theta)

    with seeded(cell.seed):  # of the weights that q begins with
        posterior = VIPosterior(potential, prior, q=cell.name, vi_method=cell.method)
    began, worked = time.perf_counter(), time.process_time()
    posterior.train(task.x_o[None], show_progress_bar=False, seed=cell.seed)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    exact = task.posterior(task.x_o)
    with seeded(1000 + cell.seed):
        draws, right = posterior.sample((DRAWS,)), exact.sample((DRAWS,))
        with torch.no_grad():
            theta, log_q = posterior.q.sample_and_log_prob(MANY_DRAWS)
    report = posterior.report
    return {
        "c2st": c2st(draws, right),
        "variation": variation(exact, theta, log_q),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": posterior.trace.num_iters,
        "stop_reason": posterior.trace.stop_reason,
        "status": report.status,
        "khat": report.khat if math.isfinite(report.khat) else None,
    }


def _amortized(cell: Cell) -> dict[str, Any]:
    learnt = learn(cell.name, cell.method, cell.seed)
    posterior = VIPosterior(learnt.potential, learnt.prior)
    began, worked = time.perf_counter(), time.process_time()
    posterior.train_amortized(learnt.theta, learnt.x, show_progress_bar=False, seed=cell.seed)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    accuracies, of_learnt = [], []
    for x in observations(cell.method):
        with seeded(1000 + cell.seed):
            right = learnt.exact(x, MANY_DRAWS)
            accuracies.append(c2st(posterior.sample((DRAWS,), x), right[:DRAWS]))
        of_learnt.append(learnt_variation(learnt, right, x))
    return {
        "c2st": max(accuracies),
        "c2st_each": accuracies,
        "learnt_variation_each": of_learnt,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "simulations": len(learnt.x),
        "learning_seconds": learnt.seconds,
        "steps": posterior.trace.num_iters,
        "stop_reason": posterior.trace.stop_reason,
    }


def variation(exact: Distribution, theta: Tensor, log_q: Tensor) -> float:
    """Total variation between q and the exact posterior from draws of q and their log-densities."""
    return float((1.0 - (exact.log_prob(theta).double() - log_q.double()).exp()).clamp_min(0).mean())


# -- what has been measured --------------------------------------------------------------------------------


def tree() -> tuple[str, str, bool]:
    """The commit, a name for the sources that decide, and whether they are as committed."""
    names = [git("rev-parse", "--short=10", f"HEAD:{path}") for path in SOURCES]
    clean = not git("status", "--porcelain", "--", *SOURCES)
    return git("rev-parse", "--short=12", "HEAD"), "-".join(names) + ("" if clean else "-changed"), clean


def git(*arguments: str) -> str:
    """What git says."""
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def finished(path: Path, source: str | None) -> dict[Cell, dict[str, Any]]:
    """The last line of every cell; of one source, or of any."""
    rows: dict[Cell, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line at which a run was killed
            continue
        if source in (None, row["source"]):
            rows[Cell(*(row[name] for name in Cell.__dataclass_fields__))] = row
    return rows


# -- the page ----------------------------------------------------------------------------------------------


def page(rows: dict[Cell, dict[str, Any]], wanted: list[Cell], command: str, machine: str) -> str:
    """Everything as a page of Markdown."""
    own = {cell: rows[cell] for cell in wanted if cell in rows}
    single = [row for cell, row in own.items() if cell.part == "single"]
    amortized = [row for cell, row in own.items() if cell.part == "amortized"]
    commits = _counted(
        row["commit"] + ("" if row["clean"] else " WITH UNCOMMITTED CHANGES") for row in own.values()
    )
    lines = [
        "# C2ST of the defaults on the linear Gaussian",
        "",
        f"visbi {visbi.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{machine}: {processor()}, {os.cpu_count()} cores; one thread; "
        f"{datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}. Command: `{command}`.",
        f"Cells by the commit that they were made from: {commits}. "
        + (
            f"{len(own)} of {len(wanted)} cells are done."
            if len(own) < len(wanted)
            else "All cells are done."
        ),
        "",
        "C2ST: accuracy of a classifier, the larger of a network's and of boosted trees', between "
        f"{DRAWS} raw draws of q and {DRAWS} exact draws, five-fold; .5 is perfect, its standard error .008. "
        "Best: (1 + TV) / 2, what no classifier can exceed. "
        "Seconds: of CPU, for the training and its certificate. "
        "Nothing but `seed` and `show_progress_bar` is passed to train.",
        "",
    ]
    if single:
        lines += ["## train()", "", _verdict(single, SINGLE_TARGET), "", *_single_table(single), ""]
    if amortized:
        lines += [
            "## train_amortized()",
            "",
            _verdict(amortized, AMORTIZED_TARGET),
            "",
            "D = 2, family maf; 20 observations simulated at draws of the prior. Best of learnt: "
            "(1 + TV) / 2 between the posterior that the learnt potential has and the exact one, without q.",
            "",
            *_amortized_table(amortized),
            "",
        ]
    return "\n".join(lines)


def _verdict(rows: list[dict[str, Any]], target: float) -> str:
    worst = max(rows, key=lambda row: row["c2st"])
    missed = sum(row["c2st"] >= target for row in rows)
    outcome = "met by every cell" if not missed else f"MISSED by {missed} of {len(rows)} cells"
    name = f"{worst['name']} {worst['method']} D = {worst['dim']} seed {worst['seed']}"
    return f"Target C2ST < {target}: {outcome}. Worst: {worst['c2st']:.3f} ({name})."


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["method"], row["dim"]), []).append(row)
    return groups


def _single_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| family | objective | D | seeds | median C2ST | worst C2ST | worst best | steps | seconds "
        "| worst k-hat | status |",
        f"|{'---|' * 11}",
    ]
    for (name, method, dim), group in sorted(_grouped(rows).items(), key=_order):
        khats = [row["khat"] for row in group if row["khat"] is not None]
        khat = f"{max(khats):.2f}" if khats else "constant weights"
        lines.append(
            f"| {name} | {method} | {dim} | {len(group)} | {_median(group, 'c2st'):.3f} "
            f"| {max(row['c2st'] for row in group):.3f} "
            f"| {0.5 + 0.5 * max(row['variation'] for row in group):.3f} "
            f"| {_median(group, 'steps'):.0f} | {_median(group, 'cpu_seconds'):.0f} "
            f"| {khat} | {_counted(row['status'] for row in group)} |"
        )
    return lines


def _amortized_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| learnt | prior | seed | simulations | median C2ST | worst C2ST | median best of learnt "
        "| worst best of learnt | steps | seconds | seconds to learn |",
        f"|{'---|' * 11}",
    ]
    for row in rows:
        best = [0.5 + 0.5 * value for value in row["learnt_variation_each"]]
        lines.append(
            f"| {row['name']} | {row['method']} | {row['seed']} | {row['simulations']} "
            f"| {statistics.median(row['c2st_each']):.3f} | {row['c2st']:.3f} "
            f"| {statistics.median(best):.3f} | {max(best):.3f} "
            f"| {row['steps']} | {row['cpu_seconds']:.0f} | {row['learning_seconds']:.0f} |"
        )
    return lines


def _order(item: tuple[tuple[str, str, int], Any]) -> tuple[int, int, int]:
    name, method, dim = item[0]
    return FAMILY_NAMES.index(name), dim, METHODS.index(method)


def _median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _counted(values: Iterable[str]) -> str:
    found = list(values)
    return ", ".join(f"{value} ({found.count(value)})" for value in sorted(set(found)))


def main() -> None:
    """Measure what has not been measured and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument(
        "--names", nargs="+", choices=[*FAMILY_NAMES, *LEARNT], default=[*FAMILY_NAMES, *LEARNT]
    )
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PRIORS], default=[*METHODS, *PRIORS])
    parser.add_argument("--dims", nargs="+", type=int, default=[2, *OTHER_DIMENSIONS])
    parser.add_argument(
        "--any-source", action="store_true", help="keep cells of other sources; the page says so"
    )
    parser.add_argument("--redo", action="store_true", help="measure again what is done")
    parser.add_argument("--page-only", action="store_true", help="write the page from what there is")
    parser.add_argument("--machine", default="2-core shared x86 machine", help="its class, for the page")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "contract_c2st.jsonl"
    commit, source, clean = tree()
    wanted = cells(SEEDS[:1] if options.quick else SEEDS)
    rows = finished(path, None if options.any_source else source)
    asked = [
        cell
        for cell in wanted
        if cell.name in options.names and cell.method in options.methods and cell.dim in options.dims
    ]
    chosen = [cell for cell in asked if options.redo or cell not in rows]
    for cell in [] if options.page_only else chosen:
        row = {
            "source": source,
            "commit": commit,
            "clean": clean,
            "load": os.getloadavg()[0],
            **measure(cell),
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows[cell] = row
        print(
            f"{cell.name} {cell.method} D={cell.dim} seed {cell.seed}: C2ST {row['c2st']:.3f}, "
            f"{row['steps']} steps, {row['cell_cpu_seconds']:.0f} s",
            flush=True,
        )
    command = "python benchmarks/contract_c2st.py" + (" --quick" if options.quick else "")
    text = page(rows, wanted, command, options.machine)
    (options.output / "contract_c2st.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
