"""`q="auto"`: from a potential to a family, its certificate and weighted draws, by the ladder."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.modes import find_modes
from visbi.core.checks import violation
from visbi.core.progress import Progress
from visbi.families.base import Body, LinkedFamily
from visbi.families.bent import BentBody
from visbi.families.blend import BlendBody
from visbi.families.gaussians import Mixture
from visbi.families.mixture import MixtureBody
from visbi.fitting.bend import BentProposal
from visbi.fitting.budget import Budget
from visbi.fitting.config import TrainOptions
from visbi.fitting.flow import FlowProposal
from visbi.fitting.gradient import Trace
from visbi.fitting.ladder import Answer, climb
from visbi.fitting.pool import Proposal
from visbi.fitting.refine import Blend, around
from visbi.fitting.single import Problem
from visbi.fitting.state import AutoFit
from visbi.fitting.target import Target
from visbi.priors.transforms import Coordinates

__all__ = ["CONCERNS_AUTO", "fit_auto", "fit_of", "idle_options", "no_rebuilding", "starting"]

CONCERNS_AUTO = (
    "seed",
    "init",
    "show_progress_bar",
    "quality_control",
    "quality_control_metric",
    "retrain_from_scratch",
    "max_potential_evals",
    "max_seconds",
    "allow_failed",
)
"""Fields of `TrainOptions` that the automatic fit looks at; the others belong to the gradient loop."""

_MODE_DRAWS = 2048  # spread evenly


def idle_options(options: TrainOptions) -> list[str]:
    """Options that were chosen and that the automatic fit has no use for."""
    default = TrainOptions.DEFAULT
    names = [field.name for field in fields(TrainOptions) if field.name not in CONCERNS_AUTO]
    if isinstance(options.init, str):  # of a start, only draws are of use
        names.append("init")
    return [name for name in names if getattr(options, name) != getattr(default, name)]


def fit_auto(problem: Problem, x: Tensor | None, options: TrainOptions, *, earlier: Any = None) -> AutoFit:
    """The automatic fit to one observation.

    Args:
        problem: the potential and what surrounds it.
        x: the observation, for the record.
        options: see `CONCERNS_AUTO`.
        earlier: a family to start from beside the usual starts, or None.

    Raises:
        ValueError: the potential is finite at no draw of the prior, or `init` has another D.
    """
    budget = Budget(options.max_potential_evals, options.max_seconds)
    target = Target(problem.log_p, problem.coords, budget)
    start = starting(problem.coords, options.init, earlier)
    how = {"desc": "Fitting", "bar_format": "{desc} [{elapsed}]", "leave": False}
    with Progress(options.show_progress_bar, **how) as bar:
        answer = climb(target, start=start, say=lambda what: bar.title(f"Fitting: {what}"))
    draws = _weighted(problem.coords, answer)
    return fit_of(
        problem.coords,
        answer,
        x,
        options,
        draws=draws,
        modes=_modes(problem.coords, answer, draws),
        n_values=target.n_values,
        n_gradients=target.n_gradients,
        seconds=budget.seconds,
    )


def fit_of(
    coords: Coordinates,
    answer: Answer,
    x: Tensor | None,
    options: TrainOptions,
    *,
    draws: WeightedDraws | None = None,
    **told: Any,
) -> AutoFit:
    """The fit that an answer of the ladder is.

    Args:
        coords: in which the answer lives.
        answer: the answer.
        x: the observation, for the record.
        options: what the fit was told.
        draws: the answer's, with their weights, where these are known.
        **told: entries of the report that the ladder does not know.
    """
    family = LinkedFamily(_body(answer.q), coords, no_rebuilding)
    seed = None if options.seed is None else int(options.seed)
    report = replace(answer.report, seed=seed, **told)
    cut_short = report.stop_reason not in ("", "interrupted")
    trace = Trace((), report.stop_reason or f"answered by {report.rung}", cut_short=cut_short)
    draws = _weighted(coords, answer) if draws is None else draws
    return AutoFit(family.requires_grad_(False), x, trace, options, report, draws)


def starting(coords: Coordinates, init: str | Tensor, earlier: Any) -> Mixture | None:
    """What a climb may start from: moments of the draws `init` or of an earlier family, or nothing.

    Raises:
        ValueError: draws of another D.
    """
    if isinstance(init, Tensor):
        if init.shape[1] != coords.dim_theta:
            expected = f"draws of shape (N, {coords.dim_theta})"
            raise ValueError(violation("init", expected, tuple(init.shape)))
        theta = init.to(coords.low)
    elif earlier is not None:
        theta = earlier.sample((1024,))
    else:
        return None
    return around(coords.to_z(theta)[0].detach()[None])


def _body(q: Proposal) -> Body:
    """A proposal as a body that belongs to a family."""
    if isinstance(q, Mixture):
        return MixtureBody.of(q.log_weights[0].exp(), q.loc[0], q.cov[0])
    if isinstance(q, FlowProposal):
        return q.body
    if isinstance(q, BentProposal):
        return BentBody(_body(q.noise), q.bend.of_fits(0))
    assert isinstance(q, Blend)
    return BlendBody([_body(q.main), _body(q.rest)], torch.cat([1.0 - q.share, q.share]))


def no_rebuilding(dim: int) -> Body:
    """In the place of what would make a body with fresh weights: ValueError, there is no such thing."""
    raise ValueError(violation("q", "a family with fresh weights", "one that the automatic fit found"))


def _weighted(coords: Coordinates, answer: Answer) -> WeightedDraws:
    theta, ladj = coords.to_theta(answer.z)
    return WeightedDraws(theta, answer.ell - ladj, answer.log_q - ladj)


def _modes(coords: Coordinates, answer: Answer, draws: WeightedDraws) -> Any:
    if not bool(answer.ell.isfinite().any()):
        return ()
    z = answer.z[draws.chosen(_MODE_DRAWS)]
    return find_modes(z, lambda z: answer.q.log_prob(z[None])[0], lambda z: coords.to_theta(z)[0])
