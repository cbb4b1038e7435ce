r"""An amortised fit: one q(theta | x) for all x, by the ELBO averaged over simulated observations,

    max_phi  E_{x ~ data} E_{theta ~ q_phi(. | x)} [ log p(theta | x) - log q_phi(theta | x) ],

whose maximum over all q is the posterior at every x (Rezende, Mohamed 2015; with learned likelihoods:
Glöckler, Deistler, Macke 2022). A step takes a batch of x, draws particles for each, evaluates the potential
on all pairs at once and follows the path gradient (Roeder, Wu, Duvenaud 2017).

After every step the loss is taken on held-out x, always the same ones with the same noise, whatever the seed:
so its differences are those of q. The weights with the lowest one are kept.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.core.random import seeded
from visbi.core.types import LogDensity, ZScore
from visbi.families.conditional import ConditionalFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.fitting.amortized_config import AmortizedOptions, check_simulations, chosen_config
from visbi.fitting.state import AmortizedFit, AmortizedTrace, AutoFit, SingleFit, Untrained
from visbi.objectives import Loss, reverse_kl
from visbi.potentials.base import BasePotential
from visbi.priors.blocks import BijectionBlock
from visbi.priors.transforms import Coordinates, coordinates

__all__ = ["amortize", "conditional_family", "fit_amortized"]

_HELD_OUT_SEED = 20_011  # of the split and of the noise of the held-out loss
_GIVE_UP = 50


def amortize(
    simulations: tuple[Any, Any],
    potential: BasePotential,
    prior: Distribution,
    coords: Coordinates,
    options: AmortizedOptions,
    *,
    choices: tuple[Any, Any, Any],
    method: str,
    embedding_net: nn.Module | None,
    before: Untrained | SingleFit | AutoFit | AmortizedFit,
) -> AmortizedFit:
    """All of `VIPosterior.train_amortized`: check, build or go on, fit.

    Args:
        simulations: theta and x as they came.
        potential: log p(theta | x) + const, for pairs.
        prior: over theta.
        coords: the posterior's coordinates of its support.
        options: see `AmortizedOptions`.
        choices: what to build: explicit, `params`, and the instance's.
        method: the instance's divergence; any but "rKL", here or in `params`, warns that it is not used.
        embedding_net: copied.
        before: what the posterior has now.
    """
    _, x = check_simulations(*simulations, coords.dim_theta, coords.low.device)
    explicit, params, instance = choices
    kept = before if isinstance(before, AmortizedFit) and not options.retrain_from_scratch else None
    config = chosen_config(explicit, params, None if kept is None else kept.conditional.config, instance)
    method = method if params is None else params.vi_method
    if method != "rKL":
        said = f"train_amortized() maximises the ELBO, that is rKL: vi_method = {method!r} is not used."
        warnings.warn(said, stacklevel=3)
    if isinstance(before, SingleFit | AutoFit):
        warnings.warn("train_amortized() replaces the fit to a single observation.", stacklevel=3)
    with seeded(options.seed):
        family = conditional_family(
            config,
            _of_kind(config.z_score_theta, prior, coords, instance.z_score_theta),
            x,
            embedding_net=copy.deepcopy(embedding_net),
            before=kept,
        )
        _probe(family, potential, x)
        return fit_amortized(family, potential, x, options)


def _of_kind(wanted: ZScore, prior: Distribution, coords: Coordinates, kind: ZScore) -> Coordinates:
    """Coordinates of the kind that is wanted: a copy of `coords`, which are of `kind`, or others.

    Where `coords` come from a map of the user's own, the others do so too.
    """
    if wanted == kind:
        return copy.deepcopy(coords)
    own = None
    if len(coords.blocks) == 1 and isinstance(block := coords.blocks[0], BijectionBlock):
        own = None if _agree(coords, prior, kind) else block.link.inv
    return coordinates(prior, z_score=wanted, theta_transform=own)


def _agree(coords: Coordinates, prior: Distribution, kind: ZScore) -> bool:
    """Whether `coords` are those that the prior alone would have."""
    try:
        again = coordinates(prior, z_score=kind)
    except ValueError:  # no support, so no map but the user's
        return False
    with seeded(_HELD_OUT_SEED):
        z = torch.randn(16, coords.dim_z, dtype=torch.float64).to(coords.low.device)
    return again.dim_z == coords.dim_z and torch.allclose(again.to_theta(z)[0], coords.to_theta(z)[0])


def _probe(family: ConditionalFamily, potential: BasePotential, x: Tensor) -> None:
    """Evaluate the potential once, so that a wrong shape shows before any fit."""
    with torch.no_grad(), seeded(_HELD_OUT_SEED):
        family.eval()
        _loss(family, potential, x[:2], 2)


def conditional_family(
    config: ConditionalConfig,
    coords: Coordinates,
    x: Tensor,
    *,
    embedding_net: nn.Module | None,
    before: AmortizedFit | None,
) -> ConditionalFamily:
    """The family to train: that of an earlier fit where it can go on, else a new one with fresh weights.

    Args:
        config: what to build.
        coords: coordinates of the prior's support for `config.z_score_theta`.
        x: observations (N, ...), from which a new family takes mean and scale.
        embedding_net: used as it is by a new family.
        before: an earlier fit to go on from.

    Raises:
        ValueError: the earlier fit has x of another shape.
    """
    if before is not None:
        kept = before.conditional
        changed = [name for name, value in vars(config).items() if value != getattr(kept.config, name)]
        changed += [] if embedding_net is None else ["embedding_net"]
        if not changed:
            if x.shape[1:] != kept.x_shape:
                expected = f"shape (N, {', '.join(map(str, kept.x_shape))}), or retrain_from_scratch=True"
                raise ValueError(violation("x", expected, tuple(x.shape)))
            return kept
        warnings.warn(f"q is built anew, because of another {', '.join(changed)}.", stacklevel=4)
    family = ConditionalFamily(coords, x.shape[1:], config, embedding_net)
    return family.to(x.device).fit_standardisation(x)


def fit_amortized(
    family: ConditionalFamily, potential: BasePotential, x: Tensor, options: AmortizedOptions
) -> AmortizedFit:
    """Fit q(theta | x), in place, to observations x (N, ...).

    Args:
        family: q.
        potential: log p(theta | x) + const, for pairs.
        x: simulated observations; a share of them is held out.
        options: see `AmortizedOptions`.

    Returns:
        The fit, with the weights of the lowest held-out loss. Ctrl-C ends it early.
    """
    train, held_out = _split(x, options.validation_fraction)
    held_out = held_out[: options.held_out_batch_size]
    parameters: list[Tensor] = [p for p in family.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.gamma)
    progress = _Progress(family, _held_out_loss(family, potential, held_out, options))
    reason = f"reached max_num_iters = {options.max_num_iters}"
    batches, bar = _batches(train, options.batch_size), _bar(options)
    try:
        for _ in bar:
            family.train()
            loss = _loss(family, potential, next(batches), options.n_particles)
            moved = _step(loss, parameters, optimizer, options.clip_value)
            if moved:
                scheduler.step()
            progress.record(loss, moved, _held_out_loss(family, potential, held_out, options))
            if progress.since_best >= options.stop_after_iters:
                reason = f"no lower held-out loss for stop_after_iters = {options.stop_after_iters} steps"
                break
            if progress.skipped_in_a_row >= _GIVE_UP:
                reason = f"no finite loss or gradient for {_GIVE_UP} steps in a row"
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        progress.restore()
    return AmortizedFit(family, progress.trace(reason), options)


class _Progress:
    """Losses so far and the best weights."""

    def __init__(self, family: ConditionalFamily, start: float) -> None:
        self.family = family
        self.losses: list[float] = []
        self.held_out = [start]
        self.best, self.best_iter = start, 0
        self.skipped = self.skipped_in_a_row = self.excluded = 0
        self._keep()

    @property
    def since_best(self) -> int:
        return len(self.losses) - self.best_iter

    def record(self, loss: Loss, moved: bool, held_out: float) -> None:
        self.losses.append(loss.value)
        self.held_out.append(held_out)
        self.excluded += loss.excluded
        self.skipped += not moved
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if held_out < self.best or (math.isnan(self.best) and math.isfinite(held_out)):
            self.best, self.best_iter = held_out, len(self.losses)
            self._keep()

    def _keep(self) -> None:
        self._weights = {name: value.clone() for name, value in self.family.state_dict().items()}

    def restore(self) -> None:
        self.family.load_state_dict(self._weights)
        self.family.eval()

    def trace(self, reason: str) -> AmortizedTrace:
        return AmortizedTrace(
            loss=tuple(self.losses),
            validation_loss=tuple(self.held_out[: len(self.losses) + 1]),
            stop_reason=reason,
            best_iter=self.best_iter,
            skipped=self.skipped,
            excluded=self.excluded,
        )


def _split(x: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, at least one of each; the same ones for the same data."""
    n_held_out = min(max(1, round(fraction * len(x))), len(x) - 1)
    with seeded(_HELD_OUT_SEED):
        order = torch.randperm(len(x)).to(x.device)
    return x[order[n_held_out:]], x[order[:n_held_out]]


