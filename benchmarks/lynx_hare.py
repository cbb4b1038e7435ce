"""Two fits of the lynx-hare posterior beside long NUTS: from the exact likelihood and from simulations alone.

For each seed and parameter: how far the mean is off, in units of the reference's sd, and the ratio of the
sds. Both come from 100,000 corrected draws. Both fits are those of `visbi demo`. The reference,
`data/lynx_hare_reference.json`, is made by `reference_lynx_hare.py`.

    make lynx-hare
"""

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import visbi
from step_time import processor
from visbi.core.random import seeded
from visbi.demo import FULL, exact_posterior, simulation_posterior
from visbi.posterior import VIPosterior
from visbi.simulators.zoo import lynx_hare
from visbi.simulators.zoo.task import Task

HERE = Path(__file__).parent
DRAWS = 100_000
FITS = {"exact": "exact likelihood", "simulations": "simulations alone"}
# of the exact fit: sds by which a mean, and the share by which an sd, may be off
MEAN_TARGET, SD_TARGET = 0.1, 0.1


def fit(kind: str, task: Task, seed: int) -> tuple[VIPosterior, int]:
    """The posterior of one kind and how many runs of the simulator it took."""
    if kind == "exact":
        return exact_posterior(task, FULL, seed=seed, show_progress_bar=False), 0
    inference = simulation_posterior(task, FULL, seed=seed, workers=1)
    return inference.posterior, inference.n_simulations


