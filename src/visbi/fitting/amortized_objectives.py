r"""What an amortised fit goes down: objectives of q(theta | x), averaged over simulations (theta_i, x_i).

    elbo       E_x E_{theta ~ q(. | x)} [log q(theta | x) - log p(theta | x)]     draws of q, the potential
    forward    -E_{(theta, x)} log q(theta | x)                                   the simulations alone

and their sum. The forward one is that of neural posterior estimation (Papamakarios, Murray 2016): it covers
whatever the simulations cover, and its minimum over all q is the posterior of the simulator. The ELBO does
not notice mass that no draw of q reaches, but sees the potential's details. A "mixed" fit goes down the
forward one first, and then down the sum, whose forward part holds what the ELBO would let go.

An iteration is one batch; of the forward objective, whose steps cost little, one pass over all pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visbi.core.random import seeded
from visbi.core.types import LogDensity
from visbi.families.conditional import ConditionalFamily
from visbi.fitting.amortized_config import AmortizedOptions
from visbi.objectives import Loss, reverse_kl
from visbi.potentials.base import BasePotential

__all__ = ["HELD_OUT_SEED", "Both", "Elbo", "Forward", "Objective", "Pairs", "Part", "elbo"]

HELD_OUT_SEED = 20_011
"""Of the split and of the noise of the held-out loss: the same whatever the fit's seed."""
_AT_ONCE = 2**16  # draws, or pairs, in one part of a loss


@dataclass(frozen=True)
class Pairs:
    """Simulations: theta (N, D) and x (N, ...)."""

    theta: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> "Pairs":
        return Pairs(self.theta[rows], self.x[rows])

    def split(self, fraction: float) -> tuple["Pairs", "Pairs"]:
        """Rows to train on and rows held out, at least one of each; the same ones for the same data."""
        n_held_out = min(max(1, round(fraction * len(self))), len(self) - 1)
        with seeded(HELD_OUT_SEED):
            order = torch.randperm(len(self)).to(self.x.device)
        return self[order[n_held_out:]], self[order[:n_held_out]]

    def batches(self, size: int) -> Iterator["Pairs"]:
        """Batches without end, each row once in a round; a round's short rest is left out."""
        while True:
            yield from self.round(size)

    def round(self, size: int) -> Iterator["Pairs"]:
        """One round of them."""
        size = min(size, len(self))
        order = torch.randperm(len(self)).to(self.x.device)
        for i in range(0, len(self) - size + 1, size):
            yield self[order[i : i + size]]


@dataclass(frozen=True)
class Part:
    """A part of a loss that is evaluated, and goes back, by itself: so memory is bounded.

    Attributes:
        share: its factor in the loss.
        loss: evaluates it, with the weights of the moment.
    """

    share: float
    loss: Callable[[], Loss]


def sum_of(parts: list[Part]) -> float:
    """The value of a loss."""
    return sum(part.share * part.loss().value for part in parts)


class Elbo:
    """Batches of x and the loss of each; `theta` is not looked at."""

    iterations = "steps"
    averaging = 0.0

    def __init__(
        self,
        family: ConditionalFamily,
        potential: BasePotential,
        train: Pairs,
        held_out: Pairs,
        options: AmortizedOptions,
    ) -> None:
        self.family, self.potential, self.options = family, potential, options
        self._batches = train.batches(options.batch_size)
        self._held_out = held_out[: options.held_out_batch_size]

    def parts(self, x: Tensor, n: int) -> list[Part]:
        """Minus the ELBO of x (M, ...) from n draws for each, at most `_AT_ONCE` draws in a part."""
        draws = min(n, _AT_ONCE)
        return [
            Part(some * len(piece) / (n * len(x)), partial(elbo, self.family, self.potential, piece, some))
            for some in (min(draws, n - k) for k in range(0, n, draws))
            for piece in x.split(max(1, _AT_ONCE // draws))
        ]

    def steps(self) -> Iterator[list[Part]]:
        """The losses of one iteration's steps."""
        yield self.parts(next(self._batches).x, self.options.n_particles)

    def held_out(self) -> float:
        """The loss of the held-out rows, always with the same noise."""
        with seeded(HELD_OUT_SEED):
            return sum_of(self.parts(self._held_out.x, self.options.held_out_n_particles))


class Forward:
    """Batches of pairs; an iteration is a round."""

    iterations = "passes"
    averaging = 0.99  # of the weights: that of `estimators.training`

    def __init__(
        self, family: ConditionalFamily, train: Pairs, held_out: Pairs, options: AmortizedOptions
    ) -> None:
        self.family, self.options, self._train = family, options, train
        self._held_out = held_out[: options.validation_batch_size]

    def parts(self, pairs: Pairs) -> list[Part]:
        """Minus the mean log q of pairs."""
        starts = range(0, len(pairs), _AT_ONCE)
        pieces = [pairs[k : k + _AT_ONCE] for k in starts]
        return [Part(len(piece) / len(pairs), partial(forward, self.family, piece)) for piece in pieces]

    def steps(self) -> Iterator[list[Part]]:
        """The losses of one iteration's steps."""
        for batch in self._train.round(self.options.batch_size):
            yield self.parts(batch)

    def held_out(self) -> float:
        """The loss of the held-out pairs: all of them, unless `validation_batch_size` says how many."""
        return sum_of(self.parts(self._held_out))


class Both:
    """Batches of x with particles and, for the same rows, the pairs."""

    iterations = "steps"
    averaging = 0.99

    def __init__(
        self,
        family: ConditionalFamily,
        potential: BasePotential,
        train: Pairs,
        held_out: Pairs,
        options: AmortizedOptions,
    ) -> None:
        self._reverse = Elbo(family, potential, train, held_out, options)
        self._forward = Forward(family, train, held_out, options)
        self._batches, self._n = train.batches(options.batch_size), options.n_particles

    def steps(self) -> Iterator[list[Part]]:
        """The losses of one iteration's steps."""
        batch = next(self._batches)
        yield [*self._reverse.parts(batch.x, self._n), *self._forward.parts(batch)]

    def held_out(self) -> float:
        """The sum of both held-out losses."""
        return self._reverse.held_out() + self._forward.held_out()


def elbo(family: ConditionalFamily, potential: BasePotential, x: Tensor, n: int) -> Loss:
    """Minus the ELBO, averaged over x (M, ...), from n draws for each."""
    path = torch.is_grad_enabled()
    return reverse_kl(family.at(x), _paired_with(potential, x, n), n, stick_the_landing=path)


def _paired_with(potential: BasePotential, x: Tensor, n: int) -> LogDensity:
    """The potential of theta (n M, D), n rounds over x (M, ...)."""
    repeated = x.expand(n, *x.shape).flatten(0, 1)

    def log_p(theta: Tensor) -> Tensor:
        return potential.evaluate(theta, repeated, x_is_iid=False)

    return log_p


def forward(family: ConditionalFamily, pairs: Pairs) -> Loss:
    """Minus log q(theta | x), averaged over pairs."""
    loss = -family.log_prob(pairs.theta, pairs.x).mean()
    return Loss(loss, float(loss.detach()))


Objective = Elbo | Forward | Both
