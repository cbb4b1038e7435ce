"""Learned potentials as targets: likelihood (NLE) and ratio (NRE) of three simulators, and long SMC on each.

Names are `nle_` or `nre_` with `two_moons`, `slcp` or `lynx_hare`. Networks are trained by visbi on 10,000
simulations from the prior with fixed seeds. The reference belongs to the learned potential, not to the
simulator: a fit is judged by how well it finds what it was given.

The reference is tempered sequential Monte Carlo in the coordinates where the prior is N(0, I), with small
steps of temperature and many Hamiltonian moves, made twice with different seeds; the classifier's accuracy
between both halves is kept beside it. Both lie in benchmarks/cache/, which git ignores.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from target_parts import Target
from visbi.core.random import seeded
from visbi.estimators import fit_likelihood, fit_ratio
from visbi.estimators.training_state import TrainingOptions
from visbi.potentials import likelihood_estimator_based_potential, ratio_estimator_based_potential
from visbi.potentials.base import BasePotential
from visbi.priors import coordinates
from visbi.simulators import simulate
from visbi.simulators.zoo import lynx_hare, slcp, two_moons
from visbi.simulators.zoo.task import Task

__all__ = ["NAMES", "SmcOptions", "learn", "make_reference", "neural_target", "tempered_smc"]

CACHE = Path(__file__).parent / "cache" / "neural"
SIMULATIONS = 10_000
TASKS: dict[str, Callable[[], Task]] = {
    "two_moons": two_moons.task,
    "slcp": slcp.task,
    "lynx_hare": lynx_hare.task,
}
NAMES = tuple(f"{kind}_{name}" for name in TASKS for kind in ("nle", "nre"))
# many entries of x that depend smoothly on theta: what TrainingOptions advises
OPTIONS = {"lynx_hare": TrainingOptions(weight_decay=1.0)}


def learn(name: str) -> BasePotential:
    """The learned potential of that name, trained if the cache has none."""
    kind, _, problem = name.partition("_")
    task, path = TASKS[problem](), CACHE / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        runs = simulate(task.simulator, task.prior, SIMULATIONS, seed=1, show_progress_bar=False)
        fit = fit_likelihood if kind == "nle" else fit_ratio
        options = OPTIONS.get(problem, TrainingOptions())
        trained = fit(runs.theta, runs.x, options=options, seed=2, show_progress_bar=False)
        torch.save(trained.estimator, path)
    estimator = torch.load(path, weights_only=False)
    build = likelihood_estimator_based_potential if kind == "nle" else ratio_estimator_based_potential
    return build(estimator, task.prior, task.x_o[None])[0]


@dataclass(frozen=True)
class SmcOptions:
    """How long the reference's chains are."""

    particles: int = 4000
    ess_share: float = 0.7
    moves: int = 8
    last_moves: int = 60
    leapfrogs: int = 8


def tempered_smc(
    log_ratio: Callable[[Tensor], Tensor], dim: int, options: SmcOptions, *, seed: int
) -> tuple[Tensor, float]:
    """Particles of N(z; 0, I) exp(log_ratio(z)), (N, D), and its log integral (Del Moral et al. 2006)."""
    with seeded(seed):
        z = torch.randn(options.particles, dim, dtype=torch.float64)
        value, evidence, temperature, step = log_ratio(z).detach(), 0.0, 0.0, 0.5
        while temperature < 1.0:
            last, temperature = temperature, _next_temperature(value, temperature, options.ess_share)
            log_w = (temperature - last) * value
            evidence += float(log_w.logsumexp(0)) - math.log(len(z))
            z = z[_systematic(log_w.softmax(0))]
            moves = options.moves if temperature < 1.0 else options.last_moves
            for _ in range(moves):
                z, value, accepted = _hamiltonian(log_ratio, z, temperature, step, options.leapfrogs)
                step = min(step * math.exp(accepted - 0.8), 1.0)
    return z, evidence


