"""SLCP, "simple likelihood, complex posterior": four draws of a planar Gaussian with a bent parametrisation.

    x = (y_1, ..., y_4),   y_i ~ N((theta_1, theta_2), S),   theta ~ U([-3, 3]^5)

    S = [[s_1^2, rho s_1 s_2], [rho s_1 s_2, s_2^2]],  s_1 = theta_3^2,  s_2 = theta_4^2,  rho = tanh theta_5

Only squares of theta_3 and theta_4 enter, so the posterior has four symmetric modes, cut off by the box.

Source: G. Papamakarios, D. Sterratt and I. Murray, "Sequential neural likelihood", AISTATS 2019.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from visbi.priors import BoxUniform
from visbi.simulators.zoo.task import Task, check_theta, paired

__all__ = ["log_likelihood", "simulator", "task"]

_SMALLEST_SCALE = 1e-6  # of s_1 and s_2: keeps the density finite where theta_3 or theta_4 is 0
# one run at theta = (0.7, -2.9, -1, -0.9, 0.6), the point used in the paper
_X_O = (1.361, -2.43, 0.762, -2.449, 0.248, -3.21, -0.823, -3.302)


def task() -> Task:
    """SLCP: 5 parameters, x of 8 numbers.

    >>> slcp = task()
    >>> slcp.log_likelihood(slcp.prior.sample((3,)), slcp.x_o).shape
    torch.Size([3])
    """
    return Task(
        name="SLCP",
        theta_names=tuple(f"theta_{i}" for i in range(1, 6)),
        prior=BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5)),
        simulator=simulator,
        x_o=torch.tensor(_X_O),
        log_likelihood=log_likelihood,
    )


@torch.no_grad()
def simulator(theta: Tensor) -> Tensor:
    """theta (N, 5) -> x (N, 8): four points one after the other."""
    check_theta(theta, 5)
    scale, rho = _scale(theta), theta[:, 4].tanh()
    first, second = torch.randn(2, len(theta), 4, dtype=theta.dtype).unbind(0)
    second = rho[:, None] * first + (1 - rho**2).sqrt()[:, None] * second
    points = theta[:, None, :2] + scale[:, None] * torch.stack([first, second], -1)
    return points.flatten(1)


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """log p(x | theta), (N,), for theta (N, 5) and x (8,) or (N, 8)."""
    theta, x = paired(theta, x, 5, 8)
    scale, rho = _scale(theta), theta[:, 4:].tanh()
    z_1, z_2 = ((x.unflatten(-1, (4, 2)) - theta[:, None, :2]) / scale[:, None]).unbind(-1)
    # log(1 - tanh^2), which stays finite where tanh rounds to one
    log_rest = 2 * (math.log(2) - theta[:, 4] - softplus(-2 * theta[:, 4]))
    conditional = (z_2 - rho * z_1) ** 2 * torch.exp(-log_rest)[:, None]
    normaliser = 2 * scale.log().sum(-1) + log_rest + 2 * math.log(2 * math.pi)
    return -0.5 * (z_1**2 + conditional).sum(-1) - 2 * normaliser


def _scale(theta: Tensor) -> Tensor:
    return (theta[:, 2:4] ** 2).clamp(min=_SMALLEST_SCALE)
