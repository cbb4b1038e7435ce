"""Amortised fits from 10,000 simulations: draws of q(theta | x) at held-out x, raw and corrected.

For each task of `amortized_tasks.py`: simulate, learn the likelihood (`fit_likelihood` as it comes), train
q(theta | x) on the same simulations, let the last 500 of the 10,000, which neither has seen, say how much of
each corrected draws are made of (`stack`), and judge q at 20 x that no fit has seen by C2ST of 2000 draws
against exact ones, raw and after `sample(..., correct=True)`. `exact`
corrects with the simulator's own likelihood instead, which takes the error of the learnt one out. `sbi` is
the ELBO of sbi's `train_amortized` with its defaults through the same learnt likelihood.

Each observation is a line of `results/amortized.jsonl`, written as it ends, and is not run again; networks
and posteriors lie in benchmarks/cache/amortized/, which git ignores.

    make amortized
"""

import argparse
import json
import statistics
import subprocess
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amortized_tasks import TASKS, AmortizedTask, amortized_task
from auto_fit import ONE_THREAD, SOURCE, source_state
from auto_fit_page import read_rows
from step_time import processor
from visbi import VIPosterior
from visbi.certificate import c2st
from visbi.core.random import seeded
from visbi.estimators import fit_likelihood
from visbi.fitting.state import AmortizedFit
from visbi.potentials import LikelihoodPotential
from visbi.simulators import simulate

HERE = Path(__file__).parent
CACHE = HERE / "cache" / "amortized"
SIMULATIONS, UNSEEN, OBSERVATIONS, DRAWS = 10_000, 500, 20, 2000
_OBSERVATION_SEED, _REFERENCE_SEED = 5_000, 6_000
_FORWARD = dict(objective="forward", flow_type="coupling", batch_size=200, learning_rate=5e-3, gamma=0.98)
METHODS: dict[str, dict[str, Any]] = {
    "forward": _FORWARD,
    "forward, four networks": _FORWARD,
    "mixed": {**_FORWARD, "objective": "mixed", "n_particles": 16},
    "elbo": {},  # the published behaviour, its defaults
    "sbi": {},
}
NETWORKS = {"forward, four networks": 4}  # whose mean the likelihood is; one elsewhere
EXACT = "+exact"  # after a method's name, in lines about draws corrected with the exact likelihood
PUBLISHED = {  # mean C2ST of 10 observations at 10,000 simulations, Lueckmann et al. 2021
    "two_moons": {"NLE": 0.713, "SNLE": 0.571, "SNPE": 0.554},
    "slcp": {"NLE": 0.771, "SNLE": 0.713},
    "bernoulli_glm": {"NLE": 0.605, "SNLE": 0.553},
}
Row = dict[str, Any]


def simulations(task: AmortizedTask, seed: int, *, unseen: bool = False) -> tuple[Tensor, Tensor]:
    """theta and x that q and the likelihood learn from, or those that they do not see."""
    runs = simulate(task.simulator, task.prior, SIMULATIONS, seed=seed, show_progress_bar=False)
    rows = slice(SIMULATIONS - UNSEEN, None) if unseen else slice(SIMULATIONS - UNSEEN)
    return runs.theta[rows], runs.x[rows]


def observations(task: AmortizedTask) -> Tensor:
    """The x (M, K) that q is judged at: the same for every seed."""
    runs = simulate(task.simulator, task.prior, OBSERVATIONS, seed=_OBSERVATION_SEED, show_progress_bar=False)
    return runs.x


def learnt(task: AmortizedTask, seed: int, networks: int = 1) -> tuple[LikelihoodPotential, float]:
    """The learnt likelihood's potential, and the CPU seconds that it took."""
    path = CACHE / f"{task.name}_{seed}_nle{networks if networks > 1 else ''}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        trained = fit_likelihood(
            *simulations(task, seed), ensemble=networks, seed=seed, show_progress_bar=False
        )
        torch.save((trained.estimator, time.process_time() - began), path)
    estimator, seconds = torch.load(path, weights_only=False)
    return LikelihoodPotential(estimator, task.prior), seconds


def fitted(task: AmortizedTask, method: str, seed: int) -> VIPosterior:
    """q(theta | x), trained if the cache has none; its `seconds` of CPU stand beside it."""
    path = CACHE / f"{task.name}_{seed}_{method}.visbi"
    if not path.exists():
        posterior = VIPosterior(learnt(task, seed, NETWORKS.get(method, 1))[0], task.prior)
        began = time.process_time()
        posterior.train_amortized(
            *simulations(task, seed), seed=seed, show_progress_bar=False, **METHODS[method]
        )
        with seeded(seed):
            posterior.stack(*simulations(task, seed, unseen=True))
        seconds = time.process_time() - began
        posterior.save(path)
        path.with_suffix(".json").write_text(json.dumps(seconds))
    return VIPosterior.load(path)


