r"""The one training loop: minibatch AdamW on the mean of a loss per row, stopped on held-out rows.

Beside the plain loop it does three things that bring a learned likelihood nearer to the true one: the weights
that are validated and kept are a running average of the iterates w_t (Polyak and Juditsky 1992),

    a_t = d_t a_(t-1) + (1 - d_t) w_t,    d_t = min(averaging, (1 + t) / (10 + t)),

weights decay apart from the gradient (Loshchilov and Hutter 2019), and the learning rate falls where the
held-out loss does not: by the factor `cooling` after `cool_after` epochs without a better one. At the end the
module holds the average of the epoch with the lowest held-out loss. No single row decides which that is: see
`core.losses.within_reach`.

Every epoch runs under a seed of its own, derived from the one before, so that a run resumed from its
`TrainingState` takes the steps of one that was never stopped.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visbi.core.checks import violation
from visbi.core.losses import within_reach
from visbi.core.progress import Progress
from visbi.core.random import fresh_seed, seeded, spawn_seeds
from visbi.core.types import Seed
from visbi.estimators.training_state import TrainingOptions, TrainingState, TrainingTrace

__all__ = ["train"]

_VALIDATION_ROWS = 8192  # held-out rows in one call
_MOST_SKIPPED = 0.5  # of an epoch's steps


def train(
    module: nn.Module,
    loss: Callable[..., Tensor],
    data: Sequence[Tensor],
    options: TrainingOptions,
    *,
    weights: Tensor | None = None,
    seed: Seed = None,
    resume: TrainingState | None = None,
    show_progress_bar: bool = False,
    description: str = "Training",
) -> TrainingState:
    """Train `module` in place; at the end it holds the best averaged weights, in evaluation mode.

    Args:
        module: what is trained.
        loss: called with a batch of each tensor in `data`; one number per row, (B,).
        data: tensors of equally many rows.
        options: how.
        weights: one non-negative number per row, its share in the loss up to a common factor.
        seed: of the split and all that follows; not used on resuming.
        resume: the state that an earlier call on the same rows and module returned.
        show_progress_bar, description: a progress bar and its title.

    Returns:
        The state after the last epoch.

    Raises:
        ValueError: too few rows, or `resume` belongs to other rows.
        RuntimeError: the loss is not finite, again and again.

    Ctrl-C ends training and keeps the best weights so far.

    >>> x = torch.linspace(-1, 1, 200).unsqueeze(1)
    >>> line = nn.Linear(1, 1)
    >>> options = TrainingOptions(max_epochs=3)
    >>> state = train(line, lambda x: (line(x) - x).square().sum(1), [x], options, seed=0)
    >>> len(state.trace.validation), state.trace.stop_reason
    (3, 'max_epochs')
    """
    run = _Run(module, loss, data, options, weights, _start(data[0].shape[0], seed, resume))
    with Progress(show_progress_bar, desc=description, unit=" epochs") as bar:
        try:
            while not (reason := _stop_reason(run.trace, options)):
                run.epoch()
                bar.note(f"held_out={run.trace.validation[-1]:.4g}, best={run.trace.best_loss:.4g}")
                bar.update()
        except KeyboardInterrupt:
            if not run.best:
                raise
            reason = "interrupted"
    if not run.best:
        raise RuntimeError(
            violation("loss", "a finite value on the held-out rows", "NaN or Inf after every epoch")
        )
    state = run.state(reason)
    module.load_state_dict(run.best)
    module.eval()
    return state


def _start(n_rows: int, seed: Seed, resume: TrainingState | None) -> TrainingState:
    if resume is None:
        first = fresh_seed() if seed is None else int(seed)
        return TrainingState(TrainingTrace(), n_rows, first, spawn_seeds(first, 1)[0])
    if resume.n_rows != n_rows:
        expected = f"a state of training on {n_rows} rows"
        raise ValueError(violation("resume", expected, f"one on {resume.n_rows}"))
    return resume


def _stop_reason(trace: TrainingTrace, options: TrainingOptions) -> str:
    if _waiting(trace, options)[0] >= options.patience:
        return "no improvement"
    return "max_epochs" if len(trace.validation) >= options.max_epochs else ""


def _waiting(trace: TrainingTrace, options: TrainingOptions) -> tuple[int, int]:
    """Epochs since the held-out loss last fell by what is worth it, and how often the rate has fallen.

    The rate falls where the loss has not for `cool_after` epochs since it or the rate did.
    """
    level, since, waited, coolings = math.inf, 0, 0, 0
    for loss in trace.validation:
        fell = loss < level - options.worth
        level = loss if fell else level
        since, waited = (0, 0) if fell else (since + 1, waited + 1)
        if waited == options.cool_after:
            waited, coolings = 0, coolings + 1
    return since, coolings


class _Run:
    """One call of `train`, advanced epoch by epoch: module, optimiser, average and the split rows."""

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        data: Sequence[Tensor],
        options: TrainingOptions,
        weights: Tensor | None,
        start: TrainingState,
    ) -> None:
        self.module, self.loss, self.options, self.start = module, loss, options, start
        self.trace, self.next_seed, self.steps, self.best = (
            start.trace,
            start.next_seed,
            start.steps,
            start.best,
        )
        self.held_out, self.rows = self._split(data, weights)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), fused=True)
        if start.last:
            module.load_state_dict(start.last)
            self.optimizer.load_state_dict(copy.deepcopy(start.optimizer))
        self.average = _cloned({**self.parameters, **start.average})

    def _split(self, data: Sequence[Tensor], weights: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Held-out rows and rows to train on, each with their weights (of mean 1) in front."""
        n_rows, device = data[0].shape[0], data[0].device
        n_held_out = max(1, round(self.options.validation_fraction * n_rows))
        if n_held_out >= n_rows:
            raise ValueError(violation("data", "rows to train on beside those held out", f"{n_rows} rows"))
        with seeded(self.start.seed):
            order = torch.randperm(n_rows).to(device)
        row_weights = torch.ones(n_rows, device=device) if weights is None else weights / weights.mean()
        tensors = [row_weights, *data]
        return [t[order[:n_held_out]] for t in tensors], [t[order[n_held_out:]] for t in tensors]

    def epoch(self) -> None:
        """All rows once, then the held-out ones."""
        options = self.options
        rate = options.learning_rate * options.cooling ** _waiting(self.trace, options)[1]
        for group in self.optimizer.param_groups:
            group.update(lr=rate, weight_decay=options.weight_decay)
        with seeded(self.next_seed):
            losses, n_steps = self._take_steps()
        skipped = n_steps - len(losses)
        if skipped > _MOST_SKIPPED * n_steps:
            got = f"NaN or Inf in {skipped} of the {n_steps} steps of one epoch"
            advice = "Look for outliers in theta and x, or lower learning_rate."
            raise RuntimeError(f"{violation('loss', 'finite values', got)}. {advice}")
        validation, averaged = self._validate()
        better = validation < self.trace.best_loss
        self.trace = TrainingTrace(
            train=(*self.trace.train, sum(losses) / len(losses)),
            validation=(*self.trace.validation, validation),
            best_epoch=len(self.trace.validation) if better else self.trace.best_epoch,
            skipped_steps=self.trace.skipped_steps + skipped,
        )
        self.best = averaged if better else self.best
        self.next_seed = spawn_seeds(self.next_seed, 1)[0]

    def _take_steps(self) -> tuple[list[float], int]:
        """Losses of the steps that were taken, and how many there were to take."""
        order = torch.randperm(self.rows[0].shape[0]).to(self.rows[0].device)
        n_steps = math.ceil(len(order) / self.options.batch_size)
        shuffled = (tensor[order].tensor_split(n_steps) for tensor in self.rows)
        parameters: list[Tensor] = list(self.parameters.values())
        average = list(self.average.values())
        self.module.train()
        losses: list[float] = []
        for weights, *batch in zip(*shuffled, strict=True):
            value = (weights * self.loss(*batch)).mean()
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if norm > self.options.clip_value:
                nn.utils.clip_grads_with_norm_(parameters, self.options.clip_value, norm)
            if not math.isfinite(float(value.detach() + norm)):
                continue
            self.optimizer.step()
            self.steps += 1
            keep = min(self.options.averaging, (1 + self.steps) / (10 + self.steps))
            get_ema_multi_avg_fn(keep)(average, parameters, 0)
            losses.append(float(value.detach()))
        return losses, n_steps

    @torch.no_grad()
    def _validate(self) -> tuple[float, dict[str, Tensor]]:
        """The held-out loss of the averaged weights, and a copy of these."""
        last = _cloned(self.parameters)
        _set(self.parameters, self.average)
        self.module.eval()
        pieces = math.ceil(len(self.held_out[0]) / _VALIDATION_ROWS)
        weights, *data = self.held_out
        chunks = zip(*(tensor.tensor_split(pieces) for tensor in data), strict=True)
        losses = within_reach(torch.cat([self.loss(*batch) for batch in chunks]))
        averaged = _cloned(self.module.state_dict())
        _set(self.parameters, last)
        loss = float((weights * losses).sum() / weights.sum())
        return (loss if math.isfinite(loss) else math.inf), averaged

    def state(self, stop_reason: str) -> TrainingState:
        """Copies of all that a later call needs."""
        return TrainingState(
            trace=TrainingTrace(**{**vars(self.trace), "stop_reason": stop_reason}),
            n_rows=self.start.n_rows,
            seed=self.start.seed,
            next_seed=self.next_seed,
            steps=self.steps,
            last=_cloned(self.module.state_dict()),
            average=_cloned(self.average),
            best=self.best,
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
        )


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _set(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
