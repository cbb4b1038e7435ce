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

Rates fall sooner than they usually do, networks that go on start at a lower one, and batches grow with the
runs: two networks of two moons took 66 CPU seconds of training in four rounds of 2500 runs, not 116 as with
nearly the usual waiting and batches of 200; held-out losses of the last round were within .005. With two
workers, 10,000 runs of two moons took 61 seconds by the clock (mean of five observations) where any fall of
the held-out loss was worth going on for, and 44 where it had to be .002 nats; mean C2ST .507 and .511.

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
_BATCHES, _SMALLEST, _LARGEST = 20, 50, 400  # of an epoch, and rows in one
_RATE = 1.6e-2  # of learning, at first
_COOL_AFTER, _PATIENCE = 3, 8  # epochs, of
_WORTH = 2e-3  # nats per run: less would not show in a posterior, and takes half of the epochs
_EPOCH = 20  # steps at least: the weights that are judged are an average over about a hundred
_WARM = 0.25  # of that rate: networks that go on should not forget
_RESCALED = 0.5  # share of its former spread below which x asks for another standardisation


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the likelihood is learnt in each round.

    Attributes:
        flow: "maf", "nsf", or "auto": splines where x has few entries, affine layers where it has many.
        num_transforms, hidden_features: layers of the flow, and the width of its networks.
        ensemble: networks that are averaged.
        options: of training; None takes the usual ones, with batches that suit the number of runs.
    """

    flow: str
    num_transforms: int
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
        box = all(isinstance(block, UniformBlock) for block in coords.blocks)
        start = None if earlier is None or _narrowed(earlier, x) else earlier.estimator
        return fit_likelihood(
            theta,
            x,
            flow=by_length if self.flow == AUTO else self.flow,
            num_transforms=self.num_transforms,
            hidden_features=self.hidden_features,
            z_score_theta="independent" if box else "none",
            theta_embedding_net=None if box else PriorCoordinates(coords),
            ensemble=self.ensemble,
            options=self.options or _options(len(theta), warm=start is not None),
            workers=workers,
            warm_start=start,
            seed=seed,
            show_progress_bar=show_progress_bar,
        )


def _options(n: int, *, warm: bool) -> TrainingOptions:
    """For n runs; `warm` networks go on from earlier ones, and the next round from where this one ends."""
    batch_size = min(max(n // _BATCHES, _SMALLEST), _LARGEST)
    longer = max(1.0, _EPOCH * batch_size / n)
    return TrainingOptions(
        learning_rate=_WARM * _RATE if warm else _RATE,
        batch_size=batch_size,
        cool_after=math.ceil(_COOL_AFTER * longer),
        patience=math.ceil(_PATIENCE * longer),
        worth=_WORTH,
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
