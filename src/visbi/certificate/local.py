r"""Local C2ST: is q right at this one observation?

Pairs (theta*, x) of prior and simulator and pairs (theta, x) with theta ~ q(. | x) have one distribution if
and only if q is right at almost all x. A classifier is trained to tell them apart; the probability d(theta,
x_o) that it gives to "true" at draws of q(. | x_o) is 1/2 if q is right at x_o, and the statistic is the mean
of (d - 1/2)^2 there (Linhart, Gramfort, Rodrigues: L-C2ST: Local diagnostics for posterior approximations in
simulation-based inference. 2023).

If q is right, the two thetas of an x may change places. The same training on pairs of which a random half
has been exchanged therefore gives draws of the statistic's distribution, and an exact p-value. It is exact
for a q that is right everywhere: where q is wrong elsewhere, some of what the classifier learnt there
reaches x_o, and a small p-value need not mean x_o; the statistic, `shift` and `scale` say how much is wrong
here.

d says more than that something is wrong: its logit is log p(theta | x_o) - log q(theta | x_o) + const to the
classifier's eye. If q = N(m, s^2) and p = N(m + a s, r^2 s^2), the covariances of the logit over draws of q
with z = (theta - m) / s and with z^2 / 2 are a / r^2 and (1 - 1 / r^2) / 2: they tell a shift from a wrong
width, and that they are more than chance is seen by those after exchanges.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visbi.certificate.ranks import ALPHA, checked_names, p_text
from visbi.certificate.regression import exchanged_regressions
from visbi.core.checks import finite_tensor, in_interval, non_negative_int, one_of, positive_int, violation
from visbi.core.random import spawn_seeds

__all__ = ["CLASSIFIERS", "N_NULL", "LocalC2ST", "local_c2st"]

CLASSIFIERS = ("network", "quadratic", "regression")
N_NULL = 100
"""Trainings after exchanges, unless told otherwise."""
_WIDTH, _EPOCHS = 40, 30  # of the network
_MOST_SQUARED = 30  # columns; products of more would be too many for a network
_FEWEST_PAIRS = 100
_FEWEST_DRAWS = 50
_CERTAIN = 1e-6  # nearest to 0 and 1 that d may come
_MOST_GROWTH = 0.48  # which is five times as wide


@dataclass(frozen=True, eq=False)
class LocalC2ST:
    """What the classifier sees at x_o.

    Attributes:
        verdict: "calibrated", "over-confident", "under-confident" or "biased".
        p_value: that q is right at x_o.
        statistic: mean of (d - 1/2)^2 over the draws at x_o.
        null: (B,) the same after exchanges.
        shift: (D,) by how many of their deviations the draws would have to move, to the classifier's eye.
        scale: (D,) by which factor their deviations would have to grow.
        names: of the D parameters.
        alpha: chance of a false alarm.
    """

    verdict: str
    p_value: float
    statistic: float
    null: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    names: tuple[str, ...]
    alpha: float

    def __str__(self) -> str:
        p = p_text(self.p_value)
        if self.verdict == "calibrated":
            return f"calibrated at this x: a classifier sees no difference ({p})"
        if self.verdict == "biased":
            i = int(np.abs(self.shift).argmax())
            by = f"{self.shift[i]:+.2f} deviations"
            return f"biased at this x: the posterior of {self.names[i]} is moved by {by} from the draws ({p})"
        i = int(np.abs(np.log(self.scale)).argmax())
        how = f"{self.scale[i]:.2f} times as wide as the draws"
        return f"{self.verdict} at this x: the posterior of {self.names[i]} is {how} ({p})"


def local_c2st(
    theta: Tensor,
    x: Tensor,
    draws: Tensor,
    x_o: Tensor,
    draws_o: Tensor,
    *,
    classifier: str | Any = "network",
    n_null: int = N_NULL,
    names: Sequence[str] | None = None,
    alpha: float = ALPHA,
    seed: int = 1,
) -> LocalC2ST:
    """Can a classifier trained on many observations tell draws at x_o from the posterior?

    Args:
        theta, x: simulated pairs, (N, D) and (N, ...), at least 100; of long or structured x give features.
        draws: one of q(theta | x) for each, (N, D).
        x_o: the observation, of the shape of one x.
        draws_o: of q(theta | x_o), (M, D), at least 50.
        classifier: "network" (scikit-learn's, one layer), "quadratic" (logistic regression on products of two
            columns: quick, and enough where posteriors are near to Gaussian), "regression" (a linear
            discriminant of as many of these products as the pairs allow, all exchanges at once: quicker
            still, and for any number of columns), or any classifier of scikit-learn with `predict_proba`; it
            is cloned, never changed.
        n_null: B, trainings after exchanges; the p-value is at least 1 / (B + 1).
        names: of the D parameters.
        alpha: chance that a right q is called wrong.
        seed: of exchanges and classifiers.

    Raises:
        ValueError: shapes that do not fit, too few pairs or draws, numbers not finite, an unknown classifier,
            `alpha` not in (0, 1), or too few exchanges for it.
        TypeError: `classifier` cannot be fitted or gives no probabilities.

    >>> from visbi.core.random import seeded
    >>> with seeded(1):
    ...     theta = torch.randn(500, 1)
    ...     x = theta + torch.randn(500, 1)
    ...     narrow = x / 2 + 0.4 * torch.randn(500, 1)
    ...     at_half = 0.25 + 0.4 * torch.randn(500, 1)
    >>> x_o = torch.tensor([0.5])
    >>> local_c2st(theta, x, narrow, x_o, at_half, classifier="quadratic", n_null=20).verdict
    'over-confident'
    """
    labels = checked_names(names, _checked(theta, x, draws, x_o, draws_o, classifier))
    alpha, n_null = in_interval("alpha", alpha, 0, 1), positive_int("n_null", n_null)
    if (n_null + 1) * alpha <= 1:  # no p-value would be below it
        raise ValueError(violation("n_null", f"at least {int(1 / alpha)} for this alpha", n_null))
    numbers = np.random.default_rng(non_negative_int("seed", seed))
    seeds = spawn_seeds(seed, n_null + 1)
    scaler = _Scaler(theta, x)
    true, drawn = scaler.rows(theta, x), scaler.rows(draws, x)
    at_o = scaler.rows(draws_o, x_o.expand(len(draws_o), *x_o.shape))
    if isinstance(classifier, str) and classifier == "regression":
        signs = np.where(numbers.random((n_null + 1, len(true))) < 0.5, -1.0, 1.0)
        signs[0] = 1.0
        dim = theta.shape[1]
        thetas = (true[:, :dim], drawn[:, :dim], at_o[:, :dim])
        found = exchanged_regressions(thetas, (true[:, dim:], at_o[:, dim:]), signs, seed=seeds[0])
    else:
        found = np.array(
            [
                _probabilities(_classifier(classifier, true.shape[1], seeds[i]), true, drawn, at_o, exchange)
                for i, exchange in enumerate(_exchanges(numbers, n_null, len(true)))
            ]
        )
    return _judged(found, np.asarray(draws_o.detach().cpu().double()), labels, alpha)


def _exchanges(numbers: np.random.Generator, n_null: int, n: int) -> Iterator[np.ndarray]:
    """Which of n pairs are exchanged, (n, 1): first none of them."""
    yield np.zeros((n, 1), dtype=bool)
    for _ in range(n_null):
        yield numbers.random((n, 1)) < 0.5


def _probabilities(
    model: Any, true: np.ndarray, drawn: np.ndarray, at_o: np.ndarray, exchange: np.ndarray
) -> np.ndarray:
    """d (M,) at the rows of x_o, by a classifier that is trained on the pairs after an exchange."""
    first, second = np.where(exchange, drawn, true), np.where(exchange, true, drawn)
    with warnings.catch_warnings():  # so few epochs are meant to be all
        warnings.filterwarnings("ignore", message="Stochastic Optimizer: Maximum iterations")
        model.fit(np.concatenate([first, second]), np.repeat([1, 0], len(true)))
    return model.predict_proba(at_o)[:, 1]


def _judged(d: np.ndarray, theta: np.ndarray, names: tuple[str, ...], alpha: float) -> LocalC2ST:
    """From d (1 + B, M), first without exchanges, at draws theta (M, D)."""
    statistics = ((d - 0.5) ** 2).mean(1)
    p_value = float((1 + (statistics[1:] >= statistics[0]).sum()) / len(statistics))
    d = d.clip(_CERTAIN, 1 - _CERTAIN)
    logit = np.log(d) - np.log1p(-d)
    logit = logit - logit.mean(1, keepdims=True)
    z = (theta - theta.mean(0)) / np.maximum(theta.std(0), 1e-300)
    shift, growth = logit @ z / len(z), 0.5 * logit @ (z**2 - 1) / len(z)
    moved, grown = (_clearest(effect) for effect in (shift, growth))
    verdict = "calibrated"
    if p_value < alpha:
        narrow = "over-confident" if growth[0, grown[0]] > 0 else "under-confident"
        verdict = "biased" if moved[1] >= grown[1] else narrow
    return LocalC2ST(
        verdict=verdict,
        p_value=p_value,
        statistic=float(statistics[0]),
        null=statistics[1:],
        shift=shift[0],
        scale=(1 - 2 * growth[0].clip(None, _MOST_GROWTH)) ** -0.5,
        names=names,
        alpha=alpha,
    )


def _clearest(effects: np.ndarray) -> tuple[int, float]:
    """Of effects (1 + B, D): the one whose first is farthest from the others, in their deviations."""
    score = np.abs(effects[0] - effects[1:].mean(0)) / np.maximum(effects[1:].std(0), 1e-12)
    i = int(score.argmax())
    return i, float(score[i])


class _Scaler:
    """Columns of theta and of x, with mean 0 and deviation 1 over the simulations."""

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        columns = self._columns(theta, x)
        self.loc, scale = columns.mean(0), columns.std(0)
        self.scale = np.where(scale > 0, scale, 1.0)

    def rows(self, theta: Tensor, x: Tensor) -> np.ndarray:
        return (self._columns(theta, x) - self.loc) / self.scale

    @staticmethod
    def _columns(theta: Tensor, x: Tensor) -> np.ndarray:
        return np.asarray(torch.cat([part.detach().cpu().double().flatten(1) for part in (theta, x)], 1))


def _classifier(kind: Any, columns: int, seed: int) -> Any:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    if not isinstance(kind, str):
        model: Any = clone(kind)
        if "random_state" in model.get_params():
            model.set_params(random_state=seed)
        return model
    squares = make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler())
    if kind == "quadratic":
        return make_pipeline(squares, LogisticRegression(max_iter=1000))
    network = MLPClassifier(
        (_WIDTH,), learning_rate_init=3e-3, alpha=0.1, max_iter=_EPOCHS, random_state=seed
    )
    return make_pipeline(squares, network) if columns <= _MOST_SQUARED else network


def _checked(theta: Any, x: Any, draws: Any, x_o: Any, draws_o: Any, classifier: Any) -> int:
    """The number of parameters D, if all fits together."""
    theta, x, draws, x_o, draws_o = (
        finite_tensor(name, value)
        for name, value in zip(
            ("theta", "x", "draws", "x_o", "draws_o"), (theta, x, draws, x_o, draws_o), strict=True
        )
    )
    if theta.ndim != 2 or len(theta) < _FEWEST_PAIRS or theta.shape[1] < 1:
        raise ValueError(violation("theta", f"shape (N, D), N >= {_FEWEST_PAIRS}", tuple(theta.shape)))
    if x.ndim < 2 or len(x) != len(theta):
        raise ValueError(violation("x", f"shape ({len(theta)}, ...)", tuple(x.shape)))
    if draws.shape != theta.shape:
        raise ValueError(violation("draws", f"shape {tuple(theta.shape)}", tuple(draws.shape)))
    if x_o.shape != x.shape[1:]:
        raise ValueError(violation("x_o", f"shape {tuple(x.shape[1:])}", tuple(x_o.shape)))
    dim = theta.shape[1]
    if draws_o.ndim != 2 or draws_o.shape[1] != dim or len(draws_o) < _FEWEST_DRAWS:
        expected = f"shape (M, {dim}), M >= {_FEWEST_DRAWS}"
        raise ValueError(violation("draws_o", expected, tuple(draws_o.shape)))
    if isinstance(classifier, str):
        one_of("classifier", classifier, CLASSIFIERS)
    elif not (hasattr(classifier, "fit") and hasattr(classifier, "predict_proba")):
        raise TypeError(violation("classifier", "a classifier with `predict_proba`", repr(classifier)))
    return dim
