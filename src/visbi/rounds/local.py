r"""Is the learned likelihood the simulator's where it matters? A two-sample test at one theta.

The spread of an ensemble cannot show what all networks get wrong alike; new runs of the simulator can. Runs
(theta, x) that no network has learnt from, and pairs (theta, x') with x' ~ q(x | theta) at the same thetas,
have one distribution if and only if q is right at almost all of these thetas. The local two-sample test of
`certificate.local` asks it at one of them, with theta and x in each other's places: the runs of a round,
drawn around the posterior, test the likelihood of the round before.

x and x' enter less the mean and by the deviation of a few further draws of q(x | theta) at their theta. How x
depends on theta, as far as q knows it, then need not be learnt by the classifier; what exchanges could
tell is not changed, as both of a pair are changed alike.

`infer` asks at that theta among the runs which has the highest posterior density under the likelihood that is
tested. The posterior's mean may lie between modes, where no run is. The choice looks at the thetas alone,
never at the x of the runs, so the p-value holds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visbi.certificate.local import LocalC2ST, local_c2st
from visbi.certificate.ranks import p_text
from visbi.core.checks import non_negative_int, violation
from visbi.core.random import spawn_seeds
from visbi.estimators import LikelihoodEnsemble
from visbi.potentials.base import BasePotential
from visbi.simulators import Simulations

__all__ = ["FEWEST_RUNS", "LikelihoodTest", "likelihood_test", "place_to_test"]

FEWEST_RUNS = 100
"""Runs below which nothing is tested."""
_DRAWS = 1000  # of q(x | theta_o)
_MOMENTS = 10  # further draws of q(x | theta) for each run


@dataclass(frozen=True, eq=False)
class LikelihoodTest(LocalC2ST):
    """What a classifier sees of a learned likelihood at one theta; the fields are about the entries of x.

    "over-confident" says that the simulator's x is wider than the learned likelihood's, "biased" that it lies
    elsewhere.
    """

    def __str__(self) -> str:
        p = p_text(self.p_value)
        if self.verdict == "calibrated":
            return f"a classifier cannot tell the simulator from the learned likelihood ({p})"
        if self.verdict == "biased":
            i = int(np.abs(self.shift).argmax())
            how = f"moved by {self.shift[i]:+.2f} deviations from"
        else:
            i = int(np.abs(np.log(self.scale)).argmax())
            how = f"{self.scale[i]:.2f} times as wide as"
        said = f"the simulator's {self.names[i]} is {how} the learned likelihood's"
        return f"the learned likelihood is {self.verdict}: {said} ({p})"


def likelihood_test(
    estimator: LikelihoodEnsemble,
    runs: Simulations,
    theta_o: Tensor,
    *,
    classifier: str = "regression",
    n_null: int = 200,
    seed: int = 1,
) -> LikelihoodTest:
    """Can a classifier tell the simulator's x from the learned likelihood's, near theta_o?

    Args:
        estimator: the learned likelihood.
        runs: at least 100, none of which it has learnt from.
        theta_o: (D,).
        classifier, n_null: as for `visbi.certificate.local_c2st`; "regression" is quick at any size.
        seed: of the likelihood's draws and of the classifiers.

    Returns:
        The test; its verdict, shift and scale are about the entries of x given theta_o.

    Raises:
        ValueError: too few runs, or theta_o of another length.

    >>> import torch
    >>> from visbi.core.random import seeded
    >>> from visbi.estimators import TrainingOptions, fit_likelihood
    >>> from visbi.simulators import simulate
    >>> def simulator(theta):
    ...     return theta + torch.randn_like(theta)
    >>> with seeded(0):
    ...     theta, fresh = torch.randn(100, 1), torch.randn(300, 1)
    ...     x = 3 * simulator(theta)
    >>> hardly = TrainingOptions(max_epochs=1)
    >>> learnt = fit_likelihood(theta, x, options=hardly, seed=0, show_progress_bar=False)
    >>> runs = simulate(simulator, fresh, 300, seed=0, show_progress_bar=False)
    >>> likelihood_test(learnt.estimator, runs, torch.zeros(1), n_null=20).verdict
    'under-confident'
    """
    theta_o = theta_o.to(runs.theta)
    if theta_o.shape != runs.theta.shape[1:]:
        raise ValueError(violation("theta_o", f"shape {tuple(runs.theta.shape[1:])}", tuple(theta_o.shape)))
    if len(runs) < FEWEST_RUNS:
        raise ValueError(violation("runs", f"at least {FEWEST_RUNS} successful runs", len(runs)))
    seeds = spawn_seeds(non_negative_int("seed", seed), 3)
    names = [f"x{[int(i) for i in where]}" for where in np.ndindex(tuple(runs.x.shape[1:]))]
    draws = estimator.sample(runs.theta, 1 + _MOMENTS, seed=seeds[0]).flatten(2).double()
    at_o = estimator.sample(theta_o[None], _DRAWS, seed=seeds[1]).flatten(1).double()
    x = runs.x.flatten(1).double()
    draws, at_o = (_bounded(part, x) for part in (draws, at_o))
    loc, scale = draws[1:].mean(0), draws[1:].std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    found = local_c2st(
        (x - loc) / scale,
        runs.theta,
        (draws[0] - loc) / scale,
        theta_o,
        (at_o - at_o.mean(0)) / at_o.std(0).clamp_min(1e-300),
        classifier=classifier,
        n_null=n_null,
        names=names,
        seed=seeds[2],
    )
    return LikelihoodTest(**vars(found))


def place_to_test(potential: BasePotential, theta: Tensor, x_o: Tensor) -> Tensor:
    """That of theta (N, D) whose posterior density is the highest, (D,).

    Args:
        potential: of the posterior whose likelihood is to be tested.
        theta: of runs around it.
        x_o: the observation, (1, ...).
    """
    return theta[potential.evaluate(theta, x_o).detach().nan_to_num(nan=-float("inf")).argmax()]


def _bounded(draws: Tensor, x: Tensor) -> Tensor:
    """Draws no farther beyond the range of the runs than that is wide: a flow may draw up to infinity."""
    low, high = x.amin(0), x.amax(0)
    width = high - low
    return draws.nan_to_num(nan=float("inf")).clamp(low - width, high + width)
