"""q(theta | x) at many observations: a certificate for each, and draws that are corrected at each.

Draws of q(. | x) are weighed against the potential at every x, many x at a time. Where the weights are sound
the draws are resampled with them (neural importance sampling: Dax et al. 2023); where they are not, the
automatic ladder finds a q of that x alone, starting from draws of q(. | x).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.report import Report, certify_many
from visbi.core.random import fresh_seed, seeded
from visbi.core.types import LogDensity
from visbi.correcting import POOL, corrected, pool_for
from visbi.fitting.auto import fit_auto
from visbi.fitting.config import INIT_DRAWS, TrainOptions
from visbi.fitting.single import Problem
from visbi.fitting.state import AmortizedFit
from visbi.potentials.base import BasePotential

__all__ = ["SOUND", "certificates", "corrected_at_each"]

SOUND = ("ok", "corrected")
"""Statuses at which resampled draws can be used."""
_AT_ONCE = 2**18  # draws that are held together
_PAIRS = 16_384  # at which the potential is evaluated at once

MakeProblem = Callable[[Tensor], Problem]


def certificates(fit: AmortizedFit, potential: BasePotential, n: int) -> list[Report]:
    """One report for each observation that `fit` is looked at in, from n draws of q there.

    They say "corrected" where resampling with the weights mends q.
    """
    reports = []
    for draws in _weighed(fit, potential, n):
        reports += _reports(fit, draws)
    return reports


def _reports(fit: AmortizedFit, draws: Sequence[WeightedDraws]) -> list[Report]:
    log_p, log_q = (torch.stack([getattr(d, name) for d in draws]) for name in ("log_p", "log_q"))
    return certify_many(log_p, log_q, stop_reason=fit.trace.stop_reason, resampled=True)


def _weighed(fit: AmortizedFit, potential: BasePotential, n: int) -> Iterator[list[WeightedDraws]]:
    """n draws at each x, some x at a time."""
    assert fit.x is not None
    for x in fit.x.split(max(1, _AT_ONCE // n)):
        with torch.no_grad():
            theta, log_q = fit.conditional.draw(x, n)
            repeated = x.expand(n, *x.shape).flatten(0, 1)
            pairs = zip(theta.flatten(0, 1).split(_PAIRS), repeated.split(_PAIRS), strict=True)
            values = [potential.evaluate(some, beside, x_is_iid=False).double() for some, beside in pairs]
        log_p = torch.cat(values).view_as(log_q)
        yield [WeightedDraws(theta[:, i], log_p[:, i], log_q[:, i]) for i in range(len(x))]


def corrected_at_each(
    shape: torch.Size, fit: AmortizedFit, potential: BasePotential, problem: MakeProblem
) -> Tensor:
    """Corrected draws for each observation that `fit` is looked at in, (*shape, M, D).

    Warns where neither q(. | x) nor what the ladder found instead passes its certificate.

    Args:
        shape: of the draws of each.
        fit, potential: q and what it is weighed against.
        problem: x -> the problem that the ladder is given.

    Raises:
        ValueError: the potential is finite nowhere.
    """
    assert fit.x is not None
    columns: list[Tensor] = []
    poor: list[int] = []
    for some in _weighed(fit, potential, POOL):
        for draws, report in zip(some, _reports(fit, some), strict=True):
            here = fit.at(fit.x[len(columns)][None])
            seed = fresh_seed()
            if report.status in SOUND:
                column = corrected(_enough(draws, shape.numel(), here, potential, seed), shape, seed)
            else:
                column, report = _refined(shape, here, problem, seed)
                poor += [len(columns)] if report.status not in SOUND else []
            columns.append(column)
    if poor:
        where = ", ".join(map(str, poor[:8])) + ("" if len(poor) <= 8 else ", ...")
        warnings.warn(
            f"draws at {len(poor)} of {len(fit.x)} observations (rows {where} of x) are not certified: "
            "neither q(theta | x) nor a q found for that x alone passes. Look at certify(x) and refine(x).",
            stacklevel=4,  # whoever asked the posterior for draws
        )
    return torch.stack(columns, -2)


def _enough(
    draws: WeightedDraws, n: int, fit: AmortizedFit, potential: BasePotential, seed: int
) -> WeightedDraws:
    """Those draws and as many more of the same q as n corrected ones need."""
    with seeded(seed + 1):
        while (needed := draws.needed(n)) > len(draws.theta):
            (more,) = next(_weighed(fit, potential, needed - len(draws.theta)))
            draws = draws.with_(more)
    return draws


def _refined(shape: torch.Size, fit: AmortizedFit, problem: MakeProblem, seed: int) -> tuple[Tensor, Report]:
    """Draws from a q of this x alone, and its report."""
    assert fit.x is not None
    here = problem(fit.x)
    with seeded(seed):
        options = TrainOptions(
            init=fit.sample(torch.Size([INIT_DRAWS])), show_progress_bar=False, allow_failed=True
        )
        found = fit_auto(here, fit.x, options)
    log_p: LogDensity = here.log_p
    return corrected(pool_for(shape.numel(), found, log_p, seed), shape, seed), found.report
