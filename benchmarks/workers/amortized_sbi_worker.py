"""sbi's `train_amortized` with its defaults, in sbi's environment; driven by ../amortized.py.

    amortized_sbi_worker.py TASK SEED GIVEN.npz DRAWS.npz NLE.pt

GIVEN holds theta, x and the observations `at`; NLE is visbi's learnt likelihood, which both tools go through.
Draws (M, 2000, D) go to the file, and one JSON line says what the fit took in CPU seconds.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from amortized_tasks import amortized_task

DRAWS = 2000


def main() -> None:
    """Fit, draw, print the line."""
    from sbi.inference.posteriors.vi_posterior import VIPosterior

    from visbi.potentials import LikelihoodPotential

    name, seed, given, out, network = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    prior = amortized_task(name).prior
    estimator, _ = torch.load(network, weights_only=False)
    own = LikelihoodPotential(estimator, prior)
    data = np.load(given)
    theta, x, at = (torch.from_numpy(data[key]) for key in ("theta", "x", "at"))

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        """Pairs, or many theta at one x."""
        return own.evaluate(theta, x_o, x_is_iid=False)

    posterior = VIPosterior(potential, prior)
    began = time.process_time()
    posterior.train_amortized(theta, x, show_progress_bar=False)
    seconds = time.process_time() - began
    with torch.no_grad():
        draws = torch.stack([posterior.sample((DRAWS,), x=row[None]).reshape(DRAWS, -1) for row in at])
    np.savez_compressed(out, draws=draws.double().numpy())
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