def about_fit(task: AmortizedTask, method: str, seed: int) -> Row:
    """How the fit went."""
    posterior = fitted(task, method, seed)
    fit = posterior._state
    assert isinstance(fit, AmortizedFit)
    trace = fit.trace
    return {
        "seconds": json.loads((CACHE / f"{task.name}_{seed}_{method}.json").read_text()),
        "nle_seconds": learnt(task, seed, NETWORKS.get(method, 1))[1],
        "learning_rate": fit.options.learning_rate,
        "gamma": fit.options.gamma,
        "iterations": trace.num_iters,
        "held_out": min(trace.validation_loss),
        "share": fit.share,
        "stop": trace.stop_reason,
    }


def judged(task: AmortizedTask, method: str, seed: int, number: int) -> Row:
    """One observation's scores."""
    x = observations(task)[number]
    posterior = fitted(task, method, seed)
    reference = task.sample(x, DRAWS, _REFERENCE_SEED + number)
    row: Row = {"variation": learnt_variation(task, posterior.potential_fn, reference, x)}
    with seeded(seed):
        report = posterior.certify(x)[0]
    row["report"] = {
        k: v for k, v in asdict(report).items() if isinstance(v, str | int | float) and k != "sentence"
    }
    with seeded(seed):
        row["raw"] = c2st(posterior.sample((DRAWS,), x), reference)
    began = time.process_time()
    with warnings.catch_warnings(record=True) as heard, seeded(seed):
        warnings.simplefilter("always")
        corrected = posterior.sample((DRAWS,), x, correct=True)
    row["correct_seconds"] = time.process_time() - began
    row["flagged"] = any("not certified" in str(warning.message) for warning in heard)
    row["corrected"] = c2st(corrected, reference)
    return row


def judged_exactly(task: AmortizedTask, method: str, seed: int, number: int) -> Row:
    """The score of draws corrected with the simulator's own likelihood."""
    x = observations(task)[number]
    own = VIPosterior(lambda theta, x: task.log_likelihood(theta, x) + task.prior.log_prob(theta), task.prior)
    own._state = replace(fitted(task, method, seed)._state, share=1.0)
    with warnings.catch_warnings(record=True) as heard, seeded(seed):
        warnings.simplefilter("always")
        theta = own.sample((DRAWS,), x, correct=True)
    flagged = any("not certified" in str(warning.message) for warning in heard)
    with seeded(seed):
        status = own.certify(x)[0].status
    reference = task.sample(x, DRAWS, _REFERENCE_SEED + number)
    return {"exact": c2st(theta, reference), "flagged": flagged, "status": status}


def learnt_variation(task: AmortizedTask, potential: Any, exact: Tensor, x: Tensor) -> float:
    """Total variation between the learnt potential's posterior and the exact one, from exact draws."""
    theta = exact.float()
    with torch.no_grad():
        log_p = potential.evaluate(theta, x[None]) - task.prior.log_prob(theta)
        log_r = log_p.double() - task.log_likelihood(exact, x.double())
    r = torch.softmax(log_r.nan_to_num(-torch.inf), 0) * len(log_r)
    return float((1.0 - r).clamp_min(0).mean())


def run_sbi(task: AmortizedTask, seed: int, python: str) -> tuple[Row, np.ndarray | None]:
    """What sbi's fit says, and its draws (M, DRAWS, D) at all observations; kept in the cache."""
    path = CACHE / f"{task.name}_{seed}_sbi.npz"
    if not path.with_suffix(".json").exists():
        learnt(task, seed)
        given = CACHE / f"{task.name}_{seed}_given.npz"
        theta, x = simulations(task, seed)
        np.savez(given, theta=theta.numpy(), x=x.numpy(), at=observations(task).numpy())
        arguments = [task.name, str(seed), str(given), str(path), str(CACHE / f"{task.name}_{seed}_nle.pt")]
        worker = str(HERE / "workers" / "amortized_sbi_worker.py")
        done = subprocess.run(
            [python, worker, *arguments],
            capture_output=True,
            text=True,
            env={**ONE_THREAD, "PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin"},
        )
        last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
        row = json.loads(last[0]) if last else {"error": _reason(done.stderr)}
        path.with_suffix(".json").write_text(json.dumps(row))
    row = json.loads(path.with_suffix(".json").read_text())
    return row, None if "error" in row else np.load(path)["draws"]


def sbi_cell(task: AmortizedTask, seed: int, number: int | None, python: str) -> Row:
    """One line about sbi."""
    about, draws = run_sbi(task, seed, python)
    if number is None or draws is None:
        return about
    reference = task.sample(observations(task)[number], DRAWS, _REFERENCE_SEED + number)
    theta = torch.from_numpy(draws[number])
    return {"raw": c2st(theta, reference) if bool(theta.isfinite().all()) else 1.0}