def _next_temperature(value: Tensor, temperature: float, share: float) -> float:
    """The largest temperature at which the effective sample size is still that share, by bisection."""

    def enough(new: float) -> bool:
        w = ((new - temperature) * value).softmax(0)
        return float(1 / w.square().sum()) >= share * len(value)

    if enough(1.0):
        return 1.0
    low, high = temperature, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return max(low, temperature + 1e-8)


def _systematic(weights: Tensor) -> Tensor:
    n = len(weights)
    levels = (torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / n
    return torch.searchsorted(weights.double().cumsum(0), levels).clamp(max=n - 1)


def _hamiltonian(
    log_ratio: Callable[[Tensor], Tensor], z: Tensor, temperature: float, step: float, leapfrogs: int
) -> tuple[Tensor, Tensor, float]:
    """One move of all particles: z, log_ratio there, and the mean acceptance. Mass from their covariance."""
    covariance = z.T.cov() + 1e-10 * torch.eye(z.shape[1], dtype=z.dtype)
    factor = torch.linalg.cholesky(covariance)

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        point = point.detach().requires_grad_()
        value = log_ratio(point)
        log_p = temperature * value - 0.5 * point.square().sum(-1)
        gradient = torch.autograd.grad(log_p.sum(), point)[0]
        return value.detach(), log_p.detach(), torch.nan_to_num(gradient, 0.0, 0.0, 0.0)

    # z = factor w: unit mass in w; some moves are short, for modes much narrower than the covariance
    size = step * (0.05 + 1.15 * torch.rand(len(z), 1, dtype=z.dtype))
    momentum = torch.randn_like(z)
    value, log_p, gradient = evaluate(z)
    start, now = log_p - 0.5 * momentum.square().sum(-1), z
    for _ in range(leapfrogs):
        momentum = momentum + 0.5 * size * gradient @ factor
        now = now + size * momentum @ factor.T
        new_value, log_p, gradient = evaluate(now)
        momentum = momentum + 0.5 * size * gradient @ factor
    chance = (log_p - 0.5 * momentum.square().sum(-1) - start).exp().clamp(max=1.0).nan_to_num(0.0)
    accept = torch.rand_like(chance) < chance
    return torch.where(accept[:, None], now, z), torch.where(accept, new_value, value), float(chance.mean())


def make_reference(name: str, options: SmcOptions = SmcOptions()) -> dict[str, Any]:
    """Both halves of the reference, from the cache if it has them: theta (2, N, D), evidence (2,), c2st."""
    from visbi.certificate import c2st

    path = CACHE / f"{name}_reference.npz"
    if not path.exists():
        potential = learn(name)
        coords = coordinates(potential.prior)

        def log_ratio(z: Tensor) -> Tensor:
            theta, log_slope = coords.to_theta(z)
            value = potential.evaluate(theta, None).double() + log_slope
            ratio = value + 0.5 * z.square().sum(-1) + 0.5 * z.shape[1] * math.log(2 * math.pi)
            return torch.where(ratio.isfinite(), ratio, -1e10)

        halves = [tempered_smc(log_ratio, coords.dim_z, options, seed=seed) for seed in (1, 2)]
        theta = torch.stack([coords.to_theta(z)[0].detach() for z, _ in halves]).double()
        agreement = c2st(theta[0], theta[1])
        np.savez_compressed(
            path, theta=theta.numpy(), evidence=np.array([e for _, e in halves]), c2st=np.array(agreement)
        )
    with np.load(path) as saved:
        return {key: saved[key] for key in saved.files}


def neural_target(name: str) -> Target:
    """The learned potential as a target; draws are taken from the reference without replacement."""
    potential = learn(name)
    assert potential.prior is not None

    def draw(n: int) -> Tensor:
        theta = torch.from_numpy(make_reference(name)["theta"]).flatten(0, 1)
        return theta[torch.randperm(len(theta))[:n]]

    return Target(
        name=name,
        dim=potential.prior.event_shape[0],
        prior=potential.prior,
        potential=lambda theta, x=None: potential.evaluate(theta, None),
        draw=draw,
        log_evidence=None,
        group="held out",
    )
