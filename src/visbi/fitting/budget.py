"""What a fit may cost: evaluations of the potential, and seconds."""

import math
import sys
import time
from dataclasses import dataclass, field

__all__ = ["Budget", "BudgetReached"]

_FIRST = 64  # evaluations before the time that they take is known
_AT_ONCE = 0.1  # of the seconds allowed, that pass until the clock is looked at again


class BudgetReached(Exception):  # noqa: N818  (an event, not a mistake)
    """A fit has used what it may; whoever catches it keeps the best so far."""


@dataclass
class Budget:
    """Limits of a fit, counted from when it is made.

    Attributes:
        max_evals: evaluations of the potential, with and without gradient together; None is no limit.
        max_seconds: wall time; None is no limit.
        evals: used so far.
        started: when it was made, by `time.monotonic`.

    >>> budget = Budget(max_evals=10)
    >>> budget.spend(8)
    >>> budget.left
    2
    """

    max_evals: int | None = None
    max_seconds: float | None = None
    evals: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Evaluations left."""
        return math.inf if self.max_evals is None else max(self.max_evals - self.evals, 0)

    @property
    def seconds(self) -> float:
        """Wall time used."""
        return time.monotonic() - self.started

    @property
    def at_once(self) -> int:
        """Evaluations after which the clock is to be looked at: as many as a tenth of the time allows."""
        if self.max_seconds is None:
            return sys.maxsize
        if not self.evals:
            return _FIRST
        return max(1, int(_AT_ONCE * self.max_seconds * self.evals / max(self.seconds, 1e-9)))

    def ask(self, n: int) -> None:
        """Whether there are `n` evaluations left; they are not taken.

        Raises:
            BudgetReached: there are not so many left.
        """
        if n > self.left:
            raise BudgetReached(f"reached max_potential_evals = {self.max_evals}")

    def spend(self, n: int) -> None:
        """Take `n` evaluations.

        Raises:
            BudgetReached: there are not so many left, or the time is over.
        """
        self.ask(n)
        if self.max_seconds is not None and self.seconds > self.max_seconds:
            raise BudgetReached(f"reached max_seconds = {self.max_seconds:g}")
        self.evals += n
