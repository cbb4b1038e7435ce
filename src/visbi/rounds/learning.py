"""What a round learns from, and how.

Two choices are made by what was measured, once each, on likelihoods learnt from 1000 runs of two moons and
SLCP, by the mean of log p(x | theta) - log q(x | theta) at new runs near the posterior:

    batches of 50, not 200         SLCP .84, not 1.44 nats (there are more steps before training stops)
    theta in a box as it is, not
    in the prior's coordinates     SLCP .84, not 1.34; two moons .12, not .15

Rates start higher than they usually do: at 1.6e-2, not 4e-3, two networks of 1000 prior runs of SLCP lost .29
nats a run less (three seeds) in two thirds of the steps, those of two moons .02 in as many; at 6.4e-2 they
lost 2 and .6 more. Four rounds of 250 runs of SLCP then gave a mean C2ST of .736, not .851, and .540 and .530
on two moons (five observations each).

How long: splines over a number of epochs that is known, their rate falling linearly to zero, and so affine
layers from 2000 runs on. Beside waiting for the held-out loss to rest, two networks in four rounds (mean of
-log q at runs from exact posterior draws, CPU seconds of training on one machine):

    two moons, 10,000      3 layers, waiting -4.3125, 45 s;  3 layers -4.3132, 18 s;  2 layers -4.3127, 13 s
    SLCP, 10,000           3 layers, waiting  6.221,  61 s;  3 layers  6.222,  30 s;  2 layers  6.208,  18 s
    lynx and hare, 10,000  3 layers, waiting  1.192,  17 s;  3 layers  1.031,  13 s (affine)

From 40,000 runs on batches are a hundredth of them, 1,000 at most: at 100,000 two moons then took 56, not 71
CPU seconds (C2ST .489 / .499) and SLCP 120, not 155 (.513 / .520).

On 1000 runs of lynx and hare affine layers lost .8 nats by it (five seeds); there the held-out loss says when
to stop. Splines may have larger weights than usual: with a decay of .1 two moons lost .02 nats.

Where a prior is no box, its coordinates are what the network sees: a wide prior of positive rates would leave
most of a standardised theta in a corner.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.estimators import TrainedLikelihood, TrainingOptions, fit_likelihood
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.fitting.config import AUTO
from visbi.priors.blocks import UniformBlock
from visbi.priors.transforms import Coordinates
from visbi.simulators import Simulations

__all__ = ["FEWEST_KEPT", "Learning", "learning_set", "usable_runs"]

FEWEST_KEPT = 50
"""Runs that a likelihood is learnt from."""
_FEW_ENTRIES = 16  # of x, up to which splines are affordable
_FEW_BATCHES, _MANY_BATCHES = 20, 100  # of an epoch, while batches are
_SMALLEST, _USUAL, _LARGEST = 50, 400, 1000  # rows at least; at most with few, and with many of them
_RATE = 1.6e-2  # of learning, at first
_LAYERS = {"nsf": 2, "maf": 3}
_MANY = 2000  # runs, from which affine layers are trained as splines are: for
_EPOCHS, _WARM_EPOCHS = 30, 15  # networks that go on for half of it
_SPLINES_DECAY = 0.01  # of weights
_COOL_AFTER, _PATIENCE = 3, 8  # epochs, where they are not known, of
_WORTH = 2e-3  # nats per run: less would not show in a posterior, and takes half of the epochs
_STEPS = 20  # of an epoch, at least: the weights that are judged are an average over about a hundred
_WARM, _WARM_WAITING = 0.5, 0.25  # of that rate: networks that go on should not forget
_RESCALED = 0.5  # share of its former spread below which x asks for another standardisation


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the likelihood is learnt in each round.

    Attributes:
        flow: "maf", "nsf", or "auto": splines where x has few entries, affine layers where it has many.
        num_transforms: layers of the flow; None takes `_LAYERS`. hidden_features: width of its networks.
        ensemble: networks that are averaged.
        options: of training; None takes the usual ones, with batches that suit the number of runs.
    """

    flow: str
    num_transforms: int | None
    hidden_features: int
    ensemble: int
    options: TrainingOptions | None

    def learn(
        self,
        theta: Tensor,
        x: Tensor,
        coords: Coordinates,
        *,
        earlier: TrainedLikelihood | None,
        workers: int | None,
        seed: int,
        show_progress_bar: bool,
    ) -> TrainedLikelihood:
        """The likelihood of x (N, ...) given theta (N, D).

        It goes on from the networks of the round before, unless x has become so much narrower that their
        standardisation no longer fits.
        """
        by_length = "nsf" if x[0].numel() <= _FEW_ENTRIES else "maf"
        flow = by_length if self.flow == AUTO else self.flow
        box = all(isinstance(block, UniformBlock) for block in coords.blocks)
        start = None if earlier is None or _narrowed(earlier, x) else earlier.estimator
        return fit_likelihood(
            theta,
            x,
            flow=flow,
            num_transforms=_LAYERS[flow] if self.num_transforms is None else self.num_transforms,
            hidden_features=self.hidden_features,
            z_score_theta="independent" if box else "none",
            theta_embedding_net=None if box else PriorCoordinates(coords),
            ensemble=self.ensemble,
            options=self.options or _options(len(theta), splines=flow == "nsf", warm=start is not None),
            workers=workers,
            warm_start=start,
            seed=seed,
            show_progress_bar=show_progress_bar,
        )


