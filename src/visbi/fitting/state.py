"""What a posterior is at any moment: not trained, fitted to one observation, found for one, or amortised.

All of them answer the same questions, so that nobody needs to ask which one it is: `at(x)` is the fit for x,
`latest(x)` the one to draw from when the question is about x but an older fit will do. Both give something
that has `sample`, `log_prob`, `family`, `x` and `trace`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.core.checks import violation
from visbi.families.base import Family
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import Trace

if TYPE_CHECKING:  # it loads zuko
    from visbi.families.conditional import ConditionalFamily

__all__ = ["PARTICLES", "AmortizedFit", "AmortizedTrace", "AutoFit", "SingleFit", "Untrained", "same"]

PARTICLES = "particles"
"""The rung of the automatic fit whose draws are not to be corrected."""

_DRAWS_AT_ONCE = 10_000


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two observations agree in shape and in every entry."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    return "meta" in (a.device.type, b.device.type) or bool((a == b).all())  # no numbers there to compare


@dataclass(frozen=True)
class Untrained:
    """No fit yet."""

    def at(self, x: Tensor | None) -> NoReturn:
        """There is none: ValueError."""
        raise ValueError("This posterior has not been fitted yet: call train() or train_amortized() first.")

    latest = at
    described = "not fitted"

    def rows(self, x: Tensor | None) -> Tensor | None:
        """x as it is."""
        return x

    @property
    def trace(self) -> NoReturn:
        """There is none: ValueError."""
        self.at(None)

    def to(self, device: str | torch.device) -> "Untrained":
        """Nothing to move."""
        return self


class _OneObservation:
    """What fits to one observation have in common."""

    family: Family
    x: Tensor | None

    def at(self, x: Tensor | None) -> Self:
        """This fit, if it is one to x; None asks for no x in particular.

        Raises:
            ValueError: another x.
        """
        if x is None or same(x, self.x):
            return self
        cure = "call train(x) for another one, RefittingPosterior for many"
        expected = f"the observation that q was fitted to ({cure})"
        raise ValueError(violation("x", expected, "another observation"))

    def latest(self, x: Tensor | None) -> Self:
        """This fit, whatever x."""
        return self

    def rows(self, x: Tensor | None) -> Tensor | None:
        """x as it is."""
        return x

    def sample(self, shape: torch.Size) -> Tensor:
        """Draws of q, (*shape, D)."""
        return self.family.sample(shape)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log q(theta), (N,), for theta (N, D)."""
        return self.family.log_prob(theta)


