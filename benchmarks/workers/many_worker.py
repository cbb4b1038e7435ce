"""Fits single observations with one tool of the torch world, in that tool's environment; ../many.py drives.

    many_worker.py TOOL MODEL X.npz

TOOL is `visbi-auto`, `visbi-maf` or `sbi-maf`, each a loop over x with the tool's own defaults. A first
short fit loads what a tool loads on first use and is not timed. One JSON line: seconds of CPU and of the
clock of each fit, with its first 1000 draws, and versions.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from many_models import DRAWS, model

MODULES = {"sbi": "sbi.inference.posteriors.vi_posterior", "visbi": "visbi"}


def fit(tool: str, name: str, x: torch.Tensor, **short: Any) -> None:
    """One fit at the tool's defaults, and draws."""
    package, _, family = tool.partition("-")
    goal = model(name)
    posterior = importlib.import_module(MODULES[package]).VIPosterior(goal.potential, goal.prior, q=family)
    if package == "visbi":
        keep = {"allow_failed": True} if family == "auto" else {}
        posterior.train(x, seed=1, show_progress_bar=False, **keep, **short)
    else:
        torch.manual_seed(1)
        posterior.set_default_x(x)
        posterior.train(show_progress_bar=False, **short)
    posterior.sample((DRAWS,))


def main() -> None:
    """Fit each x, print the line."""
    tool, name, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    answer = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    with np.load(path) as saved:
        x = torch.from_numpy(saved["x"])
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        fit(tool, name, x[:1], **({} if tool == "visbi-auto" else {"max_num_iters": 2}))
        cpu, wall = [], []
        for row in x.split(1):
            started = time.process_time(), time.perf_counter()
            fit(tool, name, row)
            cpu.append(time.process_time() - started[0])
            wall.append(time.perf_counter() - started[1])
    package = importlib.import_module(tool.split("-")[0])
    versions = {package.__name__: package.__version__, "torch": torch.__version__}
    answer.write(json.dumps({"cpu_seconds": cpu, "seconds": wall, "versions": versions}) + "\n")
    answer.flush()


if __name__ == "__main__":
    main()
