r"""The one gradient loop: optimiser, trace, stopping.

Stopping. The loss is noisy, so single values say little: means over windows of `WINDOW` steps are compared.
A window improves on the best one so far if it is lower by more than the standard error of their difference
and by more than `eps`. `_PATIENCE` windows without an improvement end the fit. The losses are in nats, so
`eps` is not taken relative to their size: a potential shifted by a constant stops at the same step.

Settling. Where a fit stops so, its weights still wander about the optimum, at a distance that the learning
rate and the gradient's noise decide; so they give way to their mean over the last window (Polyak, Juditsky
1992), unless the loss is higher there. On Gaussian targets of 2 and 5 dimensions with the defaults this
takes the total variation from the posterior, under forward KL, from .022 to .008 (Gaussian), .070 to .029
(naf), .041 to .019 (nsf) and .037 to .023 (maf, D = 5). Means over three windows are not better where the
loss still creeps.

A step whose loss or gradient is not finite changes nothing; it is counted, and `GIVE_UP` of them in a row
end the fit.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visbi.core.progress import Progress
from visbi.core.types import LogDensity
from visbi.families.base import Family
from visbi.fitting.budget import BudgetReached
from visbi.fitting.config import TrainOptions
from visbi.objectives import Loss, reverse_kl

__all__ = ["Trace", "fit_gradient", "make_optimizer", "trainable", "warm_up"]

WINDOW = 50
_PATIENCE = 3
JUDGE = 10  # losses that decide between the last weights and their mean, within max_num_iters
GIVE_UP = 50
_WARM_UP_LEARNING_RATE = 1e-2
_WARM_UP_DRAWS = 64  # at least, to judge whether it is there
_WARM_UP_DONE = 0.05  # sd of log q - log prior: the two differ by about its square, .0025 nats


@dataclass(frozen=True)
class Trace:
    """How a fit went.

    Attributes:
        loss: the objective at every step, lower is better.
        stop_reason: why the fit ended, in a sentence.
        skipped: steps whose loss or gradient was not finite.
        excluded: particles, over all steps, whose potential was not finite.
        cut_short: whether a budget ended the fit.
    """

    loss: tuple[float, ...]
    stop_reason: str
    skipped: int = 0
    excluded: int = 0
    cut_short: bool = False

    @property
    def num_iters(self) -> int:
        """Steps taken."""
        return len(self.loss)


def trainable(family: Family) -> list[Tensor]:
    """What an optimiser steps; ValueError if there is nothing."""
    if parameters := family.trainable():
        return parameters
    raise ValueError("`q`: expected trainable parameters; got none (pass `parameters=` or `modules=`)")


def make_optimizer(family: Family, options: TrainOptions) -> tuple[torch.optim.Optimizer, Any]:
    """A fresh optimiser for the family's parameters, and its schedule."""
    parameters = trainable(family)
    # one fused kernel instead of a dozen small ones per parameter
    fused = {"fused": True} if options.optimizer is torch.optim.Adam and _can_fuse(parameters) else {}
    optimizer = _with(options.optimizer, parameters, lr=options.learning_rate, **fused)
    gamma = {"gamma": options.gamma} if "gamma" in inspect.signature(options.scheduler).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        return optimizer, _with(options.scheduler, optimizer, **gamma)


def _with(make: Callable[..., Any], argument: Any, **keywords: Any) -> Any:
    """`make(argument, **keywords)`, where keywords that a `functools.partial` has already bound stand."""
    bound = getattr(make, "keywords", None) or {}
    return make(argument, **{name: value for name, value in keywords.items() if name not in bound})


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def fit_gradient(
    family: Family,
    objective: Callable[[], Loss],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    options: TrainOptions,
) -> Trace:
    """Minimise `objective` over the family's parameters, in place.

    Args:
        family: q.
        objective: draws a fresh estimate of the loss.
        optimizer, scheduler: as from `make_optimizer`.
        options: see `TrainOptions`.

    Returns:
        The trace. Ctrl-C ends the fit early and says so in the trace, and so does a potential that raises
        `BudgetReached`.
    """
    parameters = family.trainable()
    losses: list[float] = []
    skipped = excluded = in_a_row = 0
    cut_short = False
    reason = f"reached max_num_iters = {options.max_num_iters}"
    show = options.show_progress_bar
    steps = Progress(show, range(options.max_num_iters), desc="Fitting q", leave=False)
    advance = _advance(scheduler)
    mean = _Mean(parameters)
    try:
        for _ in steps:
            loss = objective()
            excluded += loss.excluded
            moved = _step(loss, parameters, optimizer, options)
            if moved:
                advance(loss.value)
            losses.append(loss.value)
            mean.add(parameters)
            in_a_row = 0 if moved else in_a_row + 1
            skipped += not moved
            if in_a_row >= GIVE_UP:
                reason = stopped_by_nan()
                break
            if options.check_for_convergence and converged(losses, options):
                reason = stopped_by_convergence()
                if len(losses) + JUDGE <= options.max_num_iters:
                    mean.settle(parameters, objective, losses[-WINDOW:])
                break
            if len(losses) % 10 == 0:
                steps.note(f"loss={sum(losses[-10:]) / 10:.3f}")
    except BudgetReached as reached:
        reason, cut_short = str(reached), True
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        steps.close()
    return Trace(tuple(losses), reason, skipped, excluded, cut_short)


