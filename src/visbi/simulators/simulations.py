"""Simulated pairs (theta, x), and the thetas whose run failed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.checks import same_length, violation

__all__ = ["Simulations"]


@dataclass(frozen=True, eq=False)
class Simulations:
    """What `simulate` returns.

    `len()` counts the successful runs; `a + b` joins two sets.

    Attributes:
        theta: parameters of the successful runs, (S, D).
        x: their outputs, (S, ...), finite.
        failed_theta: parameters of the failed runs, (F, D).
        failures: one text for each of them: the exception, or how many values were NaN or Inf.
        seed: the seed that repeats the runs; None after joining sets of different seeds.

    Raises:
        ValueError: lengths or widths that do not belong together.

    >>> pairs = Simulations(torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(1, 2), ("diverged",), 0)
    >>> len(pairs), pairs.n_failed, len(pairs + pairs)
    (3, 1, 6)
    """

    theta: Tensor
    x: Tensor
    failed_theta: Tensor
    failures: tuple[str, ...]
    seed: int | None

    def __post_init__(self) -> None:
        same_length("theta", self.theta, "x", self.x)
        if self.failed_theta.shape != (len(self.failures), self.theta.shape[1]):
            expected = f"shape ({len(self.failures)}, {self.theta.shape[1]}), one row for each text"
            raise ValueError(violation("failed_theta", expected, tuple(self.failed_theta.shape)))

    def __len__(self) -> int:
        return self.theta.shape[0]

    @property
    def n_failed(self) -> int:
        """How many runs failed."""
        return len(self.failures)

    def merge(self, other: "Simulations") -> "Simulations":
        """Both sets as one, `self` first.

        Raises:
            ValueError: thetas or outputs of different shapes.
        """
        for name in ("theta", "x"):
            mine, theirs = (tuple(getattr(s, name).shape[1:]) for s in (self, other))
            if mine != theirs:
                raise ValueError(violation(name, f"rows of shape {mine} in both sets", f"{theirs}"))
        return Simulations(
            theta=torch.cat([self.theta, other.theta]),
            x=torch.cat([self.x, other.x]),
            failed_theta=torch.cat([self.failed_theta, other.failed_theta]),
            failures=self.failures + other.failures,
            seed=self.seed if self.seed == other.seed else None,
        )

    def __add__(self, other: "Simulations") -> "Simulations":
        return self.merge(other)
