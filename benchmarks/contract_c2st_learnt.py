"""The linear Gaussian with its likelihood learnt from simulations, and the exact posterior to judge by.

D = 2, x = A theta + s eps as in the zoo, under the prior N(0, I) or uniform on [-2, 2]^2. Under the box the
exact posterior is the Gaussian that the likelihood alone would give, cut to the box, and is drawn by
rejection.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from visbi.estimators import fit_likelihood, fit_ratio
from visbi.potentials import LikelihoodPotential, RatioPotential
from visbi.potentials.base import BasePotential
from visbi.priors import BoxUniform
from visbi.simulators import simulate
from visbi.simulators.zoo import linear_gaussian

__all__ = ["LEARNT", "Learnt", "learn", "learnt_variation", "observations"]

LEARNT = ("NLE", "NRE")
PRIORS = ("gaussian", "box")
SIMULATIONS = 20_000
OBSERVATIONS = 20
HALF_WIDTH = 2.0
_OBSERVATION_SEED = 5_000

MATRIX = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
NOISE = 0.5
_TASK = linear_gaussian.task(2, matrix=MATRIX, noise_scale=NOISE)


@dataclass(frozen=True)
class Learnt:
    """A potential from simulations.

    Attributes:
        potential: log p(theta | x) + const, as learnt.
        prior: over theta.
        theta, x: the simulations.
        seconds: of CPU, for the learning.
        exact: (x (2,), n) -> n draws (n, 2) of the exact posterior.
    """

    potential: BasePotential
    prior: Distribution
    theta: Tensor
    x: Tensor
    seconds: float
    exact: Callable[[Tensor, int], Tensor]


def learn(kind: str, prior_name: str, seed: int) -> Learnt:
    """Simulate and learn, by `fit_likelihood` ("NLE") or `fit_ratio` ("NRE") as they come."""
    prior = _prior(prior_name)
    runs = simulate(_TASK.simulator, prior, SIMULATIONS, seed=seed, show_progress_bar=False)
    began = time.process_time()
    potential: BasePotential
    if kind == "NLE":
        likelihood = fit_likelihood(runs.theta, runs.x, seed=seed, show_progress_bar=False).estimator
        potential = LikelihoodPotential(likelihood, prior)
    else:
        ratio = fit_ratio(runs.theta, runs.x, seed=seed, show_progress_bar=False).estimator
        potential = RatioPotential(ratio, prior)
    seconds = time.process_time() - began
    exact = _exact_gaussian if prior_name == "gaussian" else _exact_box
    return Learnt(potential, prior, runs.theta, runs.x, seconds, exact)


def observations(prior_name: str) -> Tensor:
    """The observations (M, 2) at which q is judged: the same for every seed, none of them seen by a fit."""
    runs = simulate(
        _TASK.simulator, _prior(prior_name), OBSERVATIONS, seed=_OBSERVATION_SEED, show_progress_bar=False
    )
    return runs.x


def learnt_variation(learnt: Learnt, exact: Tensor, x: Tensor) -> float:
    """Total variation between the learnt potential's posterior and the exact one, whose draws are given.

    With r the ratio of the learnt and the exact density, each up to a factor, it is E (1 - r / E r)_+ over
    exact draws; the prior is the same in both.
    """
    assert _TASK.log_likelihood is not None
    with torch.no_grad():
        log_p = learnt.potential.evaluate(exact, x[None]) - learnt.prior.log_prob(exact)
    log_r = log_p.double() - _TASK.log_likelihood(exact.double(), x.double())
    r = torch.softmax(log_r, 0) * len(log_r)
    return float((1.0 - r).clamp_min(0).mean())


def _prior(name: str) -> Distribution:
    if name == "gaussian":
        return _TASK.prior
    return BoxUniform(torch.full((2,), -HALF_WIDTH), torch.full((2,), HALF_WIDTH))


def _exact_gaussian(x: Tensor, n: int) -> Tensor:
    assert _TASK.posterior is not None
    return _TASK.posterior(x).sample(torch.Size([n]))


def _exact_box(x: Tensor, n: int) -> Tensor:
    """By rejection, from the posterior under a flat prior on all of the plane."""
    inverse = torch.linalg.inv(MATRIX.double())
    flat = MultivariateNormal(inverse @ x.double(), NOISE**2 * inverse @ inverse.T)
    kept = torch.empty(0, 2, dtype=torch.float64)
    while len(kept) < n:
        theta = flat.sample(torch.Size([4 * n]))
        kept = torch.cat([kept, theta[(theta.abs() < HALF_WIDTH).all(1)]])
    return kept[:n].to(x.dtype)
