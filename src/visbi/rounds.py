r"""From a simulator to a certified posterior: sequential neural likelihood with variational inference.

1. The first runs are at draws of the prior. With a wide prior most of them look nothing like the data, and a
   likelihood learnt from them has maxima where it was never tried. So they are only used to find where to
   look: the thetas of the runs nearest to x_o are the first guess (preconditioning: Wang, Kelly, Warne,
   Drovandi 2024).
2. In every further round thetas are drawn around the present guess, half of them as it is, half spread about
   its mean by `_WIDEN`; the likelihood is learnt from all runs so far inside a fence around the new thetas;
   and q is fitted to the posterior that follows, kept inside the same fence.

A likelihood learnt by maximum likelihood does not depend on the distribution of the thetas (Papamakarios,
Sterratt, Murray 2019), so leaving runs out by their theta alone changes nothing inside the fence; a network
of finite size gains by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import finite_tensor, positive_int, violation
from visbi.core.random import fresh_seed, seeded, spawn_seeds
from visbi.core.types import Seed
from visbi.estimators import TrainedLikelihood, TrainingOptions, fit_likelihood
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.posterior import VIPosterior
from visbi.potentials import LikelihoodPotential
from visbi.potentials.fence import Fence, FencedPotential
from visbi.priors import as_prior, coordinates
from visbi.priors.transforms import Coordinates
from visbi.simulators import Simulations, simulate

__all__ = ["Inference", "Round", "infer"]

_WIDEN = 1.7
_NEAREST = 0.02  # share of the prior's runs that are the first guess,
_MIN_NEAREST = 100  # and how many at least
_FAR = 5.0  # deviations beyond which one entry of x is no farther than another
_MIN_KEPT = 50
_FIT_DEFAULTS: dict[str, Any] = {"init": "explore", "max_num_iters": 500, "quality_control": False}


@dataclass(frozen=True)
class Round:
    """One round of `infer` after the prior's.

    Attributes:
        simulations: what was simulated in it.
        n_used: runs, of this round and earlier ones, that the likelihood was learnt from.
        likelihood: the learnt likelihood and its traces.
        posterior: q fitted to it.
        beyond_fence: share of q's draws outside the region that was simulated; above a few percent, simulate
            more.
    """

    simulations: Simulations
    n_used: int
    likelihood: TrainedLikelihood
    posterior: VIPosterior
    beyond_fence: float


@dataclass(frozen=True)
class Inference:
    """What `infer` returns.

    Attributes:
        posterior: the last round's.
        prior_simulations: the runs at draws of the prior.
        rounds: the rounds after it.
    """

    posterior: VIPosterior
    prior_simulations: Simulations
    rounds: tuple[Round, ...]

    @property
    def n_simulations(self) -> int:
        """Runs of the simulator, failed ones included."""
        runs = [self.prior_simulations, *(r.simulations for r in self.rounds)]
        return sum(len(s) + s.n_failed for s in runs)


def infer(
    simulator: Callable[..., Any],
    prior: Distribution,
    x_o: Tensor,
    *,
    simulations: Sequence[int] = (6000, 2000, 2000, 2500, 3500),
    q: str = "maf",
    usable: Callable[[Tensor], Tensor] | None = None,
    num_transforms: int = 3,
    hidden_features: int = 64,
    options: TrainingOptions | None = None,
    train: dict[str, Any] | None = None,
    workers: int | None = 1,
    seed: Seed = None,
    show_progress_bar: bool = True,
    on_round: Callable[[Round], None] | None = None,
) -> Inference:
    """Infer theta from one observation of a simulator.

    Args:
        simulator: theta -> x, single or batched, NumPy or torch; see `visbi.simulators.simulate`. Runs that
            fail are left out, so the likelihood is that of runs that succeed.
        prior: over theta, event_shape (D,).
        x_o: the observation, of the shape of one x.
        simulations: runs at draws of the prior, then runs in each round; at least two numbers.
        q: the family of the posterior.
        usable: x (N, ...) -> (N,) bool: runs the likelihood is learnt from. Leave out only what is so far
            from x_o that no theta of interest produces it; None keeps all.
        num_transforms, hidden_features: of the likelihood's flow.
        options: of the likelihood's training.
        train: keywords for `VIPosterior.train`.
        workers: processes that simulate.
        seed: makes everything repeatable and leaves torch's global generator alone.
        show_progress_bar: show them.
        on_round: called with each finished round.

    Raises:
        ValueError: x_o not finite or of another shape than x, fewer than two numbers of simulations, too few
            usable runs, or a `usable` that does not return one bool for each.

    >>> from visbi.simulators.zoo import linear_gaussian
    >>> task = linear_gaussian.task()
    >>> result = infer(task.simulator, task.prior, task.x_o, simulations=(500, 300), q="gaussian",
    ...     options=TrainingOptions(max_epochs=5), train={"max_num_iters": 20},
    ...     seed=0, show_progress_bar=False)
    >>> result.posterior.sample((5,)).shape, result.n_simulations
    (torch.Size([5, 2]), 800)
    """
    prior = as_prior(prior)
    counts = [positive_int("simulations", n) for n in simulations]
    if len(counts) < 2:
        raise ValueError(violation("simulations", "a number for the prior and one for each round", counts))
    x_o = finite_tensor("x_o", x_o)
    coords = coordinates(prior)
    learning = options or TrainingOptions(max_epochs=300)
    seeds = spawn_seeds(fresh_seed() if seed is None else int(seed), 1 + 3 * (len(counts) - 1))

    run = partial(simulate, simulator, workers=workers, show_progress_bar=show_progress_bar)

    first = run(prior, counts[0], seed=seeds[0])
    x_o = _one_observation(x_o, first.x)
    guess = coords.to_z(_nearest(first, x_o))[0]
    rounds: list[Round] = []
    for number, n in enumerate(counts[1:]):
        run_seed, learn_seed, fit_seed = seeds[3 * number + 1 : 3 * number + 4]
        with seeded(run_seed):
            theta = _around(guess, coords, n)
        new = run(theta, n, seed=run_seed)
        fence = Fence(coords, new.theta)
        theta, x = _learning_set([first, *(r.simulations for r in rounds), new], fence, usable)
        learnt = fit_likelihood(
            theta,
            x,
            num_transforms=num_transforms,
            hidden_features=hidden_features,
            z_score_theta="none",
            theta_embedding_net=PriorCoordinates(coords),
            options=learning,
            seed=learn_seed,
            show_progress_bar=show_progress_bar,
        )
        given = {"seed": fit_seed, "show_progress_bar": show_progress_bar, **(train or {})}
        posterior = _fit(
            LikelihoodPotential(learnt.estimator, prior), fence, x_o, q, {**_FIT_DEFAULTS, **given}
        )
        with seeded(fit_seed):
            draws = posterior.sample((4 * n,))
            _ = posterior.report  # made on first use: here, under the seed
        beyond = 1.0 - float(fence.inside(draws).double().mean())
        rounds.append(Round(new, len(theta), learnt, posterior, beyond))
        guess = coords.to_z(draws)[0]
        if on_round is not None:
            on_round(rounds[-1])
    return Inference(rounds[-1].posterior, first, tuple(rounds))


def _fit(
    potential: LikelihoodPotential, fence: Fence, x_o: Tensor, q: str, keywords: dict[str, Any]
) -> VIPosterior:
    """q fitted inside the fence; everything later, the certificate too, sees the potential without it."""
    posterior = VIPosterior(FencedPotential(potential, fence), potential.prior, q=q).train(x_o, **keywords)
    posterior.potential_fn = potential
    return posterior


def _nearest(runs: Simulations, x_o: Tensor) -> Tensor:
    """Thetas of the runs nearest to x_o: the distance in robust deviations, averaged over x's entries."""
    x = runs.x.flatten(1).double()
    deviation = (x - x.median(0).values).abs().median(0).values.clamp_min(1e-12)
    distance = ((x - x_o.flatten(1)).abs() / deviation).clamp_max(_FAR).mean(1)
    n = min(max(_MIN_NEAREST, int(_NEAREST * len(x))), len(x))
    return runs.theta[distance.topk(n, largest=False).indices]


