"""`q="auto"` for F observations side by side: one climb, in calls for all of them.

What is spent on a fit, and how far it climbs with the others, is `climbing.SIDE_BY_SIDE`. A fit that ends
there neither "ok" nor "corrected", or with few of its draws in effect, is left to a climb alone. Modes are
not looked for: telling them apart costs more than such a fit.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from visbi.certificate.report import GOOD
from visbi.families.gaussians import Mixture
from visbi.fitting.auto import fit_of, starting
from visbi.fitting.budget import Budget
from visbi.fitting.climbing import SIDE_BY_SIDE
from visbi.fitting.config import TrainOptions
from visbi.fitting.ladder import Answer, climb_together
from visbi.fitting.state import AutoFit
from visbi.fitting.target import ManyTargets
from visbi.priors.transforms import Coordinates

__all__ = ["JointDensity", "fit_auto_together"]

JointDensity = Callable[[Tensor, Tensor], Tensor]
"""(theta (F', M, D), which (F',)) -> (F', M): the potentials `which` of all there are."""

_FEW = 0.1  # share of draws in effect below which a fit is left to a climb alone


def fit_auto_together(
    log_p: JointDensity, coords: Coordinates, x: Sequence[Tensor], options: TrainOptions
) -> list[AutoFit | None]:
    """The automatic fits to F observations.

    Args:
        log_p: their potentials.
        coords: coordinates of the prior's support.
        x: the observations, for the record.
        options: see `auto.CONCERNS_AUTO`; budgets are those of each fit.

    Returns:
        For each observation its fit, or None where it is left to a climb alone.

    >>> import torch
    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> x = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> def log_p(theta, which):
    ...     return -50 * (theta - x[which, None]).square().sum(-1)
    >>> fits = fit_auto_together(log_p, coordinates(prior), x, TrainOptions())
    >>> [round(float(fit.draws.theta.mean())) for fit in fits]
    [-1, 0, 1]
    """
    seconds = None if options.max_seconds is None else options.max_seconds * len(x)
    budget = Budget(options.max_potential_evals, seconds)
    targets = ManyTargets(log_p, coords, len(x), budget)
    start = starting(coords, options.init, None)
    answers = climb_together(
        targets, start=None if start is None else _repeated(start, len(x)), effort=SIDE_BY_SIDE
    )
    each = budget.seconds / len(x)
    values, gradients = targets.tally.values.tolist(), targets.tally.gradients.tolist()
    return [
        fit_of(coords, answer, x_o, options, n_values=values[i], n_gradients=gradients[i], seconds=each)
        if _good(answer) or answer.report.stop_reason
        else None
        for i, (answer, x_o) in enumerate(zip(answers, x, strict=True))
    ]


def _good(answer: Answer) -> bool:
    report = answer.report
    return report.status in GOOD and report.ess_fraction >= _FEW


def _repeated(q: Mixture, fits: int) -> Mixture:
    return Mixture(*(each.expand(fits, *each.shape[1:]) for each in (q.log_weights, q.loc, q.tril)))
