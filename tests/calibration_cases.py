"""Exact posteriors of the linear Gaussian model, and the same widened, narrowed or shifted."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from visbi.core.random import seeded
from visbi.simulators.zoo import linear_gaussian
from visbi.simulators.zoo.task import Task

WRONG = {
    "calibrated": {},
    "over-confident": {"scale": 0.7},
    "under-confident": {"scale": 1.4},
    "biased": {"shift": 0.7},
}


@dataclass(frozen=True)
class Cases:
    """Truths, observations, draws of q at each, and densities at (truths, draws)."""

    task: Task
    theta: Tensor
    x: Tensor
    draws: Tensor
    log_q: tuple[Tensor, Tensor]
    log_likelihood: tuple[Tensor, Tensor]


def wrong_q(task: Task, x: Tensor, *, scale: float = 1.0, shift: float = 0.0) -> MultivariateNormal:
    """The posterior at x (n, K), deviations times `scale`, mean off by `shift` of them."""
    exact = task.posterior(x)
    assert isinstance(exact, MultivariateNormal)
    return MultivariateNormal(
        exact.mean + shift * exact.stddev, scale_tril=scale * exact.scale_tril.expand(len(x), -1, -1)
    )


def cases(
    n_obs: int, n_draws: int, dim: int = 2, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0
) -> Cases:
    with seeded(seed):
        task = linear_gaussian.task(dim)
        theta = task.prior.sample((n_obs,))
        x = task.simulator(theta)
        q = wrong_q(task, x, scale=scale, shift=shift)
        draws = q.sample((n_draws,))
    assert task.log_likelihood is not None
    likelihoods = torch.stack([task.log_likelihood(row, x) for row in draws])
    return Cases(
        task,
        theta,
        x,
        draws,
        (q.log_prob(theta), q.log_prob(draws)),
        (task.log_likelihood(theta, x), likelihoods),
    )
