"""Is x_o foreign to the runs that the likelihood is learnt from?

A certificate compares q with the learned likelihood, and new runs test that likelihood near the posterior.
Neither looks at x_o: where no run is like it the networks extrapolate, and a q that fits them well is "ok".
So x_o takes its place among the first round's runs, which are at draws of the prior, and
`certificate.predictive` asks how odd it is there. If x_o is one more such run, the p-value is exact. Later
rounds simulate where the networks believe that x_o comes from: beside their runs p would mean nothing.
"""

from torch import Tensor

from visbi.certificate.predictive import PredictiveCheck, prior_predictive_check
from visbi.rounds.local import FEWEST_RUNS
from visbi.simulators import Simulations

__all__ = ["among_runs"]

_ENTRIES = 2**20  # numbers compared at most, in two seconds; time grows with the square of the runs


def among_runs(x_o: Tensor, runs: Simulations) -> PredictiveCheck | None:
    """How odd x_o is among runs at draws of the prior.

    Of runs with a long x the first ones are taken: the p-value holds for any number of them. None with fewer
    than 100 runs, or where x is so long that not so many can be compared.

    Args:
        x_o: the observation, (1, ...).
        runs: of the first round, those that the likelihood learns from.

    >>> import torch
    >>> from visbi.priors import BoxUniform
    >>> from visbi.simulators import simulate
    >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
    >>> runs = simulate(lambda theta: theta, prior, 300, seed=0, show_progress_bar=False)
    >>> among_runs(torch.tensor([[30.0, -25.0]]), runs).verdict
    'foreign'
    """
    some = _ENTRIES // max(x_o.numel(), 1)
    if min(some, len(runs)) < FEWEST_RUNS:
        return None
    return prior_predictive_check(x_o[0], runs.x[:some])
