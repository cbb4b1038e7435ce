r"""q(theta | x) at many observations: a certificate for each, and draws that are corrected at each.

Draws of q(. | x) are weighed against the potential at every x, many x at a time. Where the weights are sound
the draws are resampled with them (neural importance sampling: Dax et al. 2023); where they are not, the
automatic ladder finds a q of that x alone, starting from draws of q(. | x).

A learned potential U is as much of an estimate as q is, from other features of the same simulations, and
where both are off, each in its own way, what lies between them may be nearer to the posterior than either:

    p_a(theta | x)  ~  exp(a U(theta; x)) q(theta | x)^(1 - a),    0 <= a <= 1,

a logarithmic pool (Genest, Zidek: Combining probability distributions. 1986; of simulation-based posteriors:
Yao, Regaldo-Saint Blancard, Domke: Simulation-based stacking. 2023). `share_of_potential` takes the a under
which simulations that neither has seen are most probable, and corrected draws are draws of p_a.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.report import GOOD, Report
from visbi.certificate.rows import cleaned
from visbi.certificate.verdict import certify_many
from visbi.core.checks import violation
from visbi.core.logs import log_sum_exp
from visbi.core.losses import within_reach
from visbi.core.random import fresh_seed, seeded
from visbi.core.types import LogDensity
from visbi.correcting import POOL, corrected, fell, grown, pool_for
from visbi.fitting.auto import fit_auto
from visbi.fitting.config import INIT_DRAWS, TrainOptions
from visbi.fitting.single import Problem
from visbi.fitting.state import AmortizedFit
from visbi.potentials.base import BasePotential
from visbi.potentials.pairs import evaluate_each

__all__ = ["certificates", "corrected_at_each", "share_of_potential"]

_AT_ONCE = 2**18  # draws that are held together
_SHARES = 20  # steps from q alone to the potential alone
_SURE = 2.0  # standard errors of the mean gain from which the potential alone is left

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
            log_p = _of_pairs(potential, theta, x)
        yield [WeightedDraws(theta[:, i], log_p[:, i], log_q[:, i]) for i in range(len(x))]


def _of_pairs(potential: BasePotential, theta: Tensor, x: Tensor) -> Tensor:
    """The potential (n, M) of theta (n, M, D), each row of it beside x (M, ...)."""
    return torch.stack(evaluate_each(potential, theta.unbind(1), x.split(1), in_rows=True), 1)


def share_of_potential(
    fit: AmortizedFit, potential: BasePotential, theta: Tensor, x: Tensor, n: int
) -> float:
    """The a of the module's text under which simulations are most probable.

    One, the potential alone, unless the mean gain over it is more than two of its standard errors. How
    probable theta (M, D) at x (M, ...) is rests on n draws of q at each x, which give p_a its constant.

    Raises:
        ValueError: the potential is not finite at most of the simulations, or q is not.
    """
    with torch.no_grad():
        own_q = fit.conditional.log_prob(theta, x).double()
        own_p = _of_pairs(potential, theta[None], x)[0]
    lead = own_p - own_q
    lead = torch.where(lead.isfinite(), lead, -torch.inf)
    if not bool(lead.median().isfinite()):
        expected = "simulations at which q and the potential are finite, most of them"
        raise ValueError(violation("theta` and `x", expected, "others"))
    lead = -within_reach(-lead)
    shares = torch.linspace(0.0, 1.0, _SHARES + 1, dtype=lead.dtype, device=lead.device)[:, None]
    rows = [d.log_p - d.log_q for some in _weighed(fit.at(x), potential, n) for d in some]
    log_w = cleaned(torch.stack(rows))
    log_z = [torch.zeros_like(lead), *(log_sum_exp(a * log_w, 1) - math.log(n) for a in shares[1:])]
    score = shares * lead - torch.stack(log_z)  # less log q, which is the same for all
    gain = score - score[-1]
    best = int(gain.mean(1).argmax())
    error = float(gain[best].std()) / len(x) ** 0.5
    return float(shares[best]) if float(gain[best].mean()) > _SURE * error else 1.0


def _pooled(draws: WeightedDraws, share: float) -> WeightedDraws:
    """Draws of q that are weighed with p_a."""
    if share == 1:
        return draws
    return replace(draws, log_p=share * draws.log_p + (1 - share) * draws.log_q)


def corrected_at_each(
    shape: torch.Size, fit: AmortizedFit, potential: BasePotential, problem: MakeProblem
) -> Tensor:
    """Corrected draws for each observation that `fit` is looked at in, (*shape, M, D).

    They are those of the potential, or of p_a if the fit has another share than one. Warns where neither
    q(. | x) nor what the ladder found instead passes its certificate.

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
    for raw in _weighed(fit, potential, POOL):
        some = [_pooled(draws, fit.share) for draws in raw]
        for draws, report in zip(some, _reports(fit, some), strict=True):
            here = fit.at(fit.x[len(columns)][None])
            seed = fresh_seed()
            good = report.status in GOOD
            draws = _enough(draws, shape.numel(), here, potential, seed) if good else draws
            if good and not fell(draws):
                column = corrected(draws, shape, seed)
            else:
                column, report = _refined(shape, here, problem, seed)
                poor += [len(columns)] if report.status not in GOOD else []
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
        return grown(draws, n, lambda more: _pooled(next(_weighed(fit, potential, more))[0], fit.share))


def _refined(shape: torch.Size, fit: AmortizedFit, problem: MakeProblem, seed: int) -> tuple[Tensor, Report]:
    """Draws from a q of this x alone, and its report."""
    assert fit.x is not None
    here = problem(fit.x)
    if fit.share < 1:
        here = replace(here, log_p=_pooled_density(here.log_p, fit))
    with seeded(seed):
        options = TrainOptions(
            init=fit.sample(torch.Size([INIT_DRAWS])), show_progress_bar=False, allow_failed=True
        )
        found = fit_auto(here, fit.x, options)
    return corrected(pool_for(shape.numel(), found, here.log_p, seed), shape, seed), found.report


def _pooled_density(log_p: LogDensity, fit: AmortizedFit) -> LogDensity:
    """p_a at the one x of `fit`."""

    def pooled(theta: Tensor) -> Tensor:
        return fit.share * log_p(theta) + (1 - fit.share) * fit.log_prob(theta)

    return pooled
