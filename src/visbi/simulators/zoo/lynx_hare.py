"""Snowshoe hare and Canada lynx: pelts traded by the Hudson's Bay Company, 1900 to 1920.

Predator and prey follow Lotka-Volterra dynamics from the year 1900, u hares and v lynx in thousands of
pelts, and every yearly count, the first included, is observed with lognormal noise:

    log hare_t ~ N(log u_t, sigma_1),    log lynx_t ~ N(log v_t, sigma_2),    t = 0, ..., 20

x is on the LOG scale: 42 numbers, log of the hare's 21 counts and then of the lynx's 21 (in thousands).
There the noise is Gaussian and the likelihood is the density of these log counts.

The counts go back to C. Elton and M. Nicholson, J. Animal Ecology 11 (1942) 215-244, as tabulated by
J. M. Mahaffy for the years 1900 to 1920. The priors are those of B. Carpenter's case study "Predator-prey
population dynamics: the Lotka-Volterra model in Stan" (2018), truncated to positive rates.
"""

import math

import torch
from torch import Tensor
from torch.distributions import LogNormal

from visbi.priors import MultipleIndependent, TruncatedNormal
from visbi.simulators.zoo.lotka_volterra import log_populations
from visbi.simulators.zoo.task import Task, check_theta, paired

__all__ = [
    "HARE",
    "LYNX",
    "THETA_NAMES",
    "YEARS",
    "from_pelts",
    "log_likelihood",
    "simulator",
    "task",
    "to_pelts",
]

YEARS = tuple(range(1900, 1921))
# thousands of pelts, one a year
# fmt: off
HARE = (30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1,
        40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7)
LYNX = (4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4,
        8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6)
# fmt: on
THETA_NAMES = ("alpha", "beta", "gamma", "delta", "u_0", "v_0", "sigma_1", "sigma_2")

_SMALLEST_SIGMA = 1e-4  # eight prior standard deviations below the median


def task() -> Task:
    """The lynx-hare problem: 8 parameters, 42 log counts, an exact likelihood.

    >>> lynx_hare = task()
    >>> lynx_hare.simulator(lynx_hare.prior.sample((3,))).shape
    torch.Size([3, 42])
    """
    ones = torch.ones(2)
    rates = torch.tensor([1.0, 0.05, 1.0, 0.05])
    prior = MultipleIndependent(
        [
            TruncatedNormal(rates, torch.tensor([0.5, 0.05, 0.5, 0.05]), low=0.0),
            LogNormal(math.log(10) * ones, ones),
            LogNormal(-ones, ones),
        ]
    )
    return Task(
        name="lynx and hare, Hudson Bay, 1900 to 1920",
        theta_names=THETA_NAMES,
        prior=prior,
        simulator=simulator,
        x_o=from_pelts(torch.tensor([HARE, LYNX]).T),
        log_likelihood=log_likelihood,
    )


@torch.no_grad()
def simulator(theta: Tensor) -> Tensor:
    """theta (N, 8) -> log counts (N, 42), in the dtype of theta."""
    check_theta(theta, 8)
    mean, sigma = _mean_and_sigma(theta)
    return (mean + sigma * torch.randn_like(mean)).to(theta.dtype)


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """log p(x | theta) of log counts, differentiable in theta.

    Finite, with a finite gradient, for every finite theta: the dynamics are bounded (see
    `lotka_volterra`) and a sigma below 1e-4, which has prior probability 1e-16, counts as 1e-4.

    Args:
        theta: (N, 8).
        x: (42,), or (N, 42) for pairs.

    Returns:
        (N,), in the dtype of theta; computed in float64.

    >>> log_likelihood(torch.tensor([[0.55, 0.028, 0.8, 0.024, 33.9, 5.9, 0.25, 0.25]]), task().x_o).round()
    tensor([3.])
    """
    theta, x = paired(theta, x, 8, 42)
    mean, sigma = _mean_and_sigma(theta)
    z = (x - mean) / sigma
    return -(0.5 * z**2 + sigma.log() + 0.5 * math.log(2 * math.pi)).sum(-1).to(theta.dtype)


def to_pelts(x: Tensor) -> Tensor:
    """Log counts (..., 42) -> thousands of pelts (..., 21, 2), hare and lynx side by side."""
    return x.unflatten(-1, (2, 21)).transpose(-1, -2).exp()


def from_pelts(pelts: Tensor) -> Tensor:
    """Thousands of pelts (..., 21, 2), hare and lynx side by side -> log counts (..., 42).

    >>> x_o = task().x_o
    >>> bool(torch.allclose(from_pelts(to_pelts(x_o)), x_o))
    True
    """
    return pelts.log().transpose(-1, -2).flatten(-2)


def _mean_and_sigma(theta: Tensor) -> tuple[Tensor, Tensor]:
    mean = log_populations(theta[:, :6], 20).transpose(-1, -2).flatten(-2)
    sigma = theta[:, 6:].double().clamp(min=_SMALLEST_SIGMA).repeat_interleave(21, dim=-1)
    return mean, sigma
