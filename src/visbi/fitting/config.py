"""Options of a fit: each default stands once, each value is checked once."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from visbi.core.checks import (
    finite_tensor,
    in_interval,
    non_negative_int,
    one_of,
    positive,
    positive_int,
    unknown_keyword,
    violation,
)
from visbi.core.types import Seed

__all__ = ["AUTO", "INITS", "INIT_DRAWS", "METHODS", "QUALITY_METRICS", "TrainOptions"]

AUTO = "auto"
"""The `q` for which the family is found and not named."""

METHODS = ("rKL", "fKL", "IW", "alpha")
"""Divergences that `vi_method` accepts."""

QUALITY_METRICS = ("psis", "prop", "prop_prior")
"""Scores that `quality_control_metric` accepts."""

INITS = ("prior", "match", "explore")
"""Names that `init` accepts."""
INIT_DRAWS = 4096
"""Of an earlier posterior that lends a start."""

# which values they may take beside True and False
_FLAGS: dict[str, tuple[None, ...]] = {
    **dict.fromkeys(("retrain_from_scratch", "reset_optimizer", "show_progress_bar"), ()),
    **dict.fromkeys(("check_for_convergence", "quality_control", "retain_graph", "allow_failed"), ()),
    **dict.fromkeys(("stick_the_landing", "dreg"), (None,)),
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything `VIPosterior.train` can be told, apart from the observation.

    Attributes:
        n_particles: draws of q per step (groups of `K` for 'IW').
        learning_rate: of the optimiser at the first step.
        gamma: factor on the learning rate after every step, in (0, 1].
        max_num_iters, min_num_iters: bounds on the number of steps.
        clip_value: largest norm of the gradient.
        warm_up_rounds: steps that move q onto the prior before the first fit; fewer if it is there.
        retrain_from_scratch: start from fresh weights.
        reset_optimizer: start with a fresh optimiser.
        show_progress_bar: show one.
        check_for_convergence: stop when the objective no longer improves.
        quality_control, quality_control_metric: score q after the fit and warn if it is poor.
        eps: smallest gain, in nats, that counts as an improvement.
        retain_graph: keep the graph after each backward pass, for a q that builds part of it only once.
        optimizer: called as optimizer(parameters, lr=learning_rate); an lr bound by `functools.partial`
            stands.
        scheduler: called as scheduler(optimizer), with gamma= if it takes one and a partial has not bound it.
        alpha: order of the divergence for 'alpha', >= 0.
        K: draws in a group for 'IW'.
        stick_the_landing: leave the score of q out of the gradient; None: as the objective's default.
        dreg: doubly reparameterised gradient; None: as the objective's default, and not at all if
            `stick_the_landing` is given.
        weight_transform: applied to importance weights of mean 1 for 'fKL'.
        init: where q starts on a first fit: "prior" (by `warm_up_rounds`), "match" (a Gaussian matched to the
            potential's scores), "explore" (the moments of tempered particles: slower, finds the mass wherever
            it is), or draws (N, D) near the posterior.
        seed: makes the fit repeatable and leaves torch's global generator alone.
        max_potential_evals, max_seconds: end the fit once so many evaluations of the potential, or so much
            wall time, are used; the best q so far stays, and its status is "suspect" or worse.
        allow_failed: for q="auto", keep a fit whose status is "failed" instead of raising `FitError`.
    """

    n_particles: int = 256
    learning_rate: float = 1e-3
    gamma: float = 0.999
    max_num_iters: int = 2000
    min_num_iters: int = 10
    clip_value: float = 10.0
    warm_up_rounds: int = 100
    retrain_from_scratch: bool = False
    reset_optimizer: bool = False
    show_progress_bar: bool = True
    check_for_convergence: bool = True
    quality_control: bool = True
    quality_control_metric: str = "psis"
    eps: float = 1e-5
    retain_graph: bool = False
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    scheduler: Callable[..., Any] = ExponentialLR
    alpha: float = 0.5
    K: int = 8
    stick_the_landing: bool | None = None
    dreg: bool | None = None
    weight_transform: Callable[[Tensor], Tensor] | None = None
    init: str | Tensor = "prior"
    seed: Seed = None
    max_potential_evals: int | None = None
    max_seconds: float | None = None
    allow_failed: bool = False

    def __post_init__(self) -> None:
        for name in ("n_particles", "max_num_iters", "K"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))  # 8.0 becomes 8
        for name in ("min_num_iters", "warm_up_rounds"):
            object.__setattr__(self, name, non_negative_int(name, getattr(self, name)))
        for name in ("learning_rate", "clip_value"):
            positive(name, getattr(self, name))
        if self.max_potential_evals is not None:
            evals = positive_int("max_potential_evals", self.max_potential_evals)
            object.__setattr__(self, "max_potential_evals", evals)
        if self.max_seconds is not None:
            positive("max_seconds", self.max_seconds)
        in_interval("gamma", self.gamma, 0.0, 1.0, closed="r")
        in_interval("eps", self.eps, 0.0, float("inf"), closed="l")
        in_interval("alpha", self.alpha, 0.0, float("inf"), closed="l")
        one_of("quality_control_metric", self.quality_control_metric, QUALITY_METRICS)
        self._check_types()
        self._check_init()

    def _check_types(self) -> None:
        for name, others in _FLAGS.items():
            if not (isinstance(getattr(self, name), bool) or getattr(self, name) in others):
                expected = " or ".join(["True or False", *map(repr, others)])
                raise TypeError(violation(name, expected, repr(getattr(self, name))))
        for name in ("optimizer", "scheduler"):
            if not callable(getattr(self, name)):
                raise TypeError(violation(name, "a class or callable", repr(getattr(self, name))))
        if self.weight_transform is not None and not callable(self.weight_transform):
            raise TypeError(violation("weight_transform", "a callable or None", repr(self.weight_transform)))
        if not (self.seed is None or isinstance(self.seed, Integral | Tensor)):
            raise TypeError(violation("seed", "a whole number or None", repr(self.seed)))

    def _check_init(self) -> None:
        if not isinstance(self.init, Tensor):
            one_of("init", self.init, INITS)
        elif self.init.ndim != 2 or len(self.init) < 2:
            raise ValueError(violation("init", "draws of shape (N, D), N >= 2", tuple(self.init.shape)))
        else:
            finite_tensor("init", self.init)

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> "TrainOptions":
        """Options from keywords by name.

        Raises:
            TypeError: a keyword that is none of ours; the message names the nearest one.

        >>> TrainOptions.from_keywords({"n_particles": 8}).n_particles
        8
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in keywords:
            if name not in known:
                raise unknown_keyword(name, known, "train()")
        return cls(**keywords)

    DEFAULT: ClassVar["TrainOptions"]


TrainOptions.DEFAULT = TrainOptions()
