"""A fit to one observation: place q, then follow the gradient of the chosen divergence."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.types import LogDensity
from visbi.families.base import Family, LinkedFamily
from visbi.fitting.budget import Budget
from visbi.fitting.config import TrainOptions
from visbi.fitting.explore import explore
from visbi.fitting.gradient import fit_gradient, make_optimizer, trainable, warm_up
from visbi.fitting.match import match_gaussian
from visbi.fitting.state import SingleFit
from visbi.fitting.target import Target, log_standard_normal
from visbi.objectives import Loss, forward_kl, importance_weighted, renyi, reverse_kl
from visbi.priors.transforms import Coordinates

__all__ = ["Problem", "fit_single", "placed_alike"]


@dataclass(frozen=True)
class Problem:
    """What is fitted.

    Attributes:
        log_p: the potential at the observation, (N, D) -> (N,).
        log_prior: (N, D) -> (N,).
        coords: coordinates of the prior's support.
    """

    log_p: LogDensity
    log_prior: LogDensity
    coords: Coordinates


def fit_single(
    family: Family,
    problem: Problem,
    method: str,
    options: TrainOptions,
    *,
    before: SingleFit | None = None,
    warm: bool = False,
) -> SingleFit:
    """Fit q to one observation.

    Args:
        family: q; trained in place unless it is placed anew.
        problem: the potential and what surrounds it.
        method: the divergence.
        options: see `TrainOptions`.
        before: an earlier fit to go on from, optimiser included where its options allow.
        warm: q's present weights are a start chosen by the user, so it is not moved before the fit.

    Returns:
        The fit, its `x` left for the caller to fill in.
    """
    if options.retrain_from_scratch:
        family, before, warm = family.fresh(), None, False
    trainable(family)
    going_on = before is not None and before.family is family
    if not going_on and not warm:
        family = _place(family, problem, options)
    optimizer, scheduler = make_optimizer(family, options)
    kept = before if going_on and not options.reset_optimizer else None
    if kept is not None and _same_schedule(kept.options, options):
        optimizer, scheduler = kept.optimizer, kept.scheduler
    objective = partial(_objective(method, options), family, _within_budget(problem.log_p, options))
    trace = fit_gradient(family, objective, optimizer, scheduler, options)
    return SingleFit(family, None, trace, options, method, optimizer, scheduler)


def placed_alike(family: LinkedFamily, problem: Problem, options: TrainOptions, n: int) -> list[LinkedFamily]:
    """Fresh families for n fits of one make, each where `init` says it starts.

    Args:
        family: what they are like.
        problem: the prior and the coordinates of all; its potential is not looked at.
        options: see `TrainOptions`; of `init`, "prior" or draws: the same place for all.
        n: how many.
    """
    first = _place(family.fresh(), problem, options)
    assert isinstance(first, LinkedFamily)
    shared = {id(first.coords): first.coords}
    return [first, *(copy.deepcopy(first, dict(shared)) for _ in range(n - 1))]


def _within_budget(log_p: LogDensity, options: TrainOptions) -> LogDensity:
    """The potential, taken from the budget that the options give."""
    if options.max_potential_evals is None and options.max_seconds is None:
        return log_p
    budget = Budget(options.max_potential_evals, options.max_seconds)

    def spending(theta: Tensor) -> Tensor:
        budget.spend(len(theta))
        return log_p(theta)

    return spending


def _place(family: Family, problem: Problem, options: TrainOptions) -> Family:
    """q where `init` says it starts."""
    if isinstance(options.init, str) and options.init == "prior":
        warm_up(family, problem.log_prior, options)
        return family
    if not isinstance(family, LinkedFamily):
        expected = "'prior' for a q that is a user's own distribution"
        raise ValueError(violation("init", expected, repr(options.init)))
    loc, cov = _moments(problem, options.init)
    tril = torch.linalg.cholesky(cov)
    family = family.placed(loc, tril)

    def log_place(theta: Tensor) -> Tensor:
        z, ladj = problem.coords.to_z(theta)
        y = torch.linalg.solve_triangular(tril, (z - loc).mT, upper=False).mT
        return log_standard_normal(y) - tril.diagonal().log().sum() - ladj

    warm_up(family, log_place, options)  # for families that do not start near the identity
    return family


def _moments(problem: Problem, init: str | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, in coordinates, of the Gaussian that `init` names."""
    if isinstance(init, Tensor):
        if init.shape[1] != problem.coords.dim_theta:
            expected = f"draws of shape (N, {problem.coords.dim_theta})"
            raise ValueError(violation("init", expected, tuple(init.shape)))
        z = problem.coords.to_z(init.to(problem.coords.low))[0].detach()
        cov = torch.cov(z.mT).reshape(z.shape[1], z.shape[1])
        return z.mean(0), cov + 1e-9 * cov.diagonal().mean() * torch.eye(len(cov)).to(cov)
    target = Target(problem.log_p, problem.coords)
    if init == "match":
        match = match_gaussian(target)
        return match.loc[0], match.cov[0]
    loc, cov = explore(target).moments()
    return loc[0], cov[0]


def _objective(method: str, options: TrainOptions) -> Callable[[Family, LogDensity], Loss]:
    """The loss of a method with the options that concern it."""
    stick, dreg = options.stick_the_landing, options.dreg
    # DReG, where it is the default, would take precedence over an estimator that was asked for
    flags = {"stick_the_landing": stick, "dreg": False if dreg is None and stick is not None else dreg}
    chosen: dict[str, Any] = {name: flag for name, flag in flags.items() if flag is not None}
    n = options.n_particles
    if method == "fKL":
        return lambda q, p: forward_kl(q, p, n, weight_transform=options.weight_transform)
    if method == "IW":
        return lambda q, p: importance_weighted(q, p, n, K=options.K, **chosen)
    if method == "alpha":
        return lambda q, p: renyi(q, p, n, alpha=options.alpha, **chosen)
    # for a single draw DReG and sticking the landing are the same estimator
    path = chosen.get("stick_the_landing", True) or chosen.get("dreg", False)
    return lambda q, p: reverse_kl(q, p, n, stick_the_landing=path)


def _same_schedule(a: TrainOptions, b: TrainOptions) -> bool:
    """Whether an optimiser made under `a` does what `b` asks for."""
    names = ("learning_rate", "gamma", "optimizer", "scheduler")
    return all(_same_call(getattr(a, name), getattr(b, name)) for name in names)


def _same_call(a: Any, b: Any) -> bool:
    if isinstance(a, partial) and isinstance(b, partial):  # two partials are never equal, even copies
        return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    return a == b
