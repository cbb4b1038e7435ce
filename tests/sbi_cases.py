"""A problem with a known posterior; its potential learnt by the sbi package, or exact in classes of that."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from visbi import VIPosterior

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sbi.inference import (
        NLE,
        NPE,
        NRE,
        likelihood_estimator_based_potential,
        posterior_estimator_based_potential,
        ratio_estimator_based_potential,
    )
    from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
    from sbi.utils import BoxUniform

NOISE = 0.3
X_O = torch.tensor([[0.4, -0.2]])
PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
TRAINERS = {"NLE": NLE, "NRE": NRE, "NPE": NPE}
POTENTIALS = {
    "NLE": likelihood_estimator_based_potential,
    "NRE": ratio_estimator_based_potential,
    "NPE": posterior_estimator_based_potential,
}
GOOD: dict[str, Any] = dict(learning_rate=0.02, max_num_iters=300, show_progress_bar=False, seed=0)
AMORTIZED: dict[str, Any] = dict(
    flow_type="gaussian",
    learning_rate=0.02,
    gamma=0.98,
    n_particles=32,
    max_num_iters=150,
    show_progress_bar=False,
    seed=0,
)


def simulator(theta: Tensor) -> Tensor:
    return theta + NOISE * torch.randn_like(theta)


def gaussian(theta: Tensor, x_o: Tensor) -> Tensor:
    """The potential of x ~ N(theta, NOISE^2) under a flat prior, (N, D) -> (N,)."""
    return -0.5 * ((theta - x_o) / NOISE).square().sum(-1)


def fitted(potential: Any, prior: Any = None, x: Tensor | None = X_O, **options: Any) -> VIPosterior:
    return VIPosterior(potential, prior, q="gaussian", **options).train(x, **GOOD)


def moments(potential: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of exp(potential) over the box, by quadrature, (D,) each."""
    axis = torch.linspace(-1.99, 1.99, 201)
    grid = torch.cartesian_prod(axis, axis)
    p = potential(grid).detach().double().softmax(0)[:, None]
    mean = (p * grid).sum(0)
    return mean, (p * (grid - mean).square()).sum(0).sqrt()


class Exact(ConditionalDensityEstimator):
    """N(condition, NOISE^2): p(x | theta), or under the box p(theta | x)."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), torch.Size([2]), torch.Size([2]))
        self.unused = nn.Parameter(torch.zeros(1))  # it looks for the device of a parameter

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        return torch.distributions.Normal(condition, NOISE).log_prob(input).sum(-1)

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        return -self.log_prob(input[None], condition)[0]

    def sample(self, sample_shape: torch.Size, condition: Tensor) -> Tensor:
        return torch.distributions.Normal(condition, NOISE).sample(sample_shape)
