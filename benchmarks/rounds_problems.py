"""Simulators with exact posteriors for observations of one's own: what `rounds.py` infers.

Observations are runs of the simulator at draws of the prior, each by its seed; lynx and hare have the one
that was observed. References are drawn by construction, never by a chain, except those of lynx and hare,
which are thinned draws of long NUTS (`reference_lynx_hare.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amortized_tasks import amortized_task, two_moons_draws
from visbi.core.random import seeded
from visbi.simulators.zoo import lynx_hare, slcp, two_moons
from visbi.simulators.zoo.task import Task

__all__ = ["PROBLEMS", "Problem"]

HERE = Path(__file__).parent
_FIRST_SEED = 1000  # observation k is drawn under this seed + k


@dataclass(frozen=True, eq=False)
class Problem:
    """A task and its exact posterior.

    Attributes:
        task: of the zoo.
        draws: x (K,), n -> exact draws (n, D), float64, from torch's global generator.
        own_observation: whether x is the task's own, and only the seed of the method changes.
    """

    task: Task
    draws: Callable[[Tensor, int], Tensor]
    own_observation: bool = False

    def observation(self, number: int) -> Tensor:
        """x (K,), by its number."""
        if self.own_observation:
            return self.task.x_o
        with seeded(_FIRST_SEED + number):
            return self.task.simulator(self.task.prior.sample(torch.Size([1])))[0]

    def reference(self, number: int, n: int) -> Tensor:
        """Exact draws (n, D) of the posterior given observation `number`."""
        x = self.observation(number)
        with seeded(_FIRST_SEED + number):
            return self.draws(x, n)


def _lynx_hare_draws(x: Tensor, n: int) -> Tensor:
    with np.load(HERE / "data" / "lynx_hare_reference.npz") as saved:
        theta = torch.from_numpy(saved["theta"]).double()
    return theta[torch.randperm(len(theta))[:n]]


PROBLEMS: dict[str, Problem] = {
    "two_moons": Problem(two_moons.task(), two_moons_draws),
    "slcp": Problem(slcp.task(), amortized_task("slcp").draw),
    "lynx_hare": Problem(lynx_hare.task(), _lynx_hare_draws, own_observation=True),
}
"""By name."""
