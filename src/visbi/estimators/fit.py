r"""Estimators from simulations: `fit_likelihood` and `fit_ratio`, of the same shape.

Both check the simulations, build `ensemble` networks that differ by their seed, train these (`members`), and
return them with the states of their training.

`warm_start` begins from copies of an earlier estimator's networks, their standardisation included, and
trains them on the simulations given now: given those of all rounds so far, this is one round of a
sequential fit. `resume` goes on with an earlier fit on the same simulations, optimiser and all, as if it
had not stopped.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from torch import Tensor, nn

from visbi.core.checks import finite_tensor, positive_int, violation
from visbi.core.random import fresh_seed, seeded, spawn_seeds
from visbi.core.types import Seed, ZScore
from visbi.estimators.continuity import check_continuous
from visbi.estimators.ensemble import LikelihoodEnsemble, RatioEnsemble
from visbi.estimators.likelihood import LikelihoodConfig, NeuralLikelihood
from visbi.estimators.members import for_likelihoods, one_by_one, train_members
from visbi.estimators.ratio import NeuralRatio, RatioConfig
from visbi.estimators.ratio_losses import contrasts, ratio_loss
from visbi.estimators.rows import simulations
from visbi.estimators.training_state import TrainingOptions, TrainingState, TrainingTrace

__all__ = ["TrainedLikelihood", "TrainedRatio", "fit_likelihood", "fit_ratio"]

_DEFAULT_OPTIONS = TrainingOptions()

E = TypeVar("E", LikelihoodEnsemble, RatioEnsemble)
M = TypeVar("M", NeuralLikelihood, NeuralRatio)


@dataclass(frozen=True, eq=False)
class _Trained(Generic[E]):
    """An estimator and how it came about.

    Attributes:
        estimator: the trained networks.
        states: the state of training of each, for `resume`.
    """

    estimator: E
    states: tuple[TrainingState, ...]

    @property
    def traces(self) -> tuple[TrainingTrace, ...]:
        """Losses of each network, and why its training stopped."""
        return tuple(state.trace for state in self.states)


class TrainedLikelihood(_Trained[LikelihoodEnsemble]):
    """What `fit_likelihood` returns: `estimator`, `states`, `traces`."""


class TrainedRatio(_Trained[RatioEnsemble]):
    """What `fit_ratio` returns: `estimator`, `states`, `traces`."""


def fit_likelihood(
    theta: Tensor,
    x: Tensor,
    *,
    flow: str = "maf",
    num_transforms: int = 5,
    hidden_features: int = 50,
    z_score_theta: ZScore = "independent",
    z_score_x: ZScore = "independent",
    theta_embedding_net: nn.Module | None = None,
    embedding_net: None = None,
    ensemble: int = 1,
    weights: Tensor | None = None,
    options: TrainingOptions = _DEFAULT_OPTIONS,
    warm_start: LikelihoodEnsemble | None = None,
    resume: TrainedLikelihood | None = None,
    workers: int | None = 1,
    seed: Seed = None,
    show_progress_bar: bool = True,
) -> TrainedLikelihood:
    """Learn p(x | theta) for continuous x (Papamakarios, Sterratt, Murray 2019).

    Args:
        theta: parameters of the simulations, (N, D).
        x: their outputs, (N, ...).
        flow: "maf" (quick) or "nsf" (splines: for x of few dimensions with skew, several modes or sharp
            edges; the one to take if x is a single number).
        num_transforms, hidden_features: layers of the flow, and the width of its networks.
        z_score_theta, z_score_x: "none", "independent" or "structured" standardisation.
        theta_embedding_net: applied to standardised theta before the flow sees it; copied, not changed.
        embedding_net: there to say that x cannot have one here.
        ensemble: networks that are averaged.
        weights: non-negative, (N,): shares of the simulations in the loss.
        options: of training.
        warm_start: an earlier estimator of the same architecture, copied.
        resume: an earlier result on the same simulations.
        workers: processes that train the networks of an ensemble, one thread each; Ctrl-C keeps nothing
            of what other processes do. One process trains them in one pass; how many share a pass shows in
            rounding.
        seed: makes the result repeatable and leaves torch's global generator alone.
        show_progress_bar: show one.

    Returns:
        The estimator, on theta's device, and the states of training.

    Raises:
        ValueError: shapes, lengths, NaN or Inf; discrete x; an unknown flow; a start that does not match.
        RuntimeError: training that meets nothing but NaN.

    >>> import torch
    >>> theta = torch.randn(200, 1)
    >>> x = theta + torch.randn(200, 2)
    >>> trained = fit_likelihood(
    ...     theta, x, options=TrainingOptions(max_epochs=2), seed=0, show_progress_bar=False
    ... )
    >>> trained.estimator.log_prob(x[:3], theta[:3]).shape, len(trained.traces[0].validation)
    (torch.Size([3]), 2)
    """
    if embedding_net is not None:
        got = type(embedding_net).__name__
        advice = "Summarise x before fitting, embed theta by theta_embedding_net, or use fit_ratio."
        expected = "None, since the flow must stay invertible in x"
        raise ValueError(f"{violation('embedding_net', expected, got)}. {advice}")
    config = LikelihoodConfig(
        flow=flow,
        num_transforms=num_transforms,
        hidden_features=hidden_features,
        z_score_theta=z_score_theta,
        z_score_x=z_score_x,
    )
    theta, x = simulations(theta, x)
    check_continuous(x.flatten(1))

    def build() -> NeuralLikelihood:
        net = copy.deepcopy(theta_embedding_net)
        return NeuralLikelihood(theta.shape[1], x.shape[1:], config, net).to(theta.device)

    seeds = _seeds(seed, ensemble)
    networks = _networks(build, config, theta, x, seeds, _earlier(warm_start, resume))
    states = train_members(
        networks,
        for_likelihoods(networks[0]),
        theta,
        x,
        options,
        weights=None if weights is None else _weights(weights, theta),
        seeds=seeds,
        resume=None if resume is None else resume.states,
        workers=workers,
        show_progress_bar=show_progress_bar,
    )
    return TrainedLikelihood(LikelihoodEnsemble(networks), states)


def fit_ratio(
    theta: Tensor,
    x: Tensor,
    *,
    loss: str = "contrastive",
    num_atoms: int = 10,
    num_blocks: int = 2,
    hidden_features: int = 50,
    z_score_theta: ZScore = "independent",
    z_score_x: ZScore = "independent",
    embedding_net: nn.Module | None = None,
    ensemble: int = 1,
    options: TrainingOptions = _DEFAULT_OPTIONS,
    warm_start: RatioEnsemble | None = None,
    resume: TrainedRatio | None = None,
    workers: int | None = 1,
    seed: Seed = None,
    show_progress_bar: bool = True,
) -> TrainedRatio:
    """Learn log p(x | theta) / p(x) for any x (Hermans et al. 2020; Durkan et al. 2020; Miller et al. 2022).

    Args:
        theta: parameters of the simulations, (N, D).
        x: their outputs, (N, ...), continuous or discrete.
        loss: "binary", "contrastive" (sharper; the ratio up to a factor that depends on x alone) or
            "contrastive_normalised" (the ratio itself).
        num_atoms: thetas that compete for each x; not used by "binary".
        num_blocks, hidden_features: residual blocks of the classifier, and their width.
        z_score_theta, z_score_x: "none", "independent" or "structured" standardisation.
        embedding_net: applied to standardised x (N, ...), gives (N, features); copied, then trained.
        ensemble: networks that are averaged.
        options: of training.
        warm_start: an earlier estimator of the same architecture, copied.
        resume: an earlier result on the same simulations.
        workers: processes that train the networks of an ensemble, one thread each; Ctrl-C keeps nothing
            of what other processes do.
        seed: makes the result repeatable and leaves torch's global generator alone.
        show_progress_bar: show one.

    Returns:
        The estimator, on theta's device, and the states of training.

    Raises:
        ValueError: shapes, lengths, NaN or Inf; fewer rows than atoms; an unknown loss; a start that does
            not match.
        RuntimeError: training that meets nothing but NaN.

    >>> import torch
    >>> theta = torch.randn(200, 1)
    >>> counts = torch.poisson(theta.exp())
    >>> short = TrainingOptions(max_epochs=2)
    >>> trained = fit_ratio(theta, counts, options=short, seed=0, show_progress_bar=False)
    >>> trained.estimator.log_ratio(theta[:3], counts[:3]).shape
    torch.Size([3])
    """
    config = RatioConfig(
        num_blocks=num_blocks,
        hidden_features=hidden_features,
        z_score_theta=z_score_theta,
        z_score_x=z_score_x,
    )
    of_logits, n_logits = ratio_loss(loss, num_atoms)
    theta, x = simulations(theta, x)
    _enough_rows(theta.shape[0], n_logits, options)

    def build() -> NeuralRatio:
        return NeuralRatio(theta.shape[1], x.shape[1:], config, copy.deepcopy(embedding_net)).to(theta.device)

    def classification(ratio: NeuralRatio) -> Callable[[Tensor, Tensor], Tensor]:
        def of_batch(z_theta: Tensor, z_x: Tensor) -> Tensor:
            return of_logits(ratio.classifier(contrasts(z_theta, n_logits), ratio.embed(z_x)[:, None]))

        return of_batch

    seeds = _seeds(seed, ensemble)
    networks = _networks(build, config, theta, x, seeds, _earlier(warm_start, resume))
    states = train_members(
        networks,
        one_by_one(classification),
        theta,
        x,
        options,
        weights=None,
        seeds=seeds,
        resume=None if resume is None else resume.states,
        workers=workers,
        show_progress_bar=show_progress_bar,
    )
    return TrainedRatio(RatioEnsemble(networks), states)


def _seeds(seed: Seed, ensemble: int) -> list[int]:
    return spawn_seeds(fresh_seed() if seed is None else int(seed), positive_int("ensemble", ensemble))


def _earlier(warm_start: E | None, resume: _Trained[E] | None) -> E | None:
    if warm_start is not None and resume is not None:
        raise ValueError(violation("warm_start` and `resume", "one of them at most", "both"))
    return warm_start if resume is None else resume.estimator


def _networks(
    build: Callable[[], M],
    config: LikelihoodConfig | RatioConfig,
    theta: Tensor,
    x: Tensor,
    seeds: Sequence[int],
    earlier: LikelihoodEnsemble | RatioEnsemble | None,
) -> list[M]:
    """New networks, standardised by the data, or copies of the earlier ones."""
    if earlier is None:
        networks = []
        for seed in seeds:
            with seeded(seed):
                networks.append(build().fit_standardisation(theta, x))
        return networks
    asked = (len(seeds), theta.shape[1], tuple(x.shape[1:]), config)
    got = (len(earlier), earlier.theta_features, tuple(earlier.x_shape), earlier.members[0].config)
    for name, ours, theirs in zip(("ensemble", "D", "the shape of x", "config"), asked, got, strict=True):
        if ours != theirs:
            expected = f"an estimator of the architecture asked for, with {name} = {ours}"
            raise ValueError(violation("warm_start` or `resume", expected, f"{name} = {theirs}"))
    return [copy.deepcopy(member).to(theta.device) for member in cast(Sequence[M], earlier.members)]


def _weights(weights: Tensor, theta: Tensor) -> Tensor:
    weights = finite_tensor("weights", weights).to(theta.device)
    if weights.shape != theta.shape[:1]:
        raise ValueError(violation("weights", f"shape ({theta.shape[0]},)", tuple(weights.shape)))
    if bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise ValueError(violation("weights", "non-negative numbers, not all 0", "others"))
    return weights


def _enough_rows(n_rows: int, needed: int, options: TrainingOptions) -> None:
    """Every batch must hold as many thetas as compete for an x."""
    n_held_out = max(1, round(options.validation_fraction * n_rows))
    n_steps = -(-(n_rows - n_held_out) // options.batch_size)
    smallest = min(n_held_out, (n_rows - n_held_out) // max(1, n_steps))
    if smallest < needed:
        expected = f"batches and held-out rows of at least {needed} simulations each"
        raise ValueError(violation("num_atoms", expected, f"{smallest} (of {n_rows} simulations)"))