def _batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """Batches without end, each x once in a round; a round's short rest is left out."""
    size = min(size, len(x))
    while True:
        order = torch.randperm(len(x)).to(x.device)
        for i in range(0, len(x) - size + 1, size):
            yield x[order[i : i + size]]


def _loss(family: ConditionalFamily, potential: BasePotential, x: Tensor, n: int) -> Loss:
    """Minus the ELBO, averaged over x (M, ...)."""
    path = torch.is_grad_enabled()
    return reverse_kl(family.at(x), _paired_with(potential, x, n), n, stick_the_landing=path)


def _paired_with(potential: BasePotential, x: Tensor, n: int) -> LogDensity:
    """The potential of theta (n M, D), n rounds over x (M, ...)."""
    repeated = x.expand(n, *x.shape).flatten(0, 1)

    def log_p(theta: Tensor) -> Tensor:
        return potential.evaluate(theta, repeated, x_is_iid=False)

    return log_p


@torch.no_grad()
def _held_out_loss(
    family: ConditionalFamily, potential: BasePotential, x: Tensor, options: AmortizedOptions
) -> float:
    family.eval()
    with seeded(_HELD_OUT_SEED):
        return _loss(family, potential, x, options.held_out_n_particles).value


def _step(loss: Loss, parameters: list[Tensor], optimizer: torch.optim.Optimizer, clip_value: float) -> bool:
    """One step of the optimiser; False, and nothing changed, if loss or gradient is not finite."""
    if not (math.isfinite(loss.value) and bool(torch.isfinite(loss.surrogate))):
        return False
    optimizer.zero_grad(set_to_none=True)
    loss.surrogate.backward()
    if not bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, clip_value))):
        return False
    optimizer.step()
    return True


def _bar(options: AmortizedOptions) -> Any:
    if not options.show_progress_bar:
        return range(options.max_num_iters)
    from tqdm.auto import tqdm

    return tqdm(range(options.max_num_iters), desc="Fitting q(theta | x)", leave=False)