@dataclass(frozen=True)
class SingleFit(_OneObservation):
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
        draws: of q with their weights, or None if nobody asked for them.
        corrects: whether draws are corrected unless told otherwise.
    """

    family: Family
    x: Tensor | None
    trace: Trace
    options: TrainOptions
    method: str
    optimizer: torch.optim.Optimizer
    scheduler: Any
    report: Any = None
    draws: WeightedDraws | None = None
    corrects = False

    @property
    def described(self) -> str:
        """In a few words."""
        return _steps_of(self.method, self.trace)

    def to(self, device: str | torch.device) -> "SingleFit":
        """This fit with everything but the family, which its owner moves, on `device`."""
        for entries in self.optimizer.state.values():
            entries.update(
                {k: v.to(device) if isinstance(v, Tensor) and v.ndim else v for k, v in entries.items()}
            )
        return replace(
            self, x=None if self.x is None else self.x.to(device), draws=_moved(self.draws, device)
        )


@dataclass(frozen=True)
class AutoFit(_OneObservation):
    """q found for one observation by the automatic ladder.

    Attributes:
        family: the q that was found.
        x: the observation.
        trace: without steps; says why the fit ended.
        options: what the fit was told.
        report: the certificate.
        draws: of q, with their weights.
        method: "auto".
    """

    family: Family
    x: Tensor | None
    trace: Trace
    options: TrainOptions
    report: Any
    draws: WeightedDraws
    method: str = "auto"

    @property
    def corrects(self) -> bool:
        """Whether draws are corrected unless told otherwise: not where they are particles."""
        return self.report.rung != PARTICLES

    @property
    def described(self) -> str:
        """In a few words."""
        return f"fitted by {self.method}: {self.report.rung}"

    def to(self, device: str | torch.device) -> "AutoFit":
        """This fit with everything but the family, which its owner moves, on `device`."""
        return replace(
            self, x=None if self.x is None else self.x.to(device), draws=_moved(self.draws, device)
        )


def _steps_of(method: str, trace: "Trace | AmortizedTrace") -> str:
    return f"fitted by {method} in {trace.num_iters} steps"


def _moved(draws: Any, device: str | torch.device) -> Any:
    return None if draws is None else draws.to(device)


@dataclass(frozen=True)
class AmortizedTrace:
    """How an amortised fit went.

    Attributes:
        loss: the objective at each step's batch, in nats: minus the ELBO, minus the mean log q (there of each
            pass), or their sum.
        validation_loss: the same on held-out simulations, always the same ones with the same noise; its first
            entry belongs to the weights before the first step.
        stop_reason: why the fit ended, in a sentence.
        best_iter: after how many steps the weights that were kept had been reached.
        skipped: steps whose loss or gradient was not finite.
        excluded: particles, over all steps, whose potential was not finite.
        before: of a mixed fit, how its first stage went, down the forward objective alone.
    """

    loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    stop_reason: str
    best_iter: int
    skipped: int = 0
    excluded: int = 0
    before: "AmortizedTrace | None" = None
    cut_short = False

    @property
    def num_iters(self) -> int:
        """Steps taken."""
        return len(self.loss)


@dataclass(frozen=True)
class AmortizedFit:
    """q(theta | x) fitted to many observations at once.

    Attributes:
        conditional: the fitted q.
        trace: how the losses went.
        options: what the fit was told.
        x: the observations (M, ...) that are looked at, or None.
        report: the certificate of q at x, or None if it was not asked for.
        method: the divergence.
        share: of the potential in what corrected draws are draws of: see `visbi.amortized`.
    """

    conditional: "ConditionalFamily"
    trace: AmortizedTrace
    options: Any
    x: Tensor | None = None
    report: Any = None
    method: str = "amortised rKL"
    share: float = 1.0
    corrects = False

    @property
    def described(self) -> str:
        """In a few words."""
        return _steps_of(self.method, self.trace)

    def at(self, x: Tensor | None) -> "AmortizedFit":
        """This fit looked at in x (M, ...), or in a single x without the leading axis.

        Raises:
            ValueError: x is None or has another shape than those of the training.
        """
        if x is None:
            raise ValueError(violation("x", "an observation (pass x or call set_default_x)", None))
        rows = self.conditional.observations(x)
        return replace(self, x=rows, report=self.report if same(rows, self.x) else None)

    latest = at

    def rows(self, x: Tensor | None) -> Tensor | None:
        """x with a leading axis if it is one observation without, such as an image."""
        return x[None] if x is not None and x.shape == self.conditional.x_shape else x

    @property
    def family(self) -> Family:
        """q at the one observation that is looked at; ValueError if there are more."""
        assert self.x is not None
        if len(self.x) != 1:
            raise ValueError(violation("x", "a single observation", f"{len(self.x)}"))
        return self.conditional.at(self.x)

    def sample(self, shape: torch.Size) -> Tensor:
        """Draws of q(theta | x), (*shape, D) for one x, (*shape, M, D) for more."""
        theta = self.sample_batched(shape, _DRAWS_AT_ONCE)
        return theta.squeeze(-2) if theta.shape[-2] == 1 else theta

    def sample_batched(self, shape: torch.Size, at_once: int) -> Tensor:
        """Draws of q(theta | x), (*shape, M, D), at most `at_once` of them in one pass."""
        assert self.x is not None
        n, columns = shape.numel(), []
        with torch.no_grad():
            for x in self.x.split(at_once):
                step = max(1, at_once // len(x))
                parts = [self.conditional.draw(x, min(step, n - k))[0] for k in range(0, n, step)]
                empty = self.x.new_empty(0, len(x), self.conditional.coords.dim_theta)
                columns.append(torch.cat(parts) if parts else empty)
        theta = torch.cat(columns, 1)
        return theta.reshape(*shape, *theta.shape[1:])

    def log_prob(self, theta: Tensor) -> Tensor:
        """log q(theta | x), for theta (N, D) and M = N observations, or one row in either."""
        assert self.x is not None
        return self.conditional.log_prob(theta, self.x)

    def to(self, device: str | torch.device) -> "AmortizedFit":
        """This fit on `device`."""
        x = None if self.x is None else self.x.to(device)
        return replace(self, conditional=self.conditional.to(device), x=x)
