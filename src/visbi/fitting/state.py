"""What a posterior is at any moment: not trained, or fitted to one observation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visbi.families.base import Family
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import Trace

__all__ = ["SingleFit", "Untrained"]


@dataclass(frozen=True)
class Untrained:
    """No fit yet."""


@dataclass(frozen=True)
class SingleFit:
    """q fitted to one observation.

    Attributes:
        family: the fitted q.
        x: the observation it was fitted to.
        trace: how the objective went.
        options: what the fit was told.
        method: the divergence.
        optimizer: with its state, so that a later fit goes on where this one stopped.
        scheduler: the learning rate's schedule, likewise.
        report: the certificate, or None if it was not asked for.
    """

    family: Family
    x: Tensor | None
    trace: Trace
    options: TrainOptions
    method: str
    optimizer: torch.optim.Optimizer
    scheduler: Any
    report: Any = None
