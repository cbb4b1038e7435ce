"""The loop of an amortised fit: steps, held-out loss, when to stop, and which weights to keep.

After every iteration the loss is taken on held-out simulations, always the same ones with the same noise,
whatever the seed: so its differences are those of q. The weights with the lowest one are kept. Where the
objective asks for it they are a running average of the iterates w_t (Polyak and Juditsky 1992),

    a_t = d_t a_(t-1) + (1 - d_t) w_t,    d_t = min(averaging, (1 + t) / (10 + t)),

which does for the noise of small batches what a falling learning rate does.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visbi.core.progress import Progress
from visbi.families.conditional import ConditionalFamily
from visbi.fitting.amortized_config import AmortizedOptions
from visbi.fitting.amortized_objectives import Objective, Part
from visbi.fitting.state import AmortizedTrace

__all__ = ["INTERRUPTED", "descend"]

INTERRUPTED = "interrupted"
"""Why a fit ended that Ctrl-C ended."""

_GIVE_UP = 50


def descend(family: ConditionalFamily, objective: Objective, options: AmortizedOptions) -> AmortizedTrace:
    """Take steps down the objective, in place; at the end the family has the best weights.

    Ctrl-C ends it early.
    """
    parameters: list[Tensor] = [p for p in family.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.gamma)
    average = _Average(parameters, objective.averaging)
    record = _Record(family, _held_out(family, objective))
    reason = f"reached max_num_iters = {options.max_num_iters}"
    steps = range(options.max_num_iters)
    bar = Progress(options.show_progress_bar, steps, desc="Fitting q(theta | x)", leave=False)
    try:
        for _ in bar:
            family.train()
            record.begin()
            for parts in objective.steps():
                taken = _step(parts, parameters, optimizer, options.clip_value)
                record.step(taken)
                if taken.moved:
                    average.update()
            if record.moved:
                scheduler.step()
            with average.in_place():
                record.end(_held_out(family, objective))
            if record.since_best >= options.stop_after_iters:
                patience = f"stop_after_iters = {options.stop_after_iters} {objective.iterations}"
                reason = f"no lower held-out loss for {patience}"
                break
            if record.skipped_in_a_row >= _GIVE_UP:
                reason = f"no finite loss or gradient for {_GIVE_UP} steps in a row"
                break
    except KeyboardInterrupt:
        reason = INTERRUPTED
    finally:
        bar.close()
        record.restore()
    return record.trace(reason)


class _Record:
    """Losses so far and the best weights."""

    def __init__(self, family: ConditionalFamily, start: float) -> None:
        self.family = family
        self.losses: list[float] = []
        self.held_out = [start]
        self.best, self.best_iter = start, 0
        self.skipped = self.skipped_in_a_row = self.excluded = 0
        self.begin()
        self._keep()

    @property
    def since_best(self) -> int:
        return len(self.losses) - self.best_iter

    def begin(self) -> None:
        """An iteration begins."""
        self.moved, self._steps = False, []

    def step(self, taken: "_Taken") -> None:
        """A step was taken, or left out."""
        self._steps.append(taken.value)
        self.moved = self.moved or taken.moved
        self.excluded += taken.excluded
        self.skipped += not taken.moved
        self.skipped_in_a_row = 0 if taken.moved else self.skipped_in_a_row + 1

    def end(self, held_out: float) -> None:
        """The iteration is over."""
        self.losses.append(sum(self._steps) / len(self._steps))
        self.held_out.append(held_out)
        if held_out < self.best or (math.isnan(self.best) and math.isfinite(held_out)):
            self.best, self.best_iter = held_out, len(self.losses)
            self._keep()

    def _keep(self) -> None:
        self._weights = {name: value.clone() for name, value in self.family.state_dict().items()}

    def restore(self) -> None:
        self.family.load_state_dict(self._weights)
        self.family.eval()

    def trace(self, reason: str) -> AmortizedTrace:
        return AmortizedTrace(
            loss=tuple(self.losses),
            validation_loss=tuple(self.held_out[: len(self.losses) + 1]),
            stop_reason=reason,
            best_iter=self.best_iter,
            skipped=self.skipped,
            excluded=self.excluded,
        )


class _Average:
    """The running average of parameters; of factor 0 it is the parameters themselves."""

    def __init__(self, parameters: list[Tensor], factor: float) -> None:
        self._parameters, self._factor, self._steps = parameters, factor, 0
        self._values = [p.detach().clone() for p in parameters] if factor else []

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        if self._factor:
            self._steps += 1
            keep = min(self._factor, (1 + self._steps) / (10 + self._steps))
            get_ema_multi_avg_fn(keep)(self._values, self._parameters, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands where the parameters do."""
        last = [p.detach().clone() for p in self._parameters] if self._factor else []
        _set(self._parameters, self._values)
        yield
        _set(self._parameters, last)


@torch.no_grad()
def _set(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=False):
        parameter.copy_(value)


@torch.no_grad()
def _held_out(family: ConditionalFamily, objective: Objective) -> float:
    family.eval()
    return objective.held_out()


@dataclass(frozen=True)
class _Taken:
    """A step: its loss, how many particles had no finite potential, and whether weights moved."""

    value: float
    excluded: int
    moved: bool


def _step(
    parts: list[Part], parameters: list[Tensor], optimizer: torch.optim.Optimizer, clip_value: float
) -> _Taken:
    """One step of the optimiser; nothing changes if a loss or the gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    value, excluded = 0.0, 0
    for part in parts:
        loss = part.loss()
        value, excluded = value + part.share * loss.value, excluded + loss.excluded
        if not (math.isfinite(loss.value) and bool(torch.isfinite(loss.surrogate))):
            return _Taken(value, excluded, False)
        (part.share * loss.surrogate).backward()
    moved = bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, clip_value)))
    if moved:
        optimizer.step()
    return _Taken(value, excluded, moved)
