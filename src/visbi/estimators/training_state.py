"""What training is told, what it reports, and what it needs to go on: three frozen records."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from visbi.core.checks import in_interval, one_of, positive, positive_int

__all__ = ["SCHEDULES", "TrainingOptions", "TrainingState", "TrainingTrace"]

SCHEDULES = ("plateau", "linear")
"""What makes the learning rate fall: a loss that does not, or the epochs that are left."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How an estimator is trained.

    Attributes:
        learning_rate: of AdamW, at first.
        cooling: factor that it takes, in (0, 1], after
        cool_after: epochs without a better held-out loss.
        schedule: what makes it fall: "plateau", as above, or "linear": it rises over a tenth of `max_epochs`
            and falls to zero at the end of the last, unless `patience` ends training before (let it be
            `max_epochs`). Resumed with other `max_epochs` it is another schedule.
        batch_size: rows in a step, at most; the batches of an epoch differ by one row at most.
        max_epochs: passes over the data, at most; resumed parts count together.
        validation_fraction: share of the rows that is held out, in (0, 1).
        patience: epochs without a better held-out loss before training stops.
        worth: by how much the held-out loss must fall to be better, in nats per row; what is kept are the
            weights of the lowest loss in any case.
        clip_value: largest norm of the gradient.
        weight_decay: what a step takes off every weight, as a share of it and in units of the learning rate.
            It bounds weights by about 1/weight_decay, because a step of Adam moves them by the learning rate
            at most: .1 leaves room for sharp densities; 1 is better where x has many entries that depend
            smoothly on theta, and simulations are few. Compare `TrainingTrace.best_loss`.
        averaging: the weights that are validated and kept are a running average of the iterates with this
            factor, in [0, 1); 0 keeps the iterate itself.

    Raises:
        ValueError: a value outside its range.

    >>> TrainingOptions(validation_fraction=1.5)
    Traceback (most recent call last):
    ValueError: `validation_fraction`: expected a number in (0, 1); got 1.5
    """

    learning_rate: float = 4e-3
    cooling: float = 0.3
    cool_after: int = 5
    schedule: str = "plateau"
    batch_size: int = 200
    max_epochs: int = 2000
    validation_fraction: float = 0.1
    patience: int = 15
    worth: float = 0.0
    clip_value: float = 5.0
    weight_decay: float = 0.1
    averaging: float = 0.99

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        for name in ("cool_after", "batch_size", "max_epochs", "patience"):
            positive_int(name, getattr(self, name))
        for name in ("learning_rate", "clip_value"):
            positive(name, getattr(self, name))
        in_interval("validation_fraction", self.validation_fraction, 0.0, 1.0)
        in_interval("cooling", self.cooling, 0.0, 1.0, closed="r")
        in_interval("worth", self.worth, 0.0, math.inf, closed="l")
        in_interval("weight_decay", self.weight_decay, 0.0, math.inf, closed="l")
        in_interval("averaging", self.averaging, 0.0, 1.0, closed="l")


@dataclass(frozen=True)
class TrainingTrace:
    """How training went.

    Attributes:
        train: mean loss over the steps of each epoch.
        validation: loss of the held-out rows after each epoch.
        best_epoch: index of the epoch whose weights were kept; -1 before there is one.
        stop_reason: "no improvement", "max_epochs" or "interrupted"; empty while it runs.
        skipped_steps: steps left out because the loss or its gradient was not finite.
    """

    train: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    best_epoch: int = -1
    stop_reason: str = ""
    skipped_steps: int = 0

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss, rows far above the others brought down; inf before there is one."""
        return self.validation[self.best_epoch] if self.best_epoch >= 0 else math.inf


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where training stands, so that it can go on from there.

    Attributes:
        trace: what has happened.
        n_rows: how many rows it happened on.
        seed: that of the split into training and held-out rows.
        next_seed: that of the next epoch.
        steps: how many were taken.
        last, average, best: weights by name: of the last step, averaged, and of the best epoch.
        optimizer: the optimiser's state.
    """

    trace: TrainingTrace
    n_rows: int
    seed: int
    next_seed: int
    steps: int = 0
    last: dict[str, Tensor] = field(default_factory=dict, repr=False)
    average: dict[str, Tensor] = field(default_factory=dict, repr=False)
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
    optimizer: dict[str, Any] = field(default_factory=dict, repr=False)
