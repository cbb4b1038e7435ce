"""The lynx-hare posterior by long NUTS: the reference that every fit of the exact likelihood is held against.

The model is Lotka and Volterra's, as observed on the pelts of the Hudson Bay Company, 1900 to 1920:

    du/dt = (alpha - beta v) u,    dv/dt = (-gamma + delta u) v,
    hare_t ~ LogNormal(log u(t), sigma_1),    lynx_t ~ LogNormal(log v(t), sigma_2),    t = 0, ..., 20,

with alpha, gamma ~ N(1, .5) and beta, delta ~ N(.05, .05), all truncated to positive, u_0, v_0 ~
LogNormal(log 10, 1) and sigma ~ LogNormal(-1, 1). Sampled by NUTS (Hoffman & Gelman 2014) in float64 on the
logarithms of the eight parameters; the log-evidence is importance sampling from a multivariate t fitted to
the draws.

Runs in the NumPyro environment and imports nothing of visbi, so that the two cannot share a mistake:

    make reference
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from scipy.special import ndtr
from scipy.stats import multivariate_t

HARE = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6]
HARE += [14.6, 16.2, 24.7]
LYNX = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7]
LYNX += [10.1, 8.6]
NAMES = ["alpha", "beta", "gamma", "delta", "u_0", "v_0", "sigma_1", "sigma_2"]
TYPICAL = [0.55, 0.028, 0.8, 0.024, 33.0, 6.0, 0.25, 0.25]  # where chains start, not what they find
JITTER = 0.05  # of the chains' starts, in log parameters; from .2 on a chain can end in a mode out of phase
STEPS_PER_YEAR = 10
QUANTILES = [0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975]


def log_states(theta: jax.Array, steps_per_year: int = STEPS_PER_YEAR) -> jax.Array:
    """log u, log v at the 21 years, (21, 2), by RK4 on the logarithms of the states."""
    alpha, beta, gamma, delta, u_0, v_0 = theta[:6]
    h = 1.0 / steps_per_year

    def slope(s: jax.Array) -> jax.Array:
        return jnp.stack([alpha - beta * jnp.exp(s[1]), -gamma + delta * jnp.exp(s[0])])

    def step(s: jax.Array, _: None) -> tuple[jax.Array, None]:
        k_1 = slope(s)
        k_2 = slope(s + h / 2 * k_1)
        k_3 = slope(s + h / 2 * k_2)
        k_4 = slope(s + h * k_3)
        return s + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4), None

    def year(s: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        s, _ = jax.lax.scan(step, s, None, length=steps_per_year)
        return s, s

    start = jnp.log(jnp.stack([u_0, v_0]))
    _, later = jax.lax.scan(year, start, None, length=len(HARE) - 1)
    return jnp.concatenate([start[None], later])


def log_prior(theta: jax.Array) -> jax.Array:
    """Log-density of the prior at theta (8,) > 0, normalised."""
    rates = norm.logpdf(theta[jnp.array([0, 2])], 1.0, 0.5).sum() - 2 * np.log(ndtr(2.0))
    couplings = norm.logpdf(theta[jnp.array([1, 3])], 0.05, 0.05).sum() - 2 * np.log(ndtr(1.0))
    log_rest = jnp.log(theta[4:])
    centre = jnp.array([np.log(10.0), np.log(10.0), -1.0, -1.0])
    return rates + couplings + (norm.logpdf(log_rest, centre, 1.0) - log_rest).sum()


def log_likelihood(theta: jax.Array) -> jax.Array:
    """Log-density of the 21 pairs, the Jacobian 1/y of the lognormal included."""
    log_y = jnp.log(jnp.array([HARE, LYNX])).T
    return (norm.logpdf(log_y, log_states(theta), theta[6:]) - log_y).sum()


def log_joint(z: jax.Array) -> jax.Array:
    """Log-density of the logarithms z (8,) and the data together."""
    theta = jnp.exp(z)
    value = log_likelihood(theta) + log_prior(theta) + z.sum()
    return jnp.where(jnp.isfinite(value), value, -1e10)


def sample(chains: int, warmup: int, draws: int, seed: int) -> tuple[np.ndarray, int]:
    """Draws of z (chains, draws, 8) and the number of divergent transitions."""
    kernel = NUTS(potential_fn=lambda z: -log_joint(z), dense_mass=True, target_accept_prob=0.9)
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="sequential",
        progress_bar=False,
    )
    key_start, key_run = jax.random.split(jax.random.key(seed))
    start = jnp.log(jnp.array(TYPICAL)) + JITTER * jax.random.normal(key_start, (chains, len(NAMES)))
    mcmc.run(key_run, init_params=start, extra_fields=("diverging",))
    divergent = int(np.asarray(mcmc.get_extra_fields()["diverging"]).sum())
    return np.asarray(mcmc.get_samples(group_by_chain=True)), divergent


def other_modes(n: int, seed: int) -> list[dict[str, float]]:
    """Distinct optima that n far starts reach by BFGS, best first, each with its Laplace log-mass.

    A chain cannot leave a mode that is out of phase with the data, so R-hat cannot say what such modes weigh:
    this does.
    """
    rng = np.random.default_rng(seed)
    spread = np.where(np.arange(n) % 2, 0.2, 0.7)[:, None]
    starts = np.log(TYPICAL) + spread * rng.standard_normal((n, len(NAMES)))
    loss = jax.jit(jax.value_and_grad(lambda z: -log_joint(z)))
    hessian = jax.jit(jax.hessian(lambda z: -log_joint(z)))

    def numpy_loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(z)
        return float(value), np.asarray(gradient)

    ends = sorted((minimize(numpy_loss, z, jac=True, method="BFGS") for z in starts), key=lambda end: end.fun)
    found: list[dict[str, float]] = []
    for end in ends:
        steep = np.linalg.eigvalsh(np.asarray(hessian(end.x)))
        if not steep.min() > 1e-6 or np.abs(end.jac).max() > 1e-2:
            continue
        if any(abs(-end.fun - other["log_joint"]) < 1e-2 for other in found):
            continue
        mass = -end.fun + len(NAMES) / 2 * np.log(2 * np.pi) - 0.5 * np.log(steep).sum()
        found.append({"log_joint": -end.fun, "log_mass": float(mass), "sigma_1": float(np.exp(end.x[6]))})
    return found


def solver_error(theta: np.ndarray) -> float:
    """Largest difference of the log states from a tight adaptive solver over some draws theta (n, 8)."""
    worst = 0.0
    for row in theta:
        alpha, beta, gamma, delta = row[:4]

        def slope(_: float, s: np.ndarray, a=alpha, b=beta, g=gamma, d=delta) -> list[float]:
            return [a - b * np.exp(s[1]), -g + d * np.exp(s[0])]

        years = np.arange(len(HARE), dtype=float)
        exact = solve_ivp(slope, (0.0, years[-1]), np.log(row[4:6]), "DOP853", years, rtol=1e-12, atol=1e-12)
        worst = max(worst, float(np.abs(exact.y.T - np.asarray(log_states(jnp.array(row)))).max()))
    return worst


def log_evidence(z: np.ndarray, n: int, seed: int) -> dict[str, float]:
    """Importance sampling of log p(data) from a t with 7 degrees of freedom fitted to draws z (n, 8)."""
    proposal = multivariate_t(z.mean(0), np.cov(z.T) * 1.1 * 5 / 7, df=7, seed=seed)
    points = proposal.rvs(n)
    log_w = np.asarray(jax.lax.map(log_joint, jnp.array(points), batch_size=1000)) - proposal.logpdf(points)
    value = float(logsumexp(log_w) - np.log(n))
    fraction = float(np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w)) / n)
    return {
        "value": value,
        "value_of_log_counts": value + float(np.log([HARE, LYNX]).sum()),  # x = log y has another density
        "standard_error": float(np.sqrt((1 / fraction - 1) / n)),
        "ess_fraction": fraction,
        "draws": n,
    }


def summary(theta: np.ndarray) -> dict[str, dict[str, float]]:
    """Moments, quantiles and diagnostics of each parameter from draws theta (chains, draws, 8)."""
    table = {}
    for i, name in enumerate(NAMES):
        column = theta[:, :, i]
        quantiles = np.quantile(column, QUANTILES)
        table[name] = {
            "mean": float(column.mean()),
            "sd": float(column.std(ddof=1)),
            "r_hat": float(split_gelman_rubin(column)),
            "ess": float(effective_sample_size(column)),
            **{f"q{100 * p:g}": float(q) for p, q in zip(QUANTILES, quantiles, strict=True)},
        }
    return table


def main() -> None:
    """Sample, check, write the two files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1500)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--kept", type=int, default=2000, help="thinned draws in the npz file")
    parser.add_argument("--seed", type=int, default=1900)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()

    began = time.perf_counter()
    z, divergent = sample(options.chains, options.warmup, options.draws, options.seed)
    seconds = time.perf_counter() - began
    theta = np.exp(z)
    flat = theta.reshape(-1, len(NAMES))
    parameters = summary(theta)
    r_hat = max(row["r_hat"] for row in parameters.values())
    ess = min(row["ess"] for row in parameters.values())

    result = {
        "what": "posterior of the Hudson Bay lynx-hare model, 1900-1920, by NUTS in float64",
        "order": NAMES,
        "parameters": parameters,
        "correlation": np.corrcoef(flat.T).round(4).tolist(),
        "log_evidence": log_evidence(z.reshape(-1, len(NAMES)), 50_000, options.seed),
        "largest_r_hat": r_hat,
        "smallest_ess": ess,
        "divergent": divergent,
        "modes_by_laplace": other_modes(200, options.seed),
        "solver": f"RK4 on log states, {STEPS_PER_YEAR} steps a year",
        "solver_error_log_state": solver_error(flat[:: len(flat) // 50]),
        "chains": options.chains,
        "warmup": options.warmup,
        "draws_per_chain": options.draws,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpyro": numpyro.__version__,
            "numpy": np.__version__,
        },
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "lynx_hare_reference.json").write_text(json.dumps(result, indent=1) + "\n")
    kept = flat[np.linspace(0, len(flat) - 1, options.kept).astype(int)].astype(np.float32)
    np.savez_compressed(options.output / "lynx_hare_reference.npz", theta=kept, names=np.array(NAMES))

    for name, row in parameters.items():
        moments = f"mean {row['mean']:10.5f}  sd {row['sd']:9.5f}"
        print(f"{name:8s} {moments}  r_hat {row['r_hat']:.4f}  ess {row['ess']:.0f}")
    for key in ("log_evidence", "modes_by_laplace", "divergent", "solver_error_log_state", "seconds"):
        print(key, result[key])
    if not (r_hat < 1.01 and ess > 4000):
        raise SystemExit(f"not a reference: largest R-hat {r_hat:.4f}, smallest ESS {ess:.0f}")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