def moments(draws: Tensor, reference: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per parameter: the mean's distance from the reference's in its sds, and the ratio of the sds."""
    means, sds = draws.double().mean(0).tolist(), draws.double().std(0).tolist()
    rows = {}
    for name, mean, sd in zip(reference["order"], means, sds, strict=True):
        truth = reference["parameters"][name]
        rows[name] = {"mean_off": (mean - truth["mean"]) / truth["sd"], "sd_ratio": sd / truth["sd"]}
    return rows


def measure(kind: str, task: Task, seed: int, reference: dict[str, Any]) -> dict[str, Any]:
    """One fit and all that the page says about it."""
    began, worked = time.perf_counter(), time.process_time()
    posterior, simulations = fit(kind, task, seed)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    report = asdict(posterior.report)
    with seeded(seed):
        parameters = moments(posterior.sample((DRAWS,)), reference)
    return {
        "fit": kind,
        "seed": seed,
        "simulations": simulations,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "report": report,
        "worst_mean_off": max((p["mean_off"] for p in parameters.values()), key=abs),
        "worst_sd_ratio": max((p["sd_ratio"] for p in parameters.values()), key=lambda ratio: abs(ratio - 1)),
        "parameters": parameters,
    }


def worst(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per kind of fit the worst over parameters and seeds."""
    result = {}
    for kind in FITS:
        own = [row for row in rows if row["fit"] == kind]
        if own:
            result[kind] = {
                "mean_off": max((row["worst_mean_off"] for row in own), key=abs),
                "sd_ratio": max((row["worst_sd_ratio"] for row in own), key=lambda ratio: abs(ratio - 1)),
            }
    return result


def earlier(output: Path, commit: str) -> list[dict[str, Any]]:
    """The rows that a former run at the same commit has left in `output`."""
    path = output / "lynx_hare.json"
    former = json.loads(path.read_text()) if path.exists() else {"commit": None}
    return former["rows"] if former["commit"] == commit else []


def source() -> tuple[str, bool]:
    """The commit, and whether src/ and this script are as committed."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return commit, not _git("status", "--porcelain", "--", "src", "benchmarks/lynx_hare.py")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def page(result: dict[str, Any], reference: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    evidence = reference["log_evidence"]
    tree = "src/ as committed" if result["clean"] else "WITH UNCOMMITTED CHANGES in src/"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Lynx and hare: visbi beside long NUTS",
        "",
        "Posterior of 8 parameters. Mean off: (mean of q - mean of NUTS) / sd of NUTS. "
        f"Ratio: sd of q / sd of NUTS. {DRAWS} corrected draws for each row; "
        "their noise and the reference's is about 0.006 sd. "
        "Seconds: simulating, learning, fitting, certifying; by the clock, which other work on the machine "
        "slows, and of CPU.",
        f"Reference: {reference['chains']} NUTS chains of {reference['draws_per_chain']} draws; "
        f"log-evidence of the log counts {evidence['value_of_log_counts']:.3f} "
        f"+- {evidence['standard_error']:.3f}.",
        f"{versions}; commit {result['commit']}, {tree}; {result['machine']}: {result['processor']}, "
        f"{result['cores']} cores; one thread; {result['when']}; load average "
        f"{result['load_before']:.1f} before, {result['load_after']:.1f} after.",
        f"Settings: {result['settings']}.",
        "",
        "| likelihood | seed | simulations | seconds | of CPU | worst mean off | worst ratio of sd "
        "| status | k-hat | ESS % | log-evidence |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        report = row["report"]
        lines.append(
            f"| {FITS[row['fit']]} | {row['seed']} | {row['simulations'] or '-'} | {row['seconds']:.0f} "
            f"| {row['cpu_seconds']:.0f} "
            f"| {row['worst_mean_off']:+.3f} | {row['worst_sd_ratio']:.3f} "
            f"| {report['status']} | {report['khat']:.2f} | {100 * report['ess_fraction']:.0f} "
            f"| {report['log_evidence']:.3f} |"
        )
    for kind, extreme in result["worst"].items():
        lines.append(
            f"| **{FITS[kind]}** | **all** | | | "
            f"| **{extreme['mean_off']:+.3f}** | **{extreme['sd_ratio']:.3f}** | | | | |"
        )
    lines += ["", _verdict(result["worst"]), ""]
    lines += [
        "Status, k-hat, ESS and log-evidence belong to the likelihood that q was fitted to; "
        "where it was learnt, they do not say how well.",
        "",
    ]
    for kind in result["worst"]:
        lines += [f"## {FITS[kind].capitalize()}, by parameter", "", *_by_parameter(kind, result["rows"]), ""]
    return "\n".join(lines)


def _verdict(extremes: dict[str, dict[str, float]]) -> str:
    target = f"every mean within {MEAN_TARGET} sd and every sd within {SD_TARGET:.0%}"
    if "exact" not in extremes:
        return f"Target for the exact likelihood ({target}): not measured."
    off, ratio = extremes["exact"]["mean_off"], extremes["exact"]["sd_ratio"]
    met = abs(off) <= MEAN_TARGET and abs(ratio - 1) <= SD_TARGET
    return f"Target for the exact likelihood ({target}): {'met' if met else 'MISSED'}."


def _by_parameter(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    own = {row["seed"]: row["parameters"] for row in rows if row["fit"] == kind}
    heads = [f"mean off, seed {seed}" for seed in own] + [f"ratio of sd, seed {seed}" for seed in own]
    lines = [f"| parameter | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for name in next(iter(own.values())):
        cells = [f"{own[seed][name]['mean_off']:+.3f}" for seed in own]
        cells += [f"{own[seed][name]['sd_ratio']:.3f}" for seed in own]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Fit everything and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fits", nargs="+", choices=list(FITS), default=list(FITS))
    parser.add_argument("--machine", default="2-core shared x86 machine", help="its class, for the page")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--add", action="store_true", help="keep what the output has of the same commit")
    options = parser.parse_args()

    torch.set_num_threads(1)
    reference = json.loads((HERE / "data" / "lynx_hare_reference.json").read_text())
    task = lynx_hare.task()
    commit, clean = source()
    load_before = os.getloadavg()[0]
    rows = earlier(options.output, commit) if options.add else []
    for kind in options.fits:
        for seed in options.seeds:
            row = measure(kind, task, seed, reference)
            print(
                f"{FITS[kind]}, seed {seed}: mean off {row['worst_mean_off']:+.3f} sd, "
                f"ratio {row['worst_sd_ratio']:.3f}, {row['report']['status']}, {row['seconds']:.0f} s",
                flush=True,
            )
            rows = [r for r in rows if (r["fit"], r["seed"]) != (kind, seed)] + [row]
    rows.sort(key=lambda row: (list(FITS).index(row["fit"]), row["seed"]))
    result = {
        "what": "lynx-hare posterior by visbi beside long NUTS",
        "commit": commit,
        "clean": clean,
        "versions": {
            "visbi": visbi.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": options.machine,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "settings": str(FULL),
        "draws": DRAWS,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "worst": worst(rows),
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "lynx_hare.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "lynx_hare.md").write_text(page(result, reference))
    print(page(result, reference))


if __name__ == "__main__":
    main()
