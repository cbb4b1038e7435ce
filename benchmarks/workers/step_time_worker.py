"""Times gradient steps of one tool's `VIPosterior`, in that tool's environment; driven by ../step_time.py.

The same code times both tools through the interface they share. `train(max_num_iters=k)` takes c + k s
seconds with some constant c, so s is the difference between two lengths over the difference in k. Warm-up,
convergence checks and quality control are off. Reads one JSON request a line, answers one JSON line.
"""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

MODULES = {"sbi": "sbi.inference.posteriors.vi_posterior", "visbi": "visbi"}
SHORT = 3  # steps of the short run
LEAST, MOST = 10, 300  # further steps of the long one


def gaussian_potential(dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A correlated Gaussian, (N, D) -> (N,): next to nothing beside the step of a flow."""
    precision = torch.eye(dim) + 0.3
    mean = torch.linspace(-1, 1, dim)

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        away = theta - mean
        return -0.5 * ((away @ precision) * away).sum(-1)

    return potential


def build(tool: str, family: str, method: str, dim: int, settings: dict[str, int]) -> Any:
    """The tool's posterior for one case, nothing trained yet."""
    vi_posterior = importlib.import_module(MODULES[tool]).VIPosterior
    return vi_posterior(
        gaussian_potential(dim),
        MultivariateNormal(torch.zeros(dim), torch.eye(dim)),
        q=family,
        vi_method=method,
        num_transforms=settings["num_transforms"],
        hidden_features=settings["hidden_features"],
    )


def train_seconds(posterior: Any, steps: int, dim: int, options: dict[str, Any]) -> float:
    """Wall seconds of `steps` further gradient steps, training's constant part included."""
    began = time.perf_counter()
    posterior.train(
        torch.zeros(1, dim),
        **options,
        max_num_iters=steps,
        warm_up_rounds=0,
        check_for_convergence=False,
        quality_control=False,
        show_progress_bar=False,
    )
    return time.perf_counter() - began


class Case:
    """One posterior that is trained on and on, and the number of steps that fill the time asked for."""

    def __init__(self, tool: str, request: dict[str, Any]) -> None:
        self.dim = request["dim"]
        self.options = {"n_particles": request["settings"]["n_particles"], **request["train"]}
        torch.manual_seed(0)
        self.posterior = build(tool, request["family"], request["method"], self.dim, request["settings"])
        self.seconds(SHORT)
        per_step = max(self.seconds(SHORT + LEAST) - self.seconds(SHORT), 1e-6) / LEAST
        self.further = min(MOST, max(LEAST, round(request["target_seconds"] / per_step)))

    def seconds(self, steps: int) -> float:
        """Wall seconds of one call of `train`."""
        return train_seconds(self.posterior, steps, self.dim, self.options)

    def milliseconds_per_step(self) -> float:
        """One measurement."""
        short = self.seconds(SHORT)
        return 1e3 * (self.seconds(SHORT + self.further) - short) / self.further


def main() -> None:
    """Answer requests until stdin ends."""
    tool, answers = sys.argv[1], sys.stdout
    sys.stdout = sys.stderr  # what a tool prints must not reach the driver
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, tool: importlib.import_module(tool).__version__}
    print(json.dumps(versions), file=answers, flush=True)
    cases: dict[str, Case] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = f"{request['family']} {request['method']} {request['dim']}"
        if name not in cases:
            cases[name] = Case(tool, request)
        milliseconds = cases[name].milliseconds_per_step()
        print(json.dumps({"ms": milliseconds, "steps": cases[name].further}), file=answers, flush=True)


if __name__ == "__main__":
    main()