def _options(n: int, *, splines: bool, warm: bool) -> TrainingOptions:
    """For n runs; `warm` networks go on from earlier ones, and the next round from where this one ends."""
    largest = min(max(n // _MANY_BATCHES, _USUAL), _LARGEST)
    batch_size = min(max(n // _FEW_BATCHES, _SMALLEST), largest)
    longer = max(1.0, _STEPS * batch_size / n)
    if not splines and n < _MANY:
        return TrainingOptions(
            learning_rate=_WARM_WAITING * _RATE if warm else _RATE,
            batch_size=batch_size,
            cool_after=math.ceil(_COOL_AFTER * longer),
            patience=math.ceil(_PATIENCE * longer),
            worth=_WORTH,
        )
    epochs = math.ceil((_WARM_EPOCHS if warm else _EPOCHS) * longer)
    return TrainingOptions(
        learning_rate=_WARM * _RATE if warm else _RATE,
        schedule="linear",
        batch_size=batch_size,
        max_epochs=epochs,
        patience=epochs,
        weight_decay=_SPLINES_DECAY if splines else TrainingOptions.weight_decay,
    )


def _narrowed(earlier: TrainedLikelihood, x: Tensor) -> bool:
    scale = earlier.estimator.members[0].standardise_x.scale
    return bool((x.double().std(0) < _RESCALED * scale).any())


def learning_set(
    runs: Sequence[Simulations], usable: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """theta (N, D) and x (N, ...) of all runs so far that are usable, and which of them all these are, bool.

    Raises:
        ValueError: too few of them, or a `usable` that does not return one bool for each.
    """
    theta, x = torch.cat([s.theta for s in runs]), torch.cat([s.x for s in runs])
    if len(theta) < FEWEST_KEPT:
        raise ValueError(violation("simulations", f"at least {FEWEST_KEPT} successful runs", len(theta)))
    keep = torch.ones(len(x), dtype=torch.bool) if usable is None else _kept(usable, x)
    if int(keep.sum()) < FEWEST_KEPT:
        raise ValueError(violation("usable", f"to keep at least {FEWEST_KEPT} runs", int(keep.sum())))
    return theta[keep], x[keep], keep


def usable_runs(runs: Simulations, usable: Callable[[Tensor], Tensor] | None) -> Simulations:
    """Those runs that a likelihood would learn from.

    Raises:
        ValueError: a `usable` that does not return one bool for each.
    """
    if usable is None:
        return runs
    keep = _kept(usable, runs.x)
    return replace(runs, theta=runs.theta[keep], x=runs.x[keep])


def _kept(usable: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    keep = usable(x)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != x.shape[:1]:
        got = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(violation("usable", f"to return a bool tensor of shape ({len(x)},)", got))
    return keep
