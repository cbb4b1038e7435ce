r"""Predictive checks: does the observation look like what the model produces?

`prior_predictive_check`: is x_o foreign to the simulations that everything was learnt from?
`predictive_check`: does x_o look like simulations at draws of the posterior? Both put x_o among n
simulations and compute for each of these n + 1, in the same way, how odd it is among the others. If x_o is
one of them, its place is uniform: an exact test, for any n, any length of x, and any measure
(`visbi.certificate.oddity`); for draws of a posterior it is the posterior predictive p-value (Gelman, Meng,
Stern: Posterior predictive assessment of model fitness via realized discrepancies. 1996). The measures:

    entry       how far out the farthest entry is, and so which entries are off
    neighbours  distance to the nearest others: x_o between two clouds
    joint       Mahalanobis distance: entries that are where they should be, but not together
    location    all entries low, or all high, among those of the others
    spread      entries far out on both sides, or all in the middle

Odd in a posterior predictive check means that the model cannot produce x_o, that q is too narrow, or in the
wrong place. A posterior has seen its x_o, which therefore lies more in the middle than new data do, even if q
is exact (Meng: Posterior predictive p-values. 1994): that is no complaint, unless x_o is new (`seen=False`).
Where truths are known, `sbc` tests predictions exactly: give it a second simulation at each truth in place of
theta, and predictions in place of draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visbi.certificate.oddity import either, entry_scores, joint, neighbours, shares, squashed, upper
from visbi.certificate.oddity import score as score_of
from visbi.certificate.ranks import ALPHA, checked_names, p_text
from visbi.certificate.uniformity import holm
from visbi.core.checks import finite_tensor, in_interval, violation

__all__ = ["PredictiveCheck", "predictive_check", "prior_predictive_check"]

_FEWEST = 100
_MOST = 4000  # simulations compared; distances cost their square
_SHOWN = 5  # entries in a sentence


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """How odd x_o is among simulations.

    Attributes:
        verdict: "familiar" or "foreign" beside simulations of the prior; beside predictions of a posterior
            "calibrated", "over-confident", "under-confident", "biased", or "miscalibrated" where only the
            user's own statistics are odd.
        p_value: of the whole: the smallest corrected one.
        measures: (Q,) names.
        p_values, corrected: (Q,) of each measure, alone and corrected for Q (Holm).
        oddity: of each entry, of the shape of x: distance from the median in units of the distance of the 1 %
            tail, with its sign.
        entry_p_values: of each entry, of the shape of x, corrected for their number.
        names: of all entries of x, flattened.
        entries: names of those that are off, the oddest first.
        n: simulations compared with.
        alpha: chance of a false alarm.
    """

    verdict: str
    p_value: float
    measures: tuple[str, ...]
    p_values: np.ndarray
    corrected: np.ndarray
    oddity: Tensor
    entry_p_values: Tensor
    names: tuple[str, ...]
    entries: tuple[str, ...]
    n: int
    alpha: float

    def __str__(self) -> str:
        said = _SENTENCES[self.verdict]
        odd = [name for name, p in zip(self.measures, self.corrected, strict=True) if p < self.alpha]
        where = f"; odd: {', '.join(odd)}" if odd else ""
        if self.entries:
            more = len(self.entries) - _SHOWN
            where += f"; entries off: {', '.join(self.entries[:_SHOWN])}"
            where += f" and {more} more" if more > 0 else ""
        return f"{self.verdict}: {said} ({p_text(self.p_value)} among {self.n}){where}"


_SENTENCES = {
    "familiar": "x_o is like the simulations",
    "foreign": "x_o is unlike the simulations, and what was learnt from them need not hold there",
    "calibrated": "x_o is like the predictions",
    "over-confident": "x_o lies outside of the predictions",
    "under-confident": "x_o lies in the middle of the predictions, which are too wide",
    "biased": "x_o lies on one side of the predictions",
    "miscalibrated": "x_o and the predictions differ",
}


def prior_predictive_check(
    x_o: Tensor, x: Tensor, *, names: Sequence[str] | None = None, alpha: float = ALPHA
) -> PredictiveCheck:
    """Is the observation foreign to the simulations?

    Args:
        x_o: the observation, of the shape of one x.
        x: simulations at draws of the prior, (n, ...), at least 100; of more than 4000 the first are taken.
            Give features of an embedding in both places to ask the same of what a network sees: it may be
                blind
            to what is odd, or take it for the extreme of something it knows.
        names: of the entries of x, flattened; "x[i, j]" unless given.
        alpha: chance that an x_o from the prior is called foreign.

    Raises:
        ValueError: shapes that do not fit, too few simulations, numbers not finite, or `alpha` not in (0, 1).

    >>> from visbi.core.random import seeded
    >>> with seeded(0):
    ...     x = torch.randn(1000, 3)
    >>> print(prior_predictive_check(torch.tensor([0.3, -0.2, 9.0]), x))
    foreign: x_o is unlike the simulations, and what was learnt from them need not hold there (p = 0.003 among
    1000); odd: entry, neighbours, joint; entries off: x[2]
    """
    rows, labels, alpha = _checked(x_o, x, names, alpha)
    scores = entry_scores(rows)
    z = squashed(rows)
    measures = {"entry": np.abs(scores).max(1), "neighbours": neighbours(z), "joint": joint(z)}
    p_values = np.array([upper(each) for each in measures.values()])
    corrected = holm(p_values)
    verdict = "foreign" if corrected.min() < alpha else "familiar"
    return _result(verdict, tuple(measures), p_values, scores, labels, x_o.shape, alpha)


def predictive_check(
    x_o: Tensor,
    x: Tensor,
    *,
    seen: bool = True,
    statistics: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    names: Sequence[str] | None = None,
    alpha: float = ALPHA,
) -> PredictiveCheck:
    """Does the observation look like what the posterior predicts?

    Args:
        x_o: the observation, of the shape of one x.
        x: simulations at draws of the posterior, (n, ...), at least 100; of more than 4000 the first are
            taken.
        seen: whether the posterior was fitted to x_o. Then x_o in the middle of the predictions is no
            complaint.
        statistics: by name, of interest beside the built-in measures: x (n, ...) -> (n,). Odd is what is far
            out on either side.
        names: of the entries of x, flattened; "x[i, j]" unless given.
        alpha: chance of a false alarm, at most.

    Raises:
        ValueError: shapes that do not fit, too few simulations, numbers not finite, or `alpha` not in (0, 1).

    >>> from visbi.core.random import seeded
    >>> with seeded(0):
    ...     predictions = torch.randn(1000, 30)
    ...     x_o = torch.randn(30)
    >>> predictive_check(x_o, predictions).verdict
    'calibrated'
    >>> predictive_check(x_o + 0.8, predictions).verdict
    'biased'
    >>> predictive_check(3 * x_o, predictions).verdict
    'over-confident'
    """
    rows, labels, alpha = _checked(x_o, x, names, alpha)
    scores, u = entry_scores(rows), shares(rows)
    location = u.mean(1)
    measures = {
        "entry": np.abs(scores).max(1),
        "joint": joint(squashed(rows)),
        "location": location,
        "spread": ((u - 0.5) ** 2).mean(1) - (location - 0.5) ** 2,
    }
    two_sided = {"location": True, "entry": False, "joint": not seen, "spread": not seen}
    together = torch.cat([torch.as_tensor(x)[: len(rows) - 1], torch.as_tensor(x_o)[None]])
    for name, statistic in (statistics or {}).items():
        if name in measures:
            raise ValueError(violation("statistics", f"names other than {', '.join(measures)}", name))
        measures[name] = _values(name, statistic, together)
    p_values = np.array([either(v) if two_sided.get(k, True) else upper(v) for k, v in measures.items()])
    odd = {k for k, p in zip(measures, holm(p_values), strict=True) if p < alpha}
    verdict = _verdict(odd, {name: score_of(measures[name]) for name in two_sided})
    return _result(verdict, tuple(measures), p_values, scores, labels, x_o.shape, alpha)


def _verdict(odd: set[str], score: dict[str, float]) -> str:
    """From the names of what is odd and from scores, positive where x_o has more than predictions have."""
    far = [name for name in ("spread", "joint", "entry") if name in odd]
    clearest = max((score[name] for name in far), key=abs, default=0.0)
    if "location" in odd and abs(score["location"]) >= abs(score["spread"]):
        return "biased"
    if far:
        return "over-confident" if clearest > 0 else "under-confident"
    return "miscalibrated" if odd else "calibrated"


def _result(
    verdict: str,
    measures: tuple[str, ...],
    p_values: np.ndarray,
    scores: np.ndarray,
    labels: tuple[str, ...],
    shape: torch.Size,
    alpha: float,
) -> PredictiveCheck:
    corrected = holm(p_values)
    mine = np.abs(scores[-1])
    farthest = np.sort(np.abs(scores).max(1))  # of each row: who is beyond these is beyond by all entries
    entry_p = 1.0 - np.searchsorted(farthest, mine, side="left") / len(farthest)
    off = [i for i in np.argsort(-mine, kind="stable") if entry_p[i] < alpha]
    return PredictiveCheck(
        verdict=verdict,
        p_value=float(corrected.min()),
        measures=measures,
        p_values=p_values,
        corrected=corrected,
        oddity=torch.from_numpy(scores[-1]).reshape(shape),
        entry_p_values=torch.from_numpy(entry_p).reshape(shape),
        names=labels,
        entries=tuple(labels[i] for i in off),
        n=len(scores) - 1,
        alpha=alpha,
    )


def _checked(
    x_o: Any, x: Any, names: Sequence[str] | None, alpha: float
) -> tuple[np.ndarray, tuple[str, ...], float]:
    """Rows (n + 1, K), x_o the last; names of the K entries."""
    x_o, x = finite_tensor("x_o", x_o), finite_tensor("x", x)
    if x.ndim < 2 or len(x) < _FEWEST:
        raise ValueError(violation("x", f"shape (n, ...), n >= {_FEWEST}", tuple(x.shape)))
    if x_o.shape != x.shape[1:]:
        raise ValueError(violation("x_o", f"shape {tuple(x.shape[1:])}", tuple(x_o.shape)))
    rows = torch.cat([x[:_MOST].detach().cpu().double(), x_o[None].detach().cpu().double()]).flatten(1)
    if names is None:
        names = [f"x{[int(i) for i in where]}" for where in np.ndindex(tuple(x_o.shape))]
    return np.asarray(rows), checked_names(names, rows.shape[1]), in_interval("alpha", alpha, 0, 1)


def _values(name: str, statistic: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    values = finite_tensor(f"statistics[{name!r}]", statistic(x)).detach().cpu().double()
    if values.shape != (len(x),):
        expected = f"to give one number for each of {len(x)} rows"
        raise ValueError(violation(f"statistics[{name!r}]", expected, tuple(values.shape)))
    return np.asarray(values)
