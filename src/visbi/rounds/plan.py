"""What `infer` was asked for: checked before anything is simulated, and as JSON by which a store knows it.

What a round learns from depends on `usable`, code that has no name that can be trusted: a store keeps which
runs it left (`store`), not what it is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import in_interval, one_of, positive_int, violation
from visbi.core.parallel import check_workers
from visbi.core.random import seeded
from visbi.core.words import in_words
from visbi.estimators import FLOWS, TrainingOptions
from visbi.fitting.config import AUTO, TrainOptions
from visbi.posterior import VIPosterior
from visbi.rounds.learning import FEWEST_KEPT, Learning
from visbi.rounds.result import Round

__all__ = ["Plan", "counts_of"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Arguments of `infer`, checked.

    Attributes:
        counts: simulations of each round.
        learning: how the likelihood is learnt.
        show: progress bars.

    The others are as for `infer`.

    Raises:
        TypeError, ValueError: as for `infer`.
    """

    simulator: Callable[..., Any]
    prior: Distribution
    x_o: Tensor
    counts: tuple[int, ...]
    q: str
    prior_share: float
    usable: Callable[[Tensor], Tensor] | None
    learning: Learning
    train: dict[str, Any]
    workers: int | None
    show: bool
    stop_early: bool
    on_round: Callable[[Round], None] | None

    def __post_init__(self) -> None:
        in_interval("prior_share", self.prior_share, 0.0, 1.0, closed="lr")
        one_of("flow", self.learning.flow, (AUTO, *FLOWS))
        if not isinstance(self.learning.options, TrainingOptions | None):
            expected, got = "a TrainingOptions or None", type(self.learning.options).__name__
            raise TypeError(violation("options", expected, got))
        for name in ("usable", "on_round"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise TypeError(violation(name, "a callable or None", repr(getattr(self, name))))
        check_workers(self.workers)
        with seeded(0):  # says what is wrong with a name
            VIPosterior(_flat, self.prior, q=self.q)
        if not isinstance(self.train, dict):
            raise TypeError(violation("train", "a dict of keywords or None", type(self.train).__name__))
        TrainOptions.from_keywords(self.train)
        if self.counts[0] < FEWEST_KEPT:
            expected = f"at least {FEWEST_KEPT} in the first round, which a likelihood is learnt from"
            raise ValueError(violation("simulations", expected, self.counts[0]))

    def settings(self, root: int) -> dict[str, Any]:
        """What decides the numbers beside `usable`, as JSON values."""
        options = TrainOptions.from_keywords(self.train)
        return {
            "seed": root,
            "simulations": list(self.counts),
            "x_o": self.x_o.double().flatten().tolist(),
            "q": str(self.q),
            "prior_share": self.prior_share,
            "train": {name: in_words(getattr(options, name)) for name in sorted(self.train)},
            **asdict(self.learning),
        }

    def former_settings(self) -> dict[str, Any]:
        """What stores of earlier versions say otherwise."""
        return {
            "usable": None if self.usable is None else getattr(self.usable, "__qualname__", "given"),
            "train": {name: repr(value) for name, value in sorted(self.train.items())},
        }


def _flat(theta: Tensor, x_o: Tensor | None) -> Tensor:
    return theta.new_zeros(len(theta))


def counts_of(simulations: Any, rounds: int) -> tuple[int, ...]:
    """Simulations of each round, from one number for all of them or from one for each.

    Raises:
        ValueError: no whole numbers >= 1, or fewer simulations than rounds.

    >>> counts_of(1001, 2), counts_of(np.array([300, 100]), 4)
    ((500, 501), (300, 100))
    """
    if isinstance(simulations, np.ndarray | Tensor):
        simulations = simulations.tolist()
    if isinstance(simulations, Sequence) and not isinstance(simulations, str):
        if not simulations:
            raise ValueError(violation("simulations", "a number, or one for each round", simulations))
        return tuple(positive_int("simulations", n) for n in simulations)
    total, rounds = positive_int("simulations", simulations), positive_int("rounds", rounds)
    if total < rounds:
        raise ValueError(violation("simulations", f"at least one for each of {rounds} rounds", total))
    first = total // rounds
    return (*[first] * (rounds - 1), total - first * (rounds - 1))