def warm_up(family: Family, log_prior: LogDensity, options: TrainOptions) -> int:
    """Move q onto the prior by the reverse KL, in place; returns the number of steps it took."""
    optimizer = torch.optim.Adam(family.trainable(), lr=_WARM_UP_LEARNING_RATE)
    for step in range(options.warm_up_rounds):
        if _spread(family, log_prior, options.n_particles) < _WARM_UP_DONE:
            return step
        loss = reverse_kl(family, log_prior, options.n_particles)
        _step(loss, family.trainable(), optimizer, options)
    return options.warm_up_rounds


@torch.no_grad()
def _spread(family: Family, log_prior: LogDensity, n: int) -> float:
    theta, log_q = family.sample_and_log_prob(max(n, _WARM_UP_DRAWS))
    spread = float((log_prior(theta).double() - log_q).std())
    return spread if math.isfinite(spread) else math.inf


def _advance(scheduler: Any) -> Callable[[float], None]:
    """The scheduler's step; one that watches the loss, such as `ReduceLROnPlateau`, is shown it."""
    if "metrics" in inspect.signature(scheduler.step).parameters:
        return lambda value: scheduler.step(value)
    return lambda _: scheduler.step()


def _step(
    loss: Loss, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, options: TrainOptions
) -> bool:
    """One step of the optimiser; False, and nothing changed, if loss or gradient is not finite."""
    if not (math.isfinite(loss.value) and bool(torch.isfinite(loss.surrogate))):
        return False
    optimizer.zero_grad(set_to_none=True)
    loss.surrogate.backward(retain_graph=options.retain_graph)
    norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip_value)
    if not bool(torch.isfinite(norm)):
        return False
    optimizer.step()
    return True


def converged(losses: Sequence[float], options: TrainOptions) -> bool:
    """Whether the last `_PATIENCE` windows brought no improvement over the best before them."""
    if len(losses) % WINDOW or len(losses) < max((_PATIENCE + 1) * WINDOW, options.min_num_iters):
        return False
    values = torch.tensor(losses, dtype=torch.float64).reshape(-1, WINDOW)
    means = values.nanmean(1)  # skipped steps left NaN behind
    variances = (values - means[:, None]).square().nanmean(1) / (~values.isnan()).sum(1)
    best = int(means[:-_PATIENCE].argmin())
    gain = means[best] - means[-_PATIENCE:]
    noise = (variances[best] + variances[-_PATIENCE:]).sqrt()
    return bool((gain <= noise.clamp_min(options.eps)).all())


def no_higher(here: Sequence[float], before: Sequence[float]) -> bool:
    """Whether some losses are not above others by more than their noise; False if one of `here` is NaN."""
    new, old = (torch.tensor(losses, dtype=torch.float64) for losses in (here, before))
    old = old[~old.isnan()]
    noise = (new.var() / len(new) + old.var() / len(old)).sqrt()
    return bool(new.mean() - old.mean() <= noise)


def stopped_by_nan() -> str:
    """Why a fit ended that met nothing but NaN."""
    return f"no finite loss or gradient for {GIVE_UP} steps in a row"


def stopped_by_convergence() -> str:
    """Why a fit ended whose loss no longer fell."""
    return f"no improvement over {_PATIENCE} windows of {WINDOW} steps"


class _Mean:
    """The mean of the weights over the present window."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._mean = [torch.zeros_like(p) for p in parameters]
        self._count = 0

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor]) -> None:
        self._count = self._count % WINDOW + 1
        for mean, p in zip(self._mean, parameters, strict=True):
            mean.lerp_(p, 1.0 / self._count)

    def settle(
        self, parameters: Sequence[Tensor], objective: Callable[[], Loss], losses: Sequence[float]
    ) -> None:
        """Put the mean in the weights' place, unless the loss is higher there than the window's `losses`."""
        last = [p.detach().clone() for p in parameters]
        settled = False
        try:
            _overwrite(parameters, self._mean)
            settled = no_higher([objective().value for _ in range(JUDGE)], losses)
        finally:
            if not settled:
                _overwrite(parameters, last)


@torch.no_grad()
def _overwrite(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
