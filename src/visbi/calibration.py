r"""Is a posterior calibrated over many observations? All diagnostics at once, of anything that draws at many
x.

theta and x are fresh pairs of prior and simulator, not those that anything was trained on. What is drawn at
each x goes through simulation-based calibration, expected coverage and TARP (`visbi.certificate.sbc`,
`.coverage`, `.tarp`); with the observation x_o itself also through the local classifier test there
(`.local`), x_o is compared with the simulations, and, given the simulator, with predictions of the posterior
(`.predictive`).

Together the tests of q call a right one wrong with probability alpha at most: each is held to its share of it
(Bonferroni).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from visbi.certificate import (
    SBC,
    TARP,
    Coverage,
    LocalC2ST,
    PredictiveCheck,
    expected_coverage,
    local_c2st,
    predictive_check,
    prior_predictive_check,
    sbc,
    tarp,
)
from visbi.certificate.local import N_NULL
from visbi.certificate.ranks import ALPHA
from visbi.core.checks import finite_tensor, in_interval, positive_int, same_length, violation
from visbi.core.random import fresh_seed, seeded, spawn_seeds
from visbi.core.types import Seed
from visbi.many import Posteriors
from visbi.posterior import VIPosterior
from visbi.refitting import RefittingPosterior
from visbi.simulators import simulate
from visbi.simulators.calling import Simulator

__all__ = ["Calibration", "calibrate"]

LogDensityAt = Callable[[Tensor, Tensor], Tensor]

_N_DRAWS = 200
_N_AT_X_O = 1000
_PAIRS = 16_384  # of theta and x, evaluated at once


@dataclass(frozen=True, eq=False)
class Calibration:
    """What all diagnostics say; `print` it.

    Attributes:
        sbc, coverage, tarp: over all observations.
        x: the simulations.
        local: at x_o, or None without one.
        prior: whether x_o is foreign to the simulations, or None without x_o.
        predictive: whether x_o is like predictions of the posterior, or None without x_o or a simulator.
        x_o: the observation, or None.
        predictions: (M, ...) simulations at draws of q(theta | x_o), or None.
    """

    sbc: SBC
    coverage: Coverage
    tarp: TARP
    x: Tensor
    local: LocalC2ST | None = None
    prior: PredictiveCheck | None = None
    predictive: PredictiveCheck | None = None
    x_o: Tensor | None = None
    predictions: Tensor | None = None

    @property
    def verdict(self) -> str:
        """Of q: the first complaint of ranks, coverage, TARP and the local test, or "calibrated"."""
        said = [each.verdict for each in (self.sbc, self.coverage, self.tarp, self.local) if each is not None]
        return next((verdict for verdict in said if verdict != "calibrated"), "calibrated")

    def __str__(self) -> str:
        lines = {
            "ranks": self.sbc,
            "coverage": self.coverage,
            "TARP": self.tarp,
            "local test": self.local,
            "x_o among simulations": self.prior,
            "x_o among predictions": self.predictive,
        }
        return "\n".join([self.verdict, *(f"  {k}: {v}" for k, v in lines.items() if v is not None)])


def calibrate(
    posterior: Any,
    theta: Tensor,
    x: Tensor,
    *,
    n_draws: int = _N_DRAWS,
    correct: bool | None = None,
    log_density: LogDensityAt | None = None,
    x_o: Tensor | None = None,
    draws_o: Tensor | None = None,
    simulator: Simulator | None = None,
    classifier: Any = "network",
    names: Sequence[str] | None = None,
    alpha: float = ALPHA,
    seed: Seed = None,
) -> Calibration:
    """All diagnostics of a posterior, from fresh simulations.

    Args:
        posterior: what draws at many observations: an amortised `VIPosterior`, a `RefittingPosterior`,
            `Posteriors` of `fit_many(potential, prior, x)`, another package's with `sample_batched(shape,
            x)`; or draws (n_draws, n_obs, D) themselves.
        theta, x: pairs of prior and simulator, (n_obs, D) and (n_obs, ...), n_obs >= 20 (100 with `x_o`).
        n_draws: for each observation.
        correct: whether draws are corrected by importance weights; None: as the posterior does by itself.
        log_density: what depends on the data, for ranks of it too: theta (N, D), x (N, ...) -> (N,), such as
            a log-likelihood or an unnormalised posterior.
        x_o: the observation, of the shape of one x, or with a leading axis of one.
        draws_o: draws of q(theta | x_o), (M, D); None asks the posterior for them.
        simulator: for predictions at x_o: what `visbi.simulate` takes.
        classifier: of the local test; see `visbi.certificate.local_c2st`.
        names: of the D parameters.
        alpha: chance that a right q is called wrong by any of the tests; that a false alarm comes from the
            check of x_o among simulations, and from that among predictions.
        seed: repeats all of it and leaves torch's global generator alone.

    Raises:
        TypeError: `posterior` cannot draw at many observations, or not corrected.
        ValueError: shapes that do not fit, too few observations or draws, numbers not finite, `draws_o`
            missing.

    >>> from visbi.simulators.zoo import linear_gaussian
    >>> task = linear_gaussian.task()
    >>> with seeded(0):
    ...     theta = task.prior.sample((300,))
    ...     x = task.simulator(theta)
    ...     draws = task.posterior(x).sample((100,))
    >>> print(calibrate(draws, theta, x, seed=1))
    calibrated
      ranks: calibrated: ranks of theta_1, theta_2 are uniform over 300 observations (p = 1)
      coverage: calibrated: 90 % intervals of theta_1 hold 91 % of 300 truths (p = 1)
      TARP: calibrated: balls around random points hold the truths they should (area to curve -0.004, p = 0.8)
    """
    theta = finite_tensor("theta", theta)
    x = torch.as_tensor(x) if isinstance(posterior, Posteriors) else finite_tensor("x", x)
    if theta.ndim != 2:
        raise ValueError(violation("theta", "shape (n_obs, D)", tuple(theta.shape)))
    same_length("theta", theta, "x", x)
    seeds = spawn_seeds(fresh_seed() if seed is None else int(seed), 5)
    share = in_interval("alpha", alpha, 0, 1) / (3 if x_o is None else 4)
    source = _source(posterior, correct)
    with seeded(seeds[0]):
        draws = source.draws(positive_int("n_draws", n_draws), x).detach()
        if draws.shape[1:] != theta.shape:
            raise ValueError(
                violation("draws", f"shape (n_draws, *{tuple(theta.shape)})", tuple(draws.shape))
            )
        log_q = source.log_q(torch.cat([theta[None].to(draws), draws]), x)
    theta, x, draws, log_q = _with_a_fit(theta, x, draws, log_q, posterior)
    densities = None if log_density is None else {"log-density": _at_all(log_density, theta, x, draws)}
    pair = None if log_q is None else (log_q[0], log_q[1:])
    found = Calibration(
        sbc=sbc(theta, draws, log_densities=densities, names=names, alpha=share, seed=seeds[4]),
        coverage=expected_coverage(theta, draws, pair, names=names, alpha=share, seed=seeds[4]),
        tarp=tarp(theta, draws, names=names, alpha=share, seed=seeds[4]),
        x=x,
    )
    if x_o is None:
        return found
    x_o = finite_tensor("x_o", x_o)
    x_o = x_o[0] if x_o.shape == (1, *x.shape[1:]) else x_o
    prior = prior_predictive_check(x_o, x, alpha=alpha)
    if draws_o is None:
        with seeded(seeds[1]):
            draws_o = source.at(x_o, _N_AT_X_O).detach()
    local = local_c2st(
        theta,
        x,
        draws[0],
        x_o,
        draws_o,
        classifier=classifier,
        n_null=max(N_NULL, int(1 / share) + 1),
        names=names,
        alpha=share,
        seed=seeds[2],
    )
    found = replace(found, x_o=x_o, prior=prior, local=local)
    return found if simulator is None else _with_predictions(found, simulator, draws_o, alpha, seeds[3])


def _with_predictions(
    found: Calibration, simulator: Simulator, draws_o: Tensor, alpha: float, seed: int
) -> Calibration:
    assert found.x_o is not None
    x = simulate(simulator, draws_o, len(draws_o), seed=seed, show_progress_bar=False).x
    return replace(found, predictions=x, predictive=predictive_check(found.x_o, x, alpha=alpha))


def _with_a_fit(
    theta: Tensor, x: Tensor, draws: Tensor, log_q: Tensor | None, posterior: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Without the observations for which `fit_many` has no fit; their draws are NaN."""
    if not isinstance(posterior, Posteriors):
        return theta, x, draws, log_q
    fitted = draws.isfinite().all(-1).all(0)
    if not bool(fitted.all()):
        lost = int((~fitted).sum())
        warnings.warn(f"{lost} of {len(x)} observations have no fit and are left out.", stacklevel=3)
    return theta[fitted], x[fitted], draws[:, fitted], None if log_q is None else log_q[:, fitted]


def _at_all(density: LogDensityAt, theta: Tensor, x: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A density of pairs at the truths, (n_obs,), and at the draws, (n_draws, n_obs)."""
    values = _of_pairs(density, torch.cat([theta[None].to(draws), draws]), x)
    return values[0], values[1:]


def _of_pairs(density: LogDensityAt, theta: Tensor, x: Tensor) -> Tensor:
    """(K, n_obs) of theta (K, n_obs, D), each beside its own x (n_obs, ...), some pairs at a time."""
    flat = theta.flatten(0, 1)
    found = []
    with torch.no_grad():
        for index in torch.arange(len(flat)).split(_PAIRS):
            values = torch.as_tensor(density(flat[index], x[index % len(x)]))
            if values.shape != index.shape:
                expected = f"one number for each of {len(index)} pairs"
                raise ValueError(violation("log_density", expected, f"shape {tuple(values.shape)}"))
            found.append(values.double())
    return torch.cat(found).view(theta.shape[:2])


# -- the door: what draws at many observations ------------------------------------------------------------


class _Source(Protocol):
    """Draws (n, n_obs, D) at all x, densities (K, n_obs) of theta (K, n_obs, D), draws (n, D) at one x."""

    def draws(self, n: int, x: Tensor) -> Tensor: ...

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor | None: ...

    def at(self, x_o: Tensor, n: int) -> Tensor: ...


def _source(posterior: Any, correct: bool | None) -> _Source:
    if isinstance(posterior, VIPosterior):
        return _Amortised(posterior, bool(correct))
    if isinstance(posterior, RefittingPosterior):
        return _Refitting(posterior, correct)
    if isinstance(posterior, Posteriors):
        return _Many(posterior, correct)
    if correct is not None:
        raise TypeError(violation("correct", "None for draws, and for posteriors of others", correct))
    if isinstance(posterior, Tensor):
        return _Given(posterior)
    if callable(getattr(posterior, "sample_batched", None)):
        return _Batched(posterior)
    rule = "something with `sample_batched(shape, x)`, Posteriors of fit_many, or draws (n_draws, n_obs, D)"
    raise TypeError(violation("posterior", rule, type(posterior).__name__))


def _missing() -> ValueError:
    return ValueError(violation("draws_o", "draws at x_o, which these posteriors cannot make", None))


@dataclass(frozen=True)
class _Given:
    values: Tensor

    def draws(self, n: int, x: Tensor) -> Tensor:
        return self.values

    def log_q(self, theta: Tensor, x: Tensor) -> None:
        return None

    def at(self, x_o: Tensor, n: int) -> Tensor:
        raise _missing()


@dataclass(frozen=True)
class _Amortised:
    posterior: VIPosterior
    correct: bool

    def draws(self, n: int, x: Tensor) -> Tensor:
        return self.posterior.sample_batched((n,), x, correct=self.correct)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        return _of_pairs(self.posterior.log_prob, theta, x)

    def at(self, x_o: Tensor, n: int) -> Tensor:
        return self.draws(n, x_o[None])[:, 0]


@dataclass(frozen=True)
class _Refitting:
    posterior: RefittingPosterior
    correct: bool | None

    def draws(self, n: int, x: Tensor) -> Tensor:
        seed = fresh_seed()  # the same draws, whether or not fits were there before
        self.posterior.sample_batched((), x, show_progress_bars=False)  # fits them, side by side if it can
        with seeded(seed):
            return torch.stack([self.at(row, n) for row in x], 1)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self.posterior.log_prob(theta[:, i], row) for i, row in enumerate(x)], 1)

    def at(self, x_o: Tensor, n: int) -> Tensor:
        return self.posterior.at(x_o).sample((n,), correct=self.correct)


@dataclass(frozen=True)
class _Many:
    posteriors: Posteriors
    correct: bool | None

    def draws(self, n: int, x: Tensor) -> Tensor:
        fitted = self.posteriors.x.cpu()
        if fitted.shape != x.shape or not torch.equal(fitted.nan_to_num(), x.cpu().to(fitted).nan_to_num()):
            raise ValueError(violation("x", "the observations that the posteriors were fitted to", "others"))
        return self.posteriors.sample((n,), correct=self.correct)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.posteriors.log_prob(theta)

    def at(self, x_o: Tensor, n: int) -> Tensor:
        raise _missing()


@dataclass(frozen=True)
class _Batched:
    posterior: Any

    def draws(self, n: int, x: Tensor) -> Tensor:
        return self.posterior.sample_batched((n,), x)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor | None:
        if callable(getattr(self.posterior, "log_prob_batched", None)):
            return self.posterior.log_prob_batched(theta, x)
        return None

    def at(self, x_o: Tensor, n: int) -> Tensor:
        return self.draws(n, x_o[None])[:, 0]
