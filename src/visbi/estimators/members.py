"""Training the members of an ensemble: in one pass where that can be, over workers where that is asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from visbi.core.parallel import check_workers, in_parallel, n_workers, one_thread
from visbi.core.progress import Progress
from visbi.estimators.likelihood import NeuralLikelihood
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.estimators.ratio import NeuralRatio
from visbi.estimators.side_by_side import side_by_side
from visbi.estimators.training import Loss, Trainee, train_together
from visbi.estimators.training_state import TrainingOptions, TrainingState

__all__ = ["Recipe", "for_likelihoods", "one_by_one", "train_members"]

M = TypeVar("M", NeuralLikelihood, NeuralRatio)

_FIXED = (nn.Identity, PriorCoordinates)  # embeddings of theta that nothing trains, and nothing varies


@dataclass(frozen=True)
class Recipe(Generic[M]):
    """How networks of one architecture are trained.

    Attributes:
        data: a network, theta (N, D) and x (N, ...) -> tensors of N rows that its loss takes.
        together: K networks -> a module and its loss, as `training.train_together` wants them.
        in_one_pass: whether K may be more than 1.
    """

    data: Callable[[M, Tensor, Tensor], tuple[Tensor, ...]]
    together: Callable[[Sequence[M]], tuple[nn.Module, Loss]]
    in_one_pass: bool


def one_by_one(loss: Callable[[M], Loss]) -> Recipe[M]:
    """Of any network; `loss` takes one, and gives a function of standardised theta and x (B, ...) -> (B,)."""

    def together(networks: Sequence[M]) -> tuple[nn.Module, Loss]:
        (network,) = networks
        of_batch = loss(network)
        return network, lambda z_theta, z_x: of_batch(z_theta[0], z_x[0])[None]

    return Recipe(_standardised, together, in_one_pass=False)


def for_likelihoods(network: NeuralLikelihood) -> Recipe[NeuralLikelihood]:
    """Of likelihoods like this one, by maximum likelihood.

    Who knows what a user's embedding net does with a further axis: with one they are trained one by one.
    """
    if not isinstance(network.theta_embedding, _FIXED):
        return one_by_one(_negative_log_prob)
    return Recipe(_condition_and_x, _flows_together, in_one_pass=True)


def train_members(
    networks: Sequence[M],
    recipe: Recipe[M],
    theta: Tensor,
    x: Tensor,
    options: TrainingOptions,
    *,
    weights: Tensor | None,
    seeds: Sequence[int],
    resume: Sequence[TrainingState] | None,
    workers: int | None,
    show_progress_bar: bool,
) -> tuple[TrainingState, ...]:
    """Train every network in place; arguments are as for `fit_likelihood`."""
    here = check_workers(workers) == 1 or len(networks) == 1  # one alone needs no other process
    n_groups = (1 if here else n_workers(workers)) if recipe.in_one_pass else len(networks)
    groups = [list(range(len(networks)))[k::n_groups] for k in range(min(n_groups, len(networks)))]
    tasks = (
        (
            group,
            [networks[k] for k in group],
            recipe,
            theta,
            x,
            options,
            weights,
            [seeds[k] for k in group],
            None if resume is None else [resume[k] for k in group],
            _title(group, len(networks)) if here and show_progress_bar else None,
        )
        for group in groups
    )
    found: dict[int, TrainingState] = {}
    bar = Progress(show_progress_bar and not here, total=len(networks), desc="Training networks")
    with bar:
        for group, trained, states in in_parallel(
            _train_group if here else _train_in_one_thread, tasks, 1 if here else workers
        ):
            for k, network, state in zip(group, trained, states, strict=True):
                if network is not networks[k]:  # a copy, from another process
                    networks[k].load_state_dict(network.state_dict())
                    networks[k].eval()
                found[k] = state
                bar.update()
    return tuple(found[k] for k in range(len(networks)))


def _train_group(
    numbers: Sequence[int],
    networks: Sequence[M],
    recipe: Recipe[M],
    theta: Tensor,
    x: Tensor,
    options: TrainingOptions,
    weights: Tensor | None,
    seeds: Sequence[int],
    resume: Sequence[TrainingState] | None,
    title: str | None,
) -> tuple[Sequence[int], Sequence[M], list[TrainingState]]:
    """Networks of these numbers, trained in one pass, and the states of that; `title` of a progress bar."""
    weights = None if weights is None else weights.to(theta.dtype)
    with torch.no_grad():
        data = [recipe.data(network, theta, x) for network in networks]
    trainees = [
        Trainee(network, rows, options, weights, seed, None if resume is None else resume[k])
        for k, (network, rows, seed) in enumerate(zip(networks, data, seeds, strict=True))
    ]
    train_together(
        trainees,
        lambda left: recipe.together([networks[k] for k in left]),
        show_progress_bar=title is not None,
        description=title or "",
    )
    return numbers, networks, [trainee.state() for trainee in trainees]


def _train_in_one_thread(*task: Any) -> tuple[Sequence[int], Sequence[Any], list[TrainingState]]:
    with one_thread():
        return _train_group(*task)


def _title(group: Sequence[int], n: int) -> str:
    if len(group) == n > 1:
        return f"Training {n} networks"
    return f"Training network {group[0] + 1} of {n}"


def _standardised(network: Any, theta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return network.standardised(theta, x)


def _negative_log_prob(network: NeuralLikelihood) -> Loss:
    return lambda z_theta, z_x: -network.standardised_log_prob(z_theta, z_x)


def _condition_and_x(network: NeuralLikelihood, theta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    z_theta, z_x = network.standardised(theta, x)
    return network.theta_embedding(z_theta), z_x.flatten(1)


def _flows_together(networks: Sequence[NeuralLikelihood]) -> tuple[nn.Module, Loss]:
    flow = side_by_side([network.flow for network in networks])
    log_abs_det = torch.stack([network.standardise_x.log_abs_det for network in networks])

    def negative_log_prob(condition: Tensor, z_x: Tensor) -> Tensor:
        return -(flow.log_prob(z_x, condition) + log_abs_det[:, None])

    return nn.ModuleDict({"flow": flow}), negative_log_prob  # named as in each