def page(rows: list[Row]) -> str:
    """The table in Markdown."""
    head = (
        "raw | corrected | with the exact likelihood | raw > .55 | of these .02 better | ok, corrected, else"
    )
    lines = [
        "# Amortised fits from 10,000 simulations",
        "",
        "Mean C2ST over held-out observations (the worst) of 2000 draws against exact ones; .5 is perfect. "
        "`NLE` is the best that draws of the learnt likelihood's posterior could have, (1 + TV) / 2, as far "
        "as exact draws see it (mass that it has where they have none is not counted). `corrected` draws are "
        "those of its posterior to the power a times q to the power 1 - a, where 500 of the simulations, "
        "which neither was trained on, say how large `a` is (`stack`). `with the exact likelihood`: weighed "
        "with the simulator's. "
        "Published: mean C2ST of MCMC on neural likelihoods and of neural posteriors, 10,000 simulations, "
        "other observations (Lueckmann et al. 2021).",
        f"{', '.join(sorted({row['processor'] for row in rows}))}; CPU seconds of one thread, with much "
        "other work beside it.",
        "",
        f"| task | method | seeds | x | CPU s of q (of NLE) | NLE | a | {head} | published |",
        f"|{'---|' * 14}",
    ]
    for name in TASKS:
        for method in METHODS:
            own = [row for row in rows if (row["task"], row["method"]) == (name, method)]
            exact = [row for row in rows if (row["task"], row["method"]) == (name, method + EXACT)]
            if own:
                rates = {f"{row['learning_rate']:g}" for row in own if "learning_rate" in row}
                label = method + "".join(f", learning rate {rate}" for rate in sorted(rates))
                lines.append(f"| {' | '.join([name, label, *_cells(own, exact, name)])} |")
    return "\n".join(lines) + "\n"


def _cells(rows: list[Row], exact: list[Row], name: str) -> list[str]:
    fits, each = ([r for r in rows if (r["x"] is None) is whole] for whole in (True, False))
    errors = [row["error"] for row in fits if "error" in row]
    seconds = [
        f"{row['seconds']:.0f} ({row.get('nle_seconds', float('nan')):.0f})"
        for row in fits
        if "seconds" in row
    ]
    if errors:
        return [str(len(fits)), "-", "-", "-", "-", errors[0], *["-"] * 5, _published(name)]
    poor = [row for row in each if row.get("raw", 0) > 0.55 and "corrected" in row]
    better = [row for row in poor if row["raw"] - row["corrected"] >= 0.02]
    status = [row["report"]["status"] for row in each if "report" in row]
    counts = [status.count("ok"), status.count("corrected")]
    return [
        str(len(fits)),
        str(len(each)),
        ", ".join(seconds) or "-",
        _mean([{"value": (1 + row["variation"]) / 2} for row in each if "variation" in row], "value"),
        ", ".join(f"{row['share']:.2f}" for row in fits if "share" in row) or "-",
        *(_mean(each, column) for column in ("raw", "corrected")),
        _mean(exact, "exact") + (f" at {len(exact)} x" if exact else ""),
        str(len(poor)) if status else "-",
        str(len(better)) if status else "-",
        f"{counts[0]}, {counts[1]}, {len(status) - sum(counts)}" if status else "-",
        _published(name),
    ]


def _reason(error: str) -> str:
    """The line of a traceback that says what was wrong."""
    lines = error.strip().splitlines() or ["no answer"]
    return next((line for line in lines if line.split(":")[0].endswith("Error")), lines[-1])[:90]


def _mean(rows: list[Row], column: str) -> str:
    values = [row[column] for row in rows if column in row]
    return f"{statistics.mean(values):.3f} ({max(values):.3f})" if values else "-"


def _published(name: str) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in PUBLISHED.get(name, {}).items()) or "-"


def main() -> None:
    """Run what is asked for and not there yet, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--observations", type=int, default=OBSERVATIONS)
    parser.add_argument(
        "--exact", action="store_true", help="correct the fits that are there with the exact likelihood"
    )
    parser.add_argument("--sbi-python")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, source = options.output / "amortized.jsonl", source_state()
    cells = [
        (name, method, seed, x)
        for seed in options.seeds
        for method in options.methods
        for name in options.tasks
        for x in (None, *range(options.observations))
    ]
    if options.exact:
        cells = [(n, method + EXACT, s, x) for n, method, s, x in cells if method != "sbi" and x is not None]
    for name, method, seed, x in [] if options.page_only else cells:
        cell = {"task": name, "method": method, "seed": seed, "x": x}
        if any(all(row[k] == v for k, v in cell.items()) for row in read_rows(path)):
            continue
        task = amortized_task(name)
        if method == "sbi":
            if options.sbi_python is None:
                parser.error("sbi needs --sbi-python")
            row = sbi_cell(task, seed, x, options.sbi_python)
        elif x is None:
            row = about_fit(task, method, seed)
        elif method.endswith(EXACT):
            row = judged_exactly(task, method.removesuffix(EXACT), seed, x)
        else:
            row = judged(task, method, seed, x)
        row = {**cell, **row, "processor": processor(), "source": source}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            json.dumps(
                {k: row[k] for k in row if k in (*cell, "raw", "corrected", "exact", "seconds", "error")}
            )
        )
    (options.output / "amortized.md").write_text(page(read_rows(path)))


if __name__ == "__main__":
    main()
