r"""The automatic fit beside the reference draws that the SBI benchmark carries, where likelihoods are known.

    gaussian_linear           D = 10, theta ~ N(0, .1 I), x = theta + N(0, .1 I)
    gaussian_linear_uniform   D = 10, theta ~ U([-1, 1]^10), the same x
    gaussian_mixture          D = 2, theta ~ U([-10, 10]^2), x from N(theta, I) or N(theta, .01 I)
    two_moons, slcp           as in `amortized_tasks.py`
    bernoulli_glm             D = 10, spikes y_t ~ Bernoulli(sigmoid(V theta)_t), t = 1 ... 100
    sir                       D = 2, log-normal; infected of 1,000 tested every 17 days of an epidemic
    lotka_volterra            D = 4, log-normal; prey and predators every 2.1 years, log-normal errors of .1

Its tasks with raw spikes and with distractors have the posteriors of those above. Observations 1 to 3 of its
ten are used. 2000 draws, as they come and of q alone, against as many of the 10,000 reference draws.

Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke: Benchmarking simulation-based inference. AISTATS 2021;
observations and draws from its package `sbibm`, likelihoods in code of our own.

    make sbibm
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Binomial,
    Distribution,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
)

from amortized_tasks import amortized_task, glm_precision
from auto_fit import source_state
from step_time import processor
from visbi import BoxUniform, VIPosterior
from visbi.certificate import c2st
from visbi.core.random import seeded
from visbi.simulators.zoo.lotka_volterra import log_populations

HERE = Path(__file__).parent
OBSERVATIONS, SEEDS, DRAWS = (1, 2, 3), (0, 1, 2), 2000
_DAYS, _STEPS = 17.0, 34  # between visits of an epidemic, and of its solver
_YEARS = 2.1  # between counts of prey and predators
_COLUMNS = (
    "task",
    "fits",
    "C2ST of q",
    "C2ST of draws",
    "worst",
    "status",
    "CPU s",
    "worst",
    "evaluations, worst",
    "rung",
)


@dataclass(frozen=True, eq=False)
class Known:
    """A prior over theta (D,), and the likelihood of an observation of the package.

    Attributes:
        log_likelihood: theta (N, D), x (1, K), folder of the task's files -> (N,).
        observation: file in an observation's folder.
    """

    prior: Distribution
    log_likelihood: Callable[[Tensor, Tensor, Path], Tensor]
    observation: str = "observation.csv"


def _gaussian_mixture(theta: Tensor, x: Tensor, _: Path) -> Tensor:
    square = (x - theta).square().sum(-1)
    return torch.logaddexp(-0.5 * square, -50 * square + math.log(100.0))


@cache
def _design(files: Path) -> Tensor:
    return torch.load(files / "design_matrix.pt", weights_only=True)


def _bernoulli(theta: Tensor, x: Tensor, files: Path) -> Tensor:
    drive = theta @ _design(files).to(theta).T
    return (x * drive - torch.nn.functional.softplus(drive)).sum(-1)


def _epidemic(theta: Tensor, x: Tensor, _: Path) -> Tensor:
    """A million people, one infected: dS/dt = -b S I, dI/dt = b S I - c I in shares of all."""
    contact, recovery = theta.double().unbind(-1)

    def slope(log_s: Tensor, log_i: Tensor) -> tuple[Tensor, Tensor]:
        return -contact * log_i.exp(), contact * log_s.exp() - recovery

    log_s = torch.full_like(contact, math.log1p(-1e-6))
    log_i, infected = torch.full_like(contact, math.log(1e-6)), []
    for _visit in range(x.shape[-1]):
        infected.append(log_i)
        for _step in range(_STEPS):  # Runge-Kutta of order four
            h = _DAYS / _STEPS
            one = slope(log_s, log_i)
            two = slope(log_s + h / 2 * one[0], log_i + h / 2 * one[1])
            three = slope(log_s + h / 2 * two[0], log_i + h / 2 * two[1])
            four = slope(log_s + h * three[0], log_i + h * three[1])
            log_s, log_i = (
                y + h / 6 * (a + 2 * b + 2 * c + d)
                for y, a, b, c, d in zip((log_s, log_i), one, two, three, four, strict=True)
            )
    share = torch.stack(infected, -1).exp().nan_to_num(0.0).clamp(1e-30, 1 - 1e-12)
    return Binomial(1000, share, validate_args=False).log_prob(x.double()).sum(-1)


def _predators(theta: Tensor, x: Tensor, _: Path) -> Tensor:
    """Thirty prey and one predator at first; a year of the solver's is 2.1 of theirs."""
    start = torch.tensor([30.0, 1.0]).to(theta).expand(len(theta), 2)
    mean = log_populations(torch.cat([_YEARS * theta, start], 1), x.shape[-1] // 2 - 1).mT.flatten(1)
    return -0.5 * ((x.double().log() - mean) / 0.1).square().sum(-1)


def _as_amortised(name: str) -> Known:
    """A task that amortised fits are measured on, too."""
    task = amortized_task(name)
    return Known(task.prior, lambda theta, x, _: task.log_likelihood(theta, x[0]))


def tasks() -> dict[str, Known]:
    """Those with a likelihood of their own."""
    corner, uniform = torch.ones(10), _as_amortised("gaussian_linear_uniform")
    return {
        "gaussian_linear": replace(
            uniform, prior=Independent(Normal(torch.zeros(10), math.sqrt(0.1) * corner), 1)
        ),
        "gaussian_linear_uniform": uniform,
        "gaussian_mixture": Known(BoxUniform(-10 * corner[:2], 10 * corner[:2]), _gaussian_mixture),
        "two_moons": _as_amortised("two_moons"),
        "slcp": _as_amortised("slcp"),
        "bernoulli_glm": Known(
            MultivariateNormal(torch.zeros(10), precision_matrix=glm_precision()),
            _bernoulli,
            "observation_raw.csv",
        ),
        "sir": Known(_log_normal([math.log(0.4), math.log(0.125)], [0.5, 0.2]), _epidemic),
        "lotka_volterra": Known(_log_normal([-0.125, -3.0, -0.125, -3.0], [0.5] * 4), _predators),
    }


def _log_normal(loc: list[float], scale: list[float]) -> Distribution:
    return Independent(LogNormal(torch.tensor(loc), torch.tensor(scale)), 1)


def observed(files: Path, known: Known, number: int) -> tuple[Tensor, Tensor]:
    """An observation (1, K) and the reference draws (10,000, D) of its posterior."""
    folder = files / f"num_observation_{number}"
    x = np.loadtxt(folder / known.observation, delimiter=",", skiprows=1, ndmin=2)
    theta = np.loadtxt(folder / "reference_posterior_samples.csv.bz2", delimiter=",", skiprows=1)
    return torch.from_numpy(x), torch.from_numpy(theta)


def measure(package: Path, name: str, known: Known, number: int, seed: int) -> dict[str, Any]:
    """One fit and its scores."""
    files = package / "tasks" / name / "files"
    x, reference = observed(files, known, number)

    def log_joint(theta: Tensor, x_o: Tensor) -> Tensor:
        return known.log_likelihood(theta, x_o.to(theta), files) + known.prior.log_prob(theta)

    posterior = VIPosterior(log_joint, known.prior, q="auto")
    began = time.process_time()
    posterior.train(x.float(), seed=seed, show_progress_bar=False, allow_failed=True)
    with seeded(seed):
        draws = posterior.sample((DRAWS,))
        seconds = time.process_time() - began
        raw = posterior.sample((DRAWS,), correct=False)
        some = reference[torch.randperm(len(reference))[:DRAWS]]
    report = posterior.report
    return {
        "task": name,
        "observation": number,
        "seed": seed,
        "c2st": c2st(draws, some),
        "raw": c2st(raw, some),
        "status": report.status,
        "rung": report.rung,
        "evaluations": report.n_values + report.n_gradients,
        "cpu_seconds": seconds,
        "processor": processor(),
        "source": source_state(),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "# The automatic fit beside reference draws of the SBI benchmark",
        "",
        f"C2ST of {DRAWS} draws against as many of the reference draws that `sbibm` 1.1.0 carries, exact "
        f"likelihoods, observations {', '.join(map(str, OBSERVATIONS))}, seeds {_seeds(rows)}; .5 is "
        "perfect, noise about .01. CPU seconds of one thread, the first draws included; evaluations of the "
        "potential, gradients included.",
        f"{', '.join(sorted({row['processor'] for row in rows}))}; tree of src/: "
        f"{', '.join(sorted({row['source'] for row in rows}))}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for name in tasks():
        own = [row for row in rows if row["task"] == name]
        if not own:
            continue
        statuses, rungs = ([row[key] for row in own] for key in ("status", "rung"))
        counts = ", ".join(f"{each} x {statuses.count(each)}" for each in sorted(set(statuses)))
        cells = [
            name,
            str(len(own)),
            f"{statistics.median(row['raw'] for row in own):.3f}",
            f"{statistics.median(row['c2st'] for row in own):.3f}",
            f"{max(row['c2st'] for row in own):.3f}",
            counts,
            f"{statistics.median(row['cpu_seconds'] for row in own):.2f}",
            f"{max(row['cpu_seconds'] for row in own):.2f}",
            f"{max(row['evaluations'] for row in own):,}",
            ", ".join(sorted(set(rungs))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seeds(rows: list[dict[str, Any]]) -> str:
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


def main() -> None:
    """Fit all, and write the lines and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", type=Path, help="folder of sbibm; else that of .venvs/sbibm")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks()), default=list(tasks()))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = options.package or next((HERE.parent / ".venvs/sbibm").glob("lib/python*/site-packages/sbibm"))
    rows = []
    for name in options.tasks:
        for number in OBSERVATIONS:
            for seed in options.seeds:
                rows.append(measure(package, name, tasks()[name], number, seed))
                print(*(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sbibm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (options.output / "sbibm.md").write_text(page(rows))


if __name__ == "__main__":
    main()
