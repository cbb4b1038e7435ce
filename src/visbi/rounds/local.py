r"""Is the learned likelihood the simulator's where it matters? A two-sample test at one theta.

The spread of an ensemble cannot show what all networks get wrong alike; new runs of the simulator can. Runs
(theta, x) that no network has learnt from, and pairs (theta, x') with x' ~ q(x | theta) at the same thetas,
have one distribution if and only if q is right at almost all of these thetas. The local two-sample test of
`certificate.local` asks it at one of them, such as the posterior's mean, with theta and x in each other's
places: the runs of a round, drawn around the posterior, test the likelihood of the round before.
"""

from torch import Tensor

from visbi.certificate.local import LocalC2ST, local_c2st
from visbi.core.checks import non_negative_int, violation
from visbi.core.random import spawn_seeds
from visbi.estimators import LikelihoodEnsemble
from visbi.simulators import Simulations

__all__ = ["likelihood_test"]

_DRAWS = 1000  # of q(x | theta_o)


def likelihood_test(
    estimator: LikelihoodEnsemble,
    runs: Simulations,
    theta_o: Tensor,
    *,
    classifier: str = "quadratic",
    n_null: int = 100,
    seed: int = 1,
) -> LocalC2ST:
    """Can a classifier tell the simulator's x from the learned likelihood's, near theta_o?

    Args:
        estimator: the learned likelihood.
        runs: at least 100, none of which it has learnt from.
        theta_o: (D,).
        classifier, n_null: as for `visbi.certificate.local_c2st`; "quadratic" is quick while x and theta have
            few entries together.
        seed: of the likelihood's draws and of the classifiers.

    Returns:
        The test; its verdict, shift and scale are about the entries of x given theta_o.

    Raises:
        ValueError: too few runs, or theta_o of another length.

    >>> import torch
    >>> from visbi.estimators import TrainingOptions, fit_likelihood
    >>> from visbi.simulators import simulate
    >>> def simulator(theta):
    ...     return theta + torch.randn_like(theta)
    >>> theta = torch.randn(100, 1)
    >>> hardly = TrainingOptions(max_epochs=1)
    >>> learnt = fit_likelihood(
    ...     theta, 3 * simulator(theta), options=hardly, seed=0, show_progress_bar=False
    ... )
    >>> runs = simulate(simulator, torch.randn(300, 1), 300, seed=0, show_progress_bar=False)
    >>> likelihood_test(learnt.estimator, runs, torch.zeros(1), n_null=20).verdict
    'under-confident'
    """
    theta_o = theta_o.to(runs.theta)
    if theta_o.shape != runs.theta.shape[1:]:
        raise ValueError(violation("theta_o", f"shape {tuple(runs.theta.shape[1:])}", tuple(theta_o.shape)))
    seeds = spawn_seeds(non_negative_int("seed", seed), 3)
    learnt = estimator.sample(runs.theta, 1, seed=seeds[0])[0]
    at_o = estimator.sample(theta_o[None], _DRAWS, seed=seeds[1])[:, 0]
    x, learnt, at_o = (part.flatten(1) for part in (runs.x, learnt, at_o))
    return local_c2st(
        x, runs.theta, learnt, theta_o, at_o, classifier=classifier, n_null=n_null, seed=seeds[2]
    )
