r"""The one training loop: minibatch AdamW on the mean of a loss per row, stopped on held-out rows.

Beside the plain loop it does three things that bring a learned likelihood nearer to the true one: the weights
that are validated and kept are a running average of the iterates w_t (Polyak and Juditsky 1992),

    a_t = d_t a_(t-1) + (1 - d_t) w_t,    d_t = min(averaging, (1 + t) / (10 + t)),

weights decay apart from the gradient (Loshchilov and Hutter 2019), and the learning rate falls: by the factor
`cooling` after `cool_after` epochs in which the held-out loss did not, or linearly to zero at a last epoch
that is known. At the end the module holds the average of the epoch with the lowest held-out loss. No single
row decides which that is: see `core.losses.within_reach`.

Every epoch runs under a seed of its own, derived from the one before, so that a run resumed from its
`TrainingState` takes the steps of one that was never stopped.

Networks may be trained in one pass (`train_together`). Each has its own split, order of rows, learning rate,
clipping, average and end, and its weights are one row of a matrix (K, P): what happens to all weights of a
network is one operation, not one for each of its tensors.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from visbi.core.checks import violation
from visbi.core.losses import within_reach
from visbi.core.progress import Progress
from visbi.core.random import fresh_seed, seeded, spawn_seeds
from visbi.core.types import Seed
from visbi.estimators.training_state import TrainingOptions, TrainingState, TrainingTrace

__all__ = ["Trainee", "train", "train_together"]

_VALIDATION_ROWS = 8192  # held-out rows in one call
_MOST_SKIPPED = 0.5  # of an epoch's steps
_RISING = 0.1  # of all epochs, of a linear schedule

Loss = Callable[..., Tensor]
Together = Callable[[Sequence[int]], tuple[nn.Module, Loss]]


def train(
    module: nn.Module,
    loss: Loss,
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

    def alone(_: Sequence[int]) -> tuple[nn.Module, Loss]:
        return module, lambda *batch: loss(*(tensor[0] for tensor in batch))[None]

    trainee = Trainee(module, data, options, weights, seed, resume)
    train_together([trainee], alone, show_progress_bar=show_progress_bar, description=description)
    return trainee.state()


def train_together(
    trainees: Sequence["Trainee"],
    together: Together,
    *,
    show_progress_bar: bool = False,
    description: str = "Training",
) -> None:
    """Train networks in place, as `train` does, all of them in one pass for as long as they are trained.

    Args:
        trainees: the networks, which have equally many rows.
        together: given which of them are still trained, K whole numbers, makes one module of these networks,
            with parameters of the same names and a leading axis K (of a single one they may lack it), and its
            loss: called with a batch (K, B, ...) of each tensor of the data, (K, B).
        show_progress_bar, description: a progress bar of epochs and its title.
    """
    with Progress(show_progress_bar, desc=description, unit=" epochs") as bar:
        try:
            while left := [k for k, trainee in enumerate(trainees) if not trainee.stop_reason()]:
                group = _Group([trainees[k] for k in left], *together(left))
                while not any(trainees[k].stop_reason() for k in left):
                    group.epoch()
                    bar.note("; ".join(str(trainees[k]) for k in left))
                    bar.update()
        except KeyboardInterrupt:
            if not all(trainee.best for trainee in trainees):
                raise
            for trainee in trainees:
                trainee.interrupted = not trainee.stop_reason()
    for trainee in trainees:
        trainee.finish()


class Trainee:
    """A network, the rows that it learns from, and where its training stands; arguments are those of `train`.

    Attributes:
        weights, average: (P,), all that is trained, in the order of the network's parameters, and its running
            average. While it is trained they are rows of a `_Group`.
        rows, held_out: the data's tensors, each row's share in the loss (of mean 1) in front.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Sequence[Tensor],
        options: TrainingOptions,
        weights: Tensor | None = None,
        seed: Seed = None,
        resume: TrainingState | None = None,
    ) -> None:
        start = _start(data[0].shape[0], seed, resume)
        self.network, self.options, self._start = network, options, start
        self.trace, self.next_seed, self.steps, self.best = (
            start.trace,
            start.next_seed,
            start.steps,
            start.best,
        )
        self.interrupted = False
        self.held_out, self.rows = self._split(data, weights)
        if start.last:
            network.load_state_dict(start.last)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        kinds = sorted({f"{p.dtype} on {p.device}" for p in trained.values()})
        if len(kinds) != 1:
            got = ", ".join(kinds) or "none that is trained"
            raise ValueError(violation("module", "parameters of one dtype on one device", got))
        self._shapes = {name: p.shape for name, p in trained.items()}
        now = self.flat(trained)
        self.weights = nn.Parameter(now)
        self.average = self.flat(start.average) if start.average else now.clone()
        self.optimizer = torch.optim.AdamW([self.weights], fused=True)
        if start.optimizer:
            self.optimizer.load_state_dict(copy.deepcopy(start.optimizer))

    def __str__(self) -> str:
        return f"held_out={self.trace.validation[-1]:.4g}, best={self.trace.best_loss:.4g}"

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What is trained, of `tensors` by name, as one vector (P,); a copy."""
        return torch.cat([tensors[name].detach().flatten() for name in self._shapes])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Copies of the pieces of a vector (P,), by name."""
        pieces = vector.detach().split([shape.numel() for shape in self._shapes.values()])
        return {
            name: piece.view(shape).clone()
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def whole(self, vector: Tensor) -> dict[str, Tensor]:
        """Copies of all that the network holds, with what is trained as `vector` (P,) has it."""
        rest = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        return rest | self.named(vector)

    def _split(self, data: Sequence[Tensor], weights: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        n_rows, device = data[0].shape[0], data[0].device
        n_held_out = max(1, round(self.options.validation_fraction * n_rows))
        if n_held_out >= n_rows:
            raise ValueError(violation("data", "rows to train on beside those held out", f"{n_rows} rows"))
        with seeded(self._start.seed):
            order = torch.randperm(n_rows).to(device)
        row_weights = torch.ones(n_rows, device=device) if weights is None else weights / weights.mean()
        tensors = [row_weights, *data]
        return [t[order[:n_held_out]] for t in tensors], [t[order[n_held_out:]] for t in tensors]

    def shuffled(self) -> list[Tensor]:
        """The rows to train on in a random order."""
        order = torch.randperm(self.rows[0].shape[0]).to(self.rows[0].device)
        return [tensor[order] for tensor in self.rows]

    def set_rate(self) -> None:
        """Tell the optimiser what the next epoch's steps are."""
        rate = self.options.learning_rate * _share_of_rate(self.trace, self.options)
        for group in self.optimizer.param_groups:
            group.update(lr=rate, weight_decay=self.options.weight_decay)

    def step(self, norm: float) -> None:
        """Against the gradient, which has this norm."""
        if norm > self.options.clip_value:
            assert self.weights.grad is not None
            self.weights.grad.mul_(self.options.clip_value / (norm + 1e-6))
        self.optimizer.step()
        self.steps += 1
        keep = min(self.options.averaging, (1 + self.steps) / (10 + self.steps))
        self.average.lerp_(self.weights.detach(), 1 - keep)

    def ended_epoch(self, losses: Sequence[float], n_steps: int, validation: float) -> None:
        """Take note of an epoch: losses of the steps that were taken, and the held-out loss."""
        better = validation < self.trace.best_loss
        self.trace = TrainingTrace(
            train=(*self.trace.train, sum(losses) / len(losses)),
            validation=(*self.trace.validation, validation),
            best_epoch=len(self.trace.validation) if better else self.trace.best_epoch,
            skipped_steps=self.trace.skipped_steps + n_steps - len(losses),
        )
        self.best = self.whole(self.average) if better else self.best
        self.next_seed = spawn_seeds(self.next_seed, 1)[0]

    def stop_reason(self) -> str:
        """Why training is over; empty while it is not."""
        if self.interrupted:
            return "interrupted"
        if _waiting(self.trace, self.options)[0] >= self.options.patience:
            return "no improvement"
        return "max_epochs" if len(self.trace.validation) >= self.options.max_epochs else ""

    def finish(self) -> None:
        """Give the network the best weights.

        Raises:
            RuntimeError: there are none.
        """
        if not self.best:
            raise RuntimeError(
                violation("loss", "a finite value on the held-out rows", "NaN or Inf after every epoch")
            )
        self._last = self.whole(self.weights)
        for parameter in self.network.parameters():
            parameter.data = parameter.data.clone()  # no longer a part of a matrix
        self.network.load_state_dict(self.best)
        self.network.eval()

    def state(self) -> TrainingState:
        """Copies of all that a later call needs, once training is over."""
        return TrainingState(
            trace=TrainingTrace(**{**vars(self.trace), "stop_reason": self.stop_reason()}),
            n_rows=self._start.n_rows,
            seed=self._start.seed,
            next_seed=self.next_seed,
            steps=self.steps,
            last=self._last,
            average=self.named(self.average),
            best=self.best,
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
        )


class _Group:
    """Networks that take their steps together, as one module; their weights and gradients are (K, P)."""

    def __init__(self, trainees: Sequence[Trainee], module: nn.Module, loss: Loss) -> None:
        self.trainees, self.module, self.loss = trainees, module, loss
        self.weights = torch.stack([trainee.weights.detach() for trainee in trainees])
        self.averages = torch.stack([trainee.average for trainee in trainees])
        self.gradients = torch.zeros_like(self.weights)
        self.held_out = _stacked([trainee.held_out for trainee in trainees])
        for trainee, row, average, gradient in zip(
            trainees, self.weights, self.averages, self.gradients, strict=True
        ):
            trainee.weights.data, trainee.weights.grad, trainee.average = row, gradient, average
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() // len(trainees) for parameter in self.parameters]
        for parameter, piece in zip(self.parameters, self.weights.split(sizes, 1), strict=True):
            parameter.data = piece.view(parameter.shape)

    def epoch(self) -> None:
        """All rows once, then the held-out ones."""
        first, *others = self.trainees
        for trainee in self.trainees:
            trainee.set_rate()
        with seeded(first.next_seed):  # dropout and what else is random in a module goes on from here
            rows = [first.shuffled()]
            for trainee in others:
                with seeded(trainee.next_seed):
                    rows.append(trainee.shuffled())
            losses, n_steps = self._take_steps(_stacked(rows))
        for skipped in (n_steps - len(taken) for taken in losses):
            if skipped > _MOST_SKIPPED * n_steps:
                got = f"NaN or Inf in {skipped} of the {n_steps} steps of one epoch"
                advice = "Look for outliers in theta and x, or lower learning_rate."
                raise RuntimeError(f"{violation('loss', 'finite values', got)}. {advice}")
        for trainee, taken, validation in zip(self.trainees, losses, self._validate(), strict=True):
            trainee.ended_epoch(taken, n_steps, validation)

    def _take_steps(self, rows: list[Tensor]) -> tuple[list[list[float]], int]:
        """For each network the losses of the steps that were taken, and how many there were to take."""
        n_steps = math.ceil(rows[0].shape[1] / self.trainees[0].options.batch_size)
        losses: list[list[float]] = [[] for _ in self.trainees]
        self.module.train()
        for weights, *batch in zip(*(tensor.tensor_split(n_steps, 1) for tensor in rows), strict=True):
            values = (weights * self.loss(*batch)).mean(1)
            gradients = torch.autograd.grad(values.sum(), self.parameters, materialize_grads=True)
            torch.cat([gradient.reshape(len(losses), -1) for gradient in gradients], 1, out=self.gradients)
            found = torch.stack([values.detach(), self.gradients.norm(dim=1)], 1).tolist()
            for trainee, taken, (value, norm) in zip(self.trainees, losses, found, strict=True):
                if math.isfinite(value + norm):
                    trainee.step(norm)
                    taken.append(value)
        return losses, n_steps

    @torch.no_grad()
    def _validate(self) -> list[float]:
        """The held-out losses of the averaged weights."""
        last = self.weights.clone()
        self.weights.copy_(self.averages)
        self.module.eval()
        pieces = math.ceil(self.held_out[0].shape[1] / _VALIDATION_ROWS)
        weights, *data = self.held_out
        chunks = zip(*(tensor.tensor_split(pieces, 1) for tensor in data), strict=True)
        losses = torch.cat([self.loss(*batch) for batch in chunks], 1)
        self.weights.copy_(last)
        means = [
            float((share * within_reach(each)).sum() / share.sum())
            for share, each in zip(weights, losses, strict=True)
        ]
        return [mean if math.isfinite(mean) else math.inf for mean in means]


def _stacked(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Tensors (K, ...) of what each of K sequences holds."""
    return [torch.stack(each) for each in zip(*tensors, strict=True)]


def _start(n_rows: int, seed: Seed, resume: TrainingState | None) -> TrainingState:
    if resume is None:
        first = fresh_seed() if seed is None else int(seed)
        return TrainingState(TrainingTrace(), n_rows, first, spawn_seeds(first, 1)[0])
    if resume.n_rows != n_rows:
        expected = f"a state of training on {n_rows} rows"
        raise ValueError(violation("resume", expected, f"one on {resume.n_rows}"))
    return resume


def _share_of_rate(trace: TrainingTrace, options: TrainingOptions) -> float:
    """What is left of the learning rate in the next epoch."""
    if options.schedule == "linear":
        done = (len(trace.validation) + 0.5) / options.max_epochs  # in the middle of it
        return min(done / _RISING, (1 - done) / (1 - _RISING))
    return options.cooling ** _waiting(trace, options)[1]


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
