"""Options of an amortised fit: how it trains, and what shall be built, asked of several people in turn."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from visbi.core.checks import (
    finite_tensor,
    in_interval,
    one_of,
    positive,
    positive_int,
    same_length,
    violation,
)
from visbi.core.types import Seed, ZScore
from visbi.families.base import LinkedFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.families.names import CONDITIONAL_NAMES, ZukoFlowType, name_of
from visbi.fitting.config import AUTO
from visbi.fitting.parameters import VIPosteriorParameters, family_name

__all__ = ["OBJECTIVES", "AmortizedOptions", "Choice", "check_simulations", "chosen_config"]

OBJECTIVES = ("elbo", "forward", "mixed")
"""What an amortised fit goes down: see `fitting.amortized_objectives`."""


@dataclass(frozen=True, kw_only=True)
class AmortizedOptions:
    """How `VIPosterior.train_amortized` trains; what it trains is a `ConditionalConfig`.

    Attributes:
        n_particles: draws of q per x.
        learning_rate: of Adam at the first step.
        gamma: factor on the learning rate after every step, in (0, 1].
        max_num_iters: largest number of steps.
        clip_value: largest norm of the gradient.
        batch_size: x per step.
        validation_fraction: share of the x that are held out, in (0, 1).
        validation_batch_size: how many of them the held-out loss looks at; None: `batch_size`.
        validation_n_particles: draws per held-out x; None: `n_particles`.
        stop_after_iters: steps without a lower held-out loss that end the fit.
        show_progress_bar: show one.
        retrain_from_scratch: start from fresh weights.
        seed: makes the fit repeatable and leaves torch's global generator alone.
        objective: one of `OBJECTIVES`. The number of steps above is, for "forward" and for the first stage of
            "mixed", that of passes over the simulations, and all held-out ones are looked at.
    """

    n_particles: int = 128
    learning_rate: float = 1e-3
    gamma: float = 0.999
    max_num_iters: int = 500
    clip_value: float = 5.0
    batch_size: int = 64
    validation_fraction: float = 0.1
    validation_batch_size: int | None = None
    validation_n_particles: int | None = None
    stop_after_iters: int = 20
    show_progress_bar: bool = True
    retrain_from_scratch: bool = False
    seed: Seed = None
    objective: str = "elbo"

    def __post_init__(self) -> None:
        one_of("objective", self.objective, OBJECTIVES)
        for name in ("n_particles", "max_num_iters", "batch_size", "stop_after_iters"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        for name in ("validation_batch_size", "validation_n_particles"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else positive_int(name, given))
        for name in ("learning_rate", "clip_value"):
            positive(name, getattr(self, name))
        in_interval("gamma", self.gamma, 0.0, 1.0, closed="r")
        in_interval("validation_fraction", self.validation_fraction, 0.0, 1.0, closed="")
        for name in ("show_progress_bar", "retrain_from_scratch"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(violation(name, "True or False", repr(getattr(self, name))))
        if not (self.seed is None or isinstance(self.seed, Integral | Tensor)):
            raise TypeError(violation("seed", "a whole number or None", repr(self.seed)))

    @property
    def held_out_batch_size(self) -> int:
        """How many x the held-out loss looks at."""
        return self.validation_batch_size or self.batch_size

    @property
    def held_out_n_particles(self) -> int:
        """Draws per held-out x."""
        return self.validation_n_particles or self.n_particles

    DEFAULT: ClassVar["AmortizedOptions"]


AmortizedOptions.DEFAULT = AmortizedOptions()


def check_simulations(theta: Any, x: Any, dim: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """theta (N, D) and x (N, ...) as tensors on `device`; x of shape (N,) becomes (N, 1).

    Raises:
        ValueError: NaN or Inf, other lengths than each other's, fewer than two rows, or another D.
    """
    theta, x = finite_tensor("theta", theta).to(device), finite_tensor("x", x).to(device)
    if theta.ndim != 2 or theta.shape[1] != dim:
        raise ValueError(violation("theta", f"shape (N, {dim}), as the prior has it", tuple(theta.shape)))
    if x.ndim == 0:
        raise ValueError(violation("x", "shape (N, ...)", ()))
    same_length("theta", theta, "x", x)
    if len(x) < 2:
        raise ValueError(violation("x", "at least two simulations", len(x)))
    x = x if x.is_floating_point() else x.to(theta.dtype)
    return theta, x[:, None] if x.ndim == 1 else x


@dataclass(frozen=True)
class Choice:
    """What q(theta | x) shall be built from, as in `ConditionalConfig`; None is no wish."""

    flow_type: Any = None
    num_transforms: int | None = None
    hidden_features: int | None = None
    z_score_theta: ZScore | None = None
    z_score_x: ZScore | None = None

    def __post_init__(self) -> None:
        if isinstance(self.flow_type, Enum):  # ours or another package's
            object.__setattr__(self, "flow_type", self.flow_type.value)

    @classmethod
    def of(cls, source: "Choice | ConditionalConfig | VIPosteriorParameters | None") -> "Choice":
        """The wishes in a value of another class."""
        if source is None or isinstance(source, Choice):
            return source or cls()
        if not isinstance(source, ConditionalConfig):
            source = VIPosteriorParameters.like(source) or source
        if not isinstance(source, ConditionalConfig | VIPosteriorParameters):
            expected = "a VIPosteriorParameters or None"
            raise TypeError(violation("params", expected, type(source).__name__))
        flow_type = source.q if isinstance(source, VIPosteriorParameters) else source.flow_type
        flow_type = None if isinstance(flow_type, str) and flow_type == AUTO else flow_type
        others = {f.name: getattr(source, f.name) for f in dataclasses.fields(cls) if f.name != "flow_type"}
        return cls(flow_type, **others)


def chosen_config(*choices: Any) -> ConditionalConfig:
    """What to build: each entry from the first of the choices that has it.

    Where none names a family it is the usual one.

    Raises:
        ValueError: an unknown name, or a q that has none.
        TypeError: a choice of a foreign class.
    """
    values: dict[str, Any] = {}
    for choice in map(Choice.of, choices):
        for name, value in vars(choice).items():
            if values.get(name) is None:
                values[name] = value
    flow_type = VIPosteriorParameters.q if values["flow_type"] is None else values["flow_type"]
    if isinstance(flow_type, LinkedFamily):
        flow_type = name_of(flow_type)
    if not isinstance(flow_type, str | ZukoFlowType):
        expected = f"one of {', '.join(map(repr, CONDITIONAL_NAMES))}, since this q has no conditional form"
        raise ValueError(violation("flow_type", expected, type(flow_type).__name__))
    return ConditionalConfig(**{**values, "flow_type": family_name("flow_type", flow_type)})
