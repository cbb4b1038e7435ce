"""sbi's sequential neural likelihood with MCMC, in sbi's environment; driven by ../rounds.py.

    rounds_snle_worker.py TASK BUDGET OBSERVATION LIMIT DRAWS.npz

Settings are those with which the published numbers were made (Lueckmann et al. 2021, appendix): ten rounds, a
maf of 50 hidden features, batches of 10,000, vectorised slice sampling with 100 chains, 25 steps of warm-up
and thinning by 10, started by resampling; what they do not say is sbi's default. Draws of the last posterior,
(2000, D), go to the file, and one JSON line says what each round took in CPU and wall seconds. After LIMIT
CPU seconds no further round begins: then there are no draws.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounds_problems import PROBLEMS

DRAWS, ROUNDS = 2000, 10
MCMC = {"num_chains": 100, "thin": 10, "warmup_steps": 25, "init_strategy": "resample"}


def main() -> None:
    """Infer, draw, print the line."""
    from sbi.inference import NLE
    from sbi.neural_nets import likelihood_nn
    from sbi.utils import BoxUniform

    name, budget, number, limit, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(int(number))
    warnings.simplefilter("ignore")
    problem = PROBLEMS[name]
    box: Any = problem.task.prior.support
    prior = BoxUniform(box.base_constraint.lower_bound, box.base_constraint.upper_bound)  # sbi's own class
    x_o = problem.observation(int(number))[None]
    began, worked = time.perf_counter(), time.process_time()
    trainer = NLE(prior, density_estimator=likelihood_nn("maf", hidden_features=50))
    proposal: Any = prior
    cpu = []
    draws = None
    for last in range(ROUNDS):
        if time.process_time() - worked > float(limit):
            break
        theta = proposal.sample((int(budget) // ROUNDS,))
        x = problem.task.simulator(theta)
        trainer.append_simulations(theta, x).train(training_batch_size=10_000)
        proposal = trainer.build_posterior(
            sample_with="mcmc", mcmc_method="slice_np_vectorized", mcmc_parameters=MCMC
        ).set_default_x(x_o)
        if last == ROUNDS - 1:
            draws = proposal.sample((DRAWS,), show_progress_bars=False)
        cpu.append(time.process_time() - worked)
    if draws is not None:
        np.savez_compressed(out, draws=draws.double().numpy())
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    line = json.dumps({"seconds": seconds, "cpu_seconds": worked, "cpu_after_rounds": cpu})
    print(f"\n{line}")  # sbi leaves lines unfinished


if __name__ == "__main__":
    main()
