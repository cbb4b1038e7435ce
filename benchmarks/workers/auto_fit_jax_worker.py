"""Samples one target with NumPyro or BlackJAX, in that tool's environment; driven by ../auto_fit.py.

    auto_fit_jax_worker.py TOOL TARGET SEED DRAWS.npz

Constants of the target and points to compare densities at lie in problem.npz beside the draws. Everything is
in float64 and in coordinates without bounds. Seconds include compilation, which a user pays too; the line
also has them for a second run of the compiled sampler, where there is one.

numpyro-nuts: 4 chains of 1000 draws after 1000 of warm-up from draws of the prior, thinned to 2000.
blackjax-pathfinder: 16 paths from draws of the prior, 1000 draws each, Pareto-smoothed resampling.
blackjax-smc: 2000 particles from the prior, temperatures by ESS 1/2, 10 HMC moves of 10 steps each, mass
from the particles.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

sys.path.insert(0, str(Path(__file__).parents[1]))
from targets_jax import check, log_density, to_support

DRAWS = 2000
CHAINS, WARMUP = 4, 1000
PATHS, DRAWS_OF_A_PATH = 16, 1000
MOVES, LEAPFROGS = 10, 10
LOWEST = -1e30  # stands for log 0


class Problem:
    """A target in coordinates u without bounds."""

    def __init__(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        check(name, arrays)
        self.dim = arrays["check_theta"].shape[1]
        self.arrays = arrays
        self.density = log_density(name, arrays)
        self.forward, self.log_prior = to_support(arrays)

    def log_posterior(self, u: Array) -> Array:
        """Unnormalised log-density of u (D,)."""
        theta, log_slope = self.forward(u)
        value = self.density(theta) + log_slope
        return jnp.where(jnp.isfinite(value), value, LOWEST)

    def prior_draws(self, key: Array, n: int) -> Array:
        """u (n, D) from the prior."""
        if "low" in self.arrays:
            return jax.random.logistic(key, (n, self.dim))
        normal = jax.random.normal(key, (n, self.dim))
        return self.arrays["prior_loc"] + self.arrays["prior_scale"] * normal

    def theta(self, u: Array) -> np.ndarray:
        """u (n, D) on the support."""
        return np.asarray(jax.vmap(self.forward)(u)[0])


def nuts(problem: Problem, seed: int) -> tuple[Array, dict[str, Any]]:
    """Draws of u and what to report."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
    from numpyro.infer import MCMC, NUTS

    key_start, key_run = jax.random.split(jax.random.key(seed))
    mcmc = MCMC(
        NUTS(potential_fn=lambda u: -problem.log_posterior(u)),
        num_warmup=WARMUP,
        num_samples=1000,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(
        key_run, init_params=problem.prior_draws(key_start, CHAINS), extra_fields=("num_steps", "diverging")
    )
    draws = np.asarray(mcmc.get_samples(group_by_chain=True))
    fields = mcmc.get_extra_fields()
    report = {
        "r_hat": float(split_gelman_rubin(draws).max()),
        "ess": float(effective_sample_size(draws).min()),
        "divergent": int(np.asarray(fields["diverging"]).sum()),
    }
    steps = int(np.asarray(fields["num_steps"]).sum())
    flat = draws.reshape(-1, problem.dim)
    # the steps of warm-up are not recorded
    return jnp.asarray(flat[:: len(flat) // DRAWS]), {"report": report, "n_gradients": steps, "n_values": 0}


def pathfinder(problem: Problem, seed: int) -> tuple[Array, dict[str, Any]]:
    """Draws of u and what to report."""
    import blackjax
    from blackjax.vi.multipathfinder import psis_weights

    start, run, draw = jax.random.split(jax.random.key(seed), 3)
    algorithm = blackjax.multipathfinder(problem.log_posterior)
    state, _ = algorithm.init(run, problem.prior_draws(start, PATHS), DRAWS_OF_A_PATH)
    log_w = (state.logp - state.logq).ravel()
    log_evidence = jax.scipy.special.logsumexp(log_w) - jnp.log(log_w.size)
    w = jnp.exp(log_w - log_w.max())
    fraction = w.sum() ** 2 / (w**2).sum() / w.size
    report = {
        "khat": float(psis_weights(state)[1]),
        "log_evidence": float(log_evidence),
        "log_evidence_se": float(jnp.sqrt((1 / fraction - 1) / w.size)),
    }
    return algorithm.sample(draw, state, DRAWS), {"report": report, "n_values": None, "n_gradients": None}


def smc(problem: Problem, seed: int) -> tuple[Array, dict[str, Any]]:
    """Draws of u and what to report."""
    import blackjax
    from blackjax.smc import adaptive_tempered, extend_params, resampling

    key, start = jax.random.split(jax.random.key(seed))
    kernel = adaptive_tempered.build_kernel(
        problem.log_prior,
        lambda u: problem.log_posterior(u) - problem.log_prior(u),
        blackjax.hmc.build_kernel(),
        blackjax.hmc.init,
        resampling.systematic,
        target_ess=0.5,
    )

    @jax.jit
    def step(key: Array, state: Any, step_size: Array) -> Any:
        variance = jnp.var(state.particles, axis=0) + 1e-12
        parameters = {
            "step_size": step_size,
            "inverse_mass_matrix": variance,
            "num_integration_steps": LEAPFROGS,
        }
        return kernel(key, state, MOVES, extend_params(parameters))

    state = adaptive_tempered.init(problem.prior_draws(start, DRAWS))
    step_size, evidence, stages = 0.5 * problem.dim**-0.25, 0.0, 0
    while float(state.tempering_param) < 1.0:
        key, own = jax.random.split(key)
        state, info = step(own, state, jnp.asarray(step_size))
        evidence += float(info.log_likelihood_increment)
        acceptance = float(info.update_info.acceptance_rate.mean())
        step_size *= float(np.exp(acceptance - 0.8))
        stages += 1
    report = {"log_evidence": evidence, "stages": stages, "acceptance": acceptance}
    rows = DRAWS * MOVES * LEAPFROGS * stages
    return state.particles, {"report": report, "n_gradients": rows, "n_values": 0}


SAMPLERS = {"numpyro-nuts": nuts, "blackjax-pathfinder": pathfinder, "blackjax-smc": smc}


def main() -> None:
    """Sample, save the draws, print the line."""
    tool, name, seed, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    answer = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    package = tool.split("-")[0]
    module = importlib.import_module(package)
    with np.load(path.parent / "problem.npz") as saved:
        problem = Problem(name, {key: saved[key] for key in saved.files})
    cpu, wall = time.process_time(), time.perf_counter()
    u, result = SAMPLERS[tool](problem, seed)
    theta = problem.theta(u)
    result |= {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    result |= {"draw_cpu_seconds": 0.0, "draw_seconds": 0.0}
    np.savez_compressed(path, draws=theta)
    result["versions"] = {package: module.__version__, "jax": jax.__version__}
    answer.write(json.dumps(result) + "\n")
    answer.flush()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
