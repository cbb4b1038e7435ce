"""Fits one target with one tool of the torch world, in that tool's environment; driven by ../auto_fit.py.

    auto_fit_worker.py TOOL TARGET SEED DRAWS.npz

TOOL is `visbi` (q="auto"), `visbi-FAMILY`, or `sbi-FAMILY-METHOD`, each with the tool's own defaults, or
`exact`: other exact draws, which show what scores can be had. Draws go to the file: `draws`, and for visbi
`raw`, those of q before they are corrected. A first fit, of a Gaussian by the same family, loads what a tool
loads on first use and is not timed. One JSON line says what it took: seconds of this process's CPU and of the
clock for `train` and for the first 2000 draws, rows of theta at which the potential was evaluated with and
without gradient, and the report.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

sys.path.insert(0, str(Path(__file__).parents[1]))
from targets import Target, target

MODULES = {"sbi": "sbi.inference.posteriors.vi_posterior", "visbi": "visbi", "exact": "visbi"}
DRAWS = 2000


class Counted:
    """A potential that counts the rows at which it was evaluated."""

    def __init__(self, potential: Callable[..., Tensor]) -> None:
        self.potential = potential
        self.values = 0
        self.gradients = 0

    def __call__(self, theta: Tensor, x_o: Tensor | None = None) -> Tensor:
        if theta.requires_grad and torch.is_grad_enabled():
            self.gradients += len(theta)
        else:
            self.values += len(theta)
        return self.potential(theta, x_o)


class Clock:
    """Seconds of CPU and of the wall since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """CPU seconds, wall seconds."""
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


def plain(value: Any) -> Any:
    """What JSON can hold of a report's entry."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return str(value)


def report_of(posterior: Any) -> dict[str, Any]:
    """The report as plain values; empty where a tool has none."""
    report = getattr(posterior, "report", None)
    if report is None or not is_dataclass(report) or isinstance(report, type):
        return {}
    return {name: plain(value) for name, value in asdict(report).items()}


def exact_draws(goal: Target, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Nothing fitted, nothing counted: draws of another seed than the reference's."""
    zero = dict.fromkeys(["cpu_seconds", "seconds", "draw_cpu_seconds", "draw_seconds"], 0.0)
    return {**zero, "n_values": 0, "n_gradients": 0}, {"draws": goal.sample(DRAWS, 5000 + seed)}


def warm_up(package: str, family: str) -> None:
    """Fit a planar Gaussian by the same family and draw from it: what is loaded on use is not measured."""

    def potential(theta: Tensor, x_o: Tensor | None = None) -> Tensor:
        return -0.5 * theta.square().sum(-1)

    prior = Independent(Normal(torch.zeros(2), 2 * torch.ones(2)), 1)
    vi_posterior = importlib.import_module(MODULES[package]).VIPosterior
    posterior = vi_posterior(potential, prior, q=family)
    posterior.set_default_x(torch.zeros(1, 1))
    short = {} if family == "auto" else {"max_num_iters": 2, "quality_control": False}
    with contextlib.redirect_stdout(io.StringIO()):
        posterior.train(**short, show_progress_bar=False)
        posterior.evaluate()
        posterior.sample((1,))


def fit_visbi(goal: Target, family: str, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """visbi: what it took, and draws as they come and of q alone."""
    from visbi import VIPosterior
    from visbi.core.random import seeded

    counted = Counted(goal.potential)
    clock = Clock()
    posterior = VIPosterior(counted, goal.prior, q=family)
    options = {"allow_failed": True} if family == "auto" else {}
    posterior.train(torch.zeros(1, 1), seed=seed, show_progress_bar=False, **options)
    cpu, wall = clock.read()
    fit_rows = counted.values, counted.gradients
    clock = Clock()
    with seeded(seed):
        draws = posterior.sample((DRAWS,))
        drawing, drawing_wall = clock.read()
        rows = counted.values, counted.gradients
        raw = posterior.sample((DRAWS,), correct=False) if family == "auto" else draws
    result = {
        "cpu_seconds": cpu,
        "seconds": wall,
        "draw_cpu_seconds": drawing,
        "draw_seconds": drawing_wall,
        "fit_values": fit_rows[0],
        "fit_gradients": fit_rows[1],
        "n_values": rows[0],
        "n_gradients": rows[1],
        "report": report_of(posterior),
    }
    return result, {"draws": draws, "raw": raw}


def fit_sbi(goal: Target, family: str, method: str, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """sbi: what it took, and draws of q."""
    vi_posterior = importlib.import_module(MODULES["sbi"]).VIPosterior
    counted = Counted(goal.potential)
    torch.manual_seed(seed)
    clock = Clock()
    posterior = vi_posterior(counted, goal.prior, q=family, vi_method=method)
    posterior.set_default_x(torch.zeros(1, 1))  # its quality control asks for one
    with contextlib.redirect_stdout(io.StringIO()) as said:
        posterior.train(show_progress_bar=False)
    cpu, wall = clock.read()
    fit_rows = counted.values, counted.gradients
    clock = Clock()
    draws = posterior.sample((DRAWS,))
    drawing, drawing_wall = clock.read()
    result = {
        "cpu_seconds": cpu,
        "seconds": wall,
        "draw_cpu_seconds": drawing,
        "draw_seconds": drawing_wall,
        "fit_values": fit_rows[0],
        "fit_gradients": fit_rows[1],
        "n_values": counted.values,
        "n_gradients": counted.gradients,
        "report": {},
        "said": said.getvalue()[-300:],
    }
    return result, {"draws": draws}


def main() -> None:
    """Fit, save the draws, print the line."""
    tool, name, seed, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    answer = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # what a tool prints must not reach the driver
    torch.set_num_threads(1)
    package, *rest = (tool if "-" in tool else f"{tool}-auto").split("-")
    module = importlib.import_module(MODULES[package])
    goal = target(name)
    caught: list[str] = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if package == "exact":
            result, draws = exact_draws(goal, seed)
        else:
            warm_up(package, rest[0])
            result, draws = (
                fit_visbi(goal, rest[0], seed) if package == "visbi" else fit_sbi(goal, *rest, seed)
            )
        caught = sorted({str(warning.message)[:200] for warning in heard})
    np.savez_compressed(path, **{key: value.detach().double().numpy() for key, value in draws.items()})
    result["warnings"] = caught
    result["warmed_up"] = True
    result["versions"] = {
        MODULES[package].split(".")[0]: importlib.import_module(module.__name__.split(".")[0]).__version__,
        "torch": torch.__version__,
    }
    answer.write(json.dumps(result) + "\n")
    answer.flush()


if __name__ == "__main__":
    main()
