"""Models with many observations and exact posteriors: a linear Gaussian, a likelihood learnt from two moons.

The learnt likelihood's posterior is the one of the network, whatever it has learnt: it is tabulated on a
grid over the prior's square, refined where there is mass, and drawn from cell by cell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neural_targets import learn
from visbi.core.random import seeded
from visbi.simulators.zoo import linear_gaussian, two_moons

__all__ = ["DRAWS", "NAMES", "Model", "model"]

DRAWS = 1000
NAMES = ("linear_gaussian_10", "nle_two_moons")
_COARSE, _FINE = 256, 12  # cells along a side, and of those with mass
_LEAST = 1e-7  # share of the mass below which a cell is left as it is


@dataclass(frozen=True)
class Model:
    """A potential and its prior, observations, and the answer.

    Attributes:
        potential: as `VIPosterior` takes it.
        prior: over theta (D,).
        observe: n -> theta (n, D) of the prior and x (n, K) of the simulator, always the same ones.
        draw: x (K,), n -> exact draws (n, D).
    """

    potential: Any
    prior: Any
    observe: Callable[[int], tuple[Tensor, Tensor]]
    draw: Callable[[Tensor, int], Tensor]


@cache
def model(name: str) -> Model:
    """The model of that name."""
    if name == "linear_gaussian_10":
        task = linear_gaussian.task(10)

        def potential(theta: Tensor, x: Tensor) -> Tensor:
            return task.log_likelihood(theta, x) + task.prior.log_prob(theta)

        assert task.posterior is not None
        exact = task.posterior
        return Model(potential, task.prior, _pairs(task), lambda x, n: exact(x).sample((n,)))
    task, learnt = two_moons.task(), learn(name)
    return Model(learnt, task.prior, _pairs(task), lambda x, n: _from_grid(learnt, x, n))


def _pairs(task: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
    def observe(n: int) -> tuple[Tensor, Tensor]:
        with seeded(11):
            theta = task.prior.sample((n,))
            return theta, task.simulator(theta)

    return observe


@torch.no_grad()
def _from_grid(potential: Any, x: Tensor, n: int) -> Tensor:
    """Draws (n, 2) over the square [-1, 1]^2 from cells that weigh what the potential is at their centres."""
    centres, side = _cells(torch.zeros(1, 2).double(), 1.0, _COARSE)
    log_mass = _values(potential, centres, x)
    heavy = log_mass.softmax(0) > _LEAST
    centres, side = _cells(centres[heavy], side, _FINE)
    mass = _values(potential, centres, x).softmax(0)
    chosen = centres[torch.multinomial(mass, n, replacement=True)]
    return chosen + side * (2 * torch.rand_like(chosen) - 1)


def _cells(centres: Tensor, half: float, along: int) -> tuple[Tensor, float]:
    """Squares (M, 2) with sides 2 * half cut into `along` x `along`: the centres, and half a side."""
    small = half / along
    steps = torch.linspace(-half + small, half - small, along).double()
    offsets = torch.cartesian_prod(steps, steps)
    return (centres[:, None] + offsets).flatten(0, 1), small


def _values(potential: Any, theta: Tensor, x: Tensor) -> Tensor:
    parts = [potential.evaluate(piece.float(), x[None]).double() for piece in theta.split(16_384)]
    return torch.nan_to_num(torch.cat(parts), nan=-torch.inf)