def _around(guess: Tensor, coords: Coordinates, n: int) -> Tensor:
    """n thetas around draws (M, d) of the present guess; where M < n, around those of a Gaussian like it."""
    centre = guess.mean(0)
    if len(guess) >= n:
        z = guess[torch.randperm(len(guess))[:n]]
    else:
        cov = torch.cov(guess.mT).reshape(guess.shape[1], guess.shape[1])
        ridge = 1e-9 * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
        tril = torch.linalg.cholesky(cov + ridge)
        z = centre + torch.randn(n, guess.shape[1], dtype=guess.dtype) @ tril.mT
    factor = torch.ones(n, 1, dtype=z.dtype)
    factor[n // 2 :] = _WIDEN
    return coords.to_theta(centre + factor * (z - centre))[0]


def _learning_set(
    runs: Sequence[Simulations], fence: Fence, usable: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    theta, x = torch.cat([s.theta for s in runs]), torch.cat([s.x for s in runs])
    keep = fence.inside(theta)
    if int(keep.sum()) < _MIN_KEPT:
        expected = f"at least {_MIN_KEPT} successful runs inside the region of a round"
        raise ValueError(violation("simulations", expected, int(keep.sum())))
    if usable is not None:
        keep = keep & _checked_usable(usable, x)
        if int(keep.sum()) < _MIN_KEPT:
            raise ValueError(violation("usable", f"to keep at least {_MIN_KEPT} runs", int(keep.sum())))
    return theta[keep], x[keep]


def _checked_usable(usable: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    which = usable(x)
    if not isinstance(which, Tensor) or which.dtype != torch.bool or which.shape != x.shape[:1]:
        got = f"{which.dtype} {tuple(which.shape)}" if isinstance(which, Tensor) else type(which).__name__
        raise ValueError(violation("usable", f"to return a bool tensor of shape ({len(x)},)", got))
    return which


def _one_observation(x_o: Tensor, x: Tensor) -> Tensor:
    """x_o as (1, ...), of the shape of the simulations."""
    if x_o.shape == x.shape[1:]:
        return x_o[None].to(x.dtype)
    if x_o.shape == (1, *x.shape[1:]):
        return x_o.to(x.dtype)
    raise ValueError(violation("x_o", f"the shape of one x, {tuple(x.shape[1:])}", tuple(x_o.shape)))
