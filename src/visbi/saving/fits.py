"""A fit to one observation: options, trace, report, and the optimiser's state."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.report import Report
from visbi.core.checks import violation
from visbi.core.encoding import Given, Kind, Otherwise
from visbi.families import Family
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import Trace, make_optimizer
from visbi.fitting.state import SingleFit
from visbi.saving.modules import dataclass_kind

__all__ = ["CALLABLES", "FITS", "StoredFit"]

CALLABLES: dict[str, Any] = {
    **{
        f"torch.optim.{cls.__name__}": cls
        for cls in (
            torch.optim.ASGD,
            torch.optim.Adadelta,
            torch.optim.Adafactor,
            torch.optim.Adagrad,
            torch.optim.Adam,
            torch.optim.AdamW,
            torch.optim.Adamax,
            torch.optim.Muon,
            torch.optim.NAdam,
            torch.optim.RAdam,
            torch.optim.RMSprop,
            torch.optim.Rprop,
            torch.optim.SGD,
        )
    },
    **{
        f"torch.optim.lr_scheduler.{cls.__name__}": cls
        for cls in (
            lr_scheduler.ConstantLR,
            lr_scheduler.CosineAnnealingLR,
            lr_scheduler.CosineAnnealingWarmRestarts,
            lr_scheduler.CyclicLR,
            lr_scheduler.ExponentialLR,
            lr_scheduler.LinearLR,
            lr_scheduler.MultiStepLR,
            lr_scheduler.OneCycleLR,
            lr_scheduler.PolynomialLR,
            lr_scheduler.StepLR,
        )
    },
}
"""Optimisers and schedules that are stored by name."""

_USERS_OWN = ("optimizer", "scheduler", "weight_transform")


@dataclass(frozen=True)
class StoredFit:
    """A `SingleFit` apart from its family.

    Attributes:
        x, trace, method, report: as there.
        options: by name.
        optimizer, scheduler: their states, or None.
        draws: as there.
    """

    x: Tensor | None
    trace: Trace
    method: str
    report: Report | None
    options: dict[str, Any]
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    draws: WeightedDraws | None = None

    @classmethod
    def of(cls, fit: SingleFit, storable: Callable[[Any], bool]) -> "StoredFit":
        """What is stored of `fit`.

        Args:
            fit: the fit.
            storable: whether a value can be stored.

        Warns:
            UserWarning: the optimiser's state cannot be stored.
        """
        options = {entry.name: getattr(fit.options, entry.name) for entry in dataclasses.fields(fit.options)}
        for name in _USERS_OWN:
            options[name] = Otherwise(options[name], Given(name))
        states = _state(fit.optimizer), _state(fit.scheduler)
        if None in states or not storable(states):
            warnings.warn(
                "The optimiser's state cannot be stored: after loading, training goes on with a fresh one.",
                stacklevel=2,
            )
            states = None, None
        return cls(fit.x, fit.trace, fit.method, fit.report, options, *states, fit.draws)

    def made(self, family: Family) -> SingleFit:
        """The fit of `family`; an optimiser or a scheduler given as None is replaced by a fresh default one.

        Raises:
            TypeError, ValueError: an optimiser or a scheduler that is not the one it was saved with.
        """
        defaults = {name: getattr(TrainOptions.DEFAULT, name) for name in ("optimizer", "scheduler")}
        without = [name for name in defaults if self.options[name] is None]
        options = TrainOptions(**{**self.options, **{name: defaults[name] for name in without}})
        optimizer, scheduler = make_optimizer(family, options)
        if not without and self.optimizer is not None and self.scheduler is not None:
            try:
                optimizer.load_state_dict(self.optimizer)
                scheduler.load_state_dict(self.scheduler)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                expected = "those that the posterior was saved with"
                raise ValueError(
                    violation("optimizer` and `scheduler", expected, f"others ({error})")
                ) from error
        return SingleFit(
            family,
            self.x,
            self.trace,
            options,
            self.method,
            optimizer,
            scheduler,
            self.report,
            self.draws,
        )


def _state(owner: Any) -> dict[str, Any] | None:
    return owner.state_dict() if callable(getattr(owner, "state_dict", None)) else None


def _trace_fields(trace: Trace) -> dict[str, Any]:
    # thousands of numbers: as one tensor, not one by one
    return {**vars(trace), "loss": torch.tensor(trace.loss, dtype=torch.float64)}


def _trace(loss: Tensor, **others: Any) -> Trace:
    return Trace(loss=tuple(loss.tolist()), **others)


def _stored_fit(**fields: Any) -> StoredFit:
    fit = StoredFit(**fields)
    if not (isinstance(fit.trace, Trace) and isinstance(fit.report, Report | None)):
        raise TypeError("a fit without trace or report")
    if not (isinstance(fit.options, dict) and isinstance(fit.method, str)):
        raise TypeError("a fit without options or method")
    if not isinstance(fit.draws, WeightedDraws | None):
        raise TypeError("a fit with something else than draws")
    return fit


def _partial_fields(bound: Any) -> dict[str, Any]:
    return {"function": bound.func, "arguments": bound.args, "keywords": bound.keywords}


def _partial(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if function not in CALLABLES.values():
        raise LookupError("a partial of something unknown")
    return functools.partial(function, *arguments, **keywords)


FITS = (
    Kind("Trace", Trace, _trace_fields, _trace),
    Kind("partial", functools.partial, _partial_fields, _partial),
    dataclass_kind(Report),
    Kind("StoredFit", StoredFit, lambda fit: dict(vars(fit)), _stored_fit),
)
"""Kinds of what a fit consists of."""
