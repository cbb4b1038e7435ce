r"""Are ranks uniform? One exact test, which is also the band of a figure.

u_1 .. u_n are uniform on finitely many equally probable values. The number N_k of them at or below z_k is
then binomial, Bin(n, z_k), and its distance from what is expected is told by

    gamma = min over k of 2 min(P(Bin(n, z_k) <= N_k), P(Bin(n, z_k) >= N_k))

which looks at the tails as hard as at the middle (Säilynoja, Bürkner, Vehtari: Graphical test for discrete
uniformity and its applications in goodness-of-fit evaluation and multiple sample comparison. 2022). The band
that holds the whole curve with probability 1 - alpha is where every N_k has a tail above the alpha-quantile
of gamma, so curve and p-value never disagree. The distribution of gamma is computed, not simulated: N_1,
N_2, ... is a Markov chain, N_k+1 - N_k ~ Bin(n - N_k, (z_k+1 - z_k) / (1 - z_k)), and the probability that
it stays inside a band is a product of matrices.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["Curve", "chi_squared", "curve", "holm", "kolmogorov_smirnov"]

_POINTS = 50
_BINS = 20
_PER_BIN = 5  # expected in each, as the chi-squared distribution asks for
_ROUNDING = 1e-10  # below which 1 - P(inside) has no digits left
_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class Curve:
    """Shares of values at or below points, beside those of the uniform distribution.

    Attributes:
        levels: z, (K,), increasing: the shares expected.
        counts: (K,) how many values were there.
        n: how many values there are.
        p_value: of the test that they are uniform.
    """

    levels: np.ndarray
    counts: np.ndarray
    n: int
    p_value: float

    @cached_property
    def shares(self) -> np.ndarray:
        """(K,) shares found."""
        return self.counts / self.n

    def band(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest shares, (K,) each, between which all lie with probability 1 - alpha."""
        low, high = _band(self.n, tuple(self.levels), alpha)
        return low / self.n, high / self.n


def curve(values: Tensor, possible: Tensor, points: int = _POINTS) -> Curve:
    """The curve of values (n,) that should be uniform on `possible` (M,), with its test.

    >>> ranks = torch.arange(1000) % 100
    >>> curve(ranks, torch.arange(100)).p_value
    1.0
    >>> curve(ranks // 2, torch.arange(100)).p_value < 1e-6
    True
    """
    found, grid = values.double().sort().values, possible.double().sort().values
    at = torch.unique(grid)[:-1]
    at = at[torch.linspace(0, len(at) - 1, min(points, len(at))).round().long()]
    levels = (torch.searchsorted(grid, at, right=True).double() / len(grid)).numpy()
    counts = torch.searchsorted(found, at, right=True).numpy()
    return Curve(levels, counts, len(found), _p_value(len(found), levels, counts))


def chi_squared(ranks: Tensor, possible: int) -> float:
    """p-value of Pearson's test for ranks (n,) in 0 .. possible - 1, in at most twenty bins."""
    from scipy.special import chdtrc

    bins = max(2, min(_BINS, possible, len(ranks) // _PER_BIN))
    edges = np.linspace(0, possible, bins + 1).round().astype(int)
    found = np.histogram(ranks.numpy(), edges - 0.5)[0]
    expected = len(ranks) * np.diff(edges) / possible
    return float(chdtrc(bins - 1, float(((found - expected) ** 2 / expected).sum())))


def kolmogorov_smirnov(ranks: Tensor, possible: int) -> float:
    """p-value of the test of Kolmogorov and Smirnov for ranks (n,), spread evenly inside their steps."""
    from scipy.stats import kstest

    spread = (ranks.double() + torch.rand(len(ranks), dtype=torch.float64)) / possible
    return float(kstest(spread.numpy(), "uniform").pvalue)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values (Q,) corrected for their number, so that the chance of a single false alarm is kept (Holm
    1979).

    >>> holm(np.array([0.01, 0.5, 0.02])).tolist()
    [0.03, 0.5, 0.04]
    """
    order = np.argsort(p_values)
    steps = np.maximum.accumulate(np.arange(len(p_values), 0, -1) * p_values[order])
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


@lru_cache(maxsize=16)
def _tails(n: int, levels: tuple[float, ...]) -> np.ndarray:
    """(K, n + 1): twice the smaller tail of each count."""
    from scipy.special import bdtr, bdtrc

    m, z = np.arange(n + 1.0), np.asarray(levels)[:, None]
    above = np.ones((len(levels), n + 1))
    above[:, 1:] = bdtrc(m[:-1], n, z)
    return 2.0 * np.minimum(bdtr(m, n, z), above)


def _edges(n: int, levels: tuple[float, ...], gamma: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The smallest and the largest count, (K,) each, whose tails are above gamma; None if there is none."""
    inside = _tails(n, levels) > gamma * (1.0 + 1e-9)
    if not inside.any(1).all():
        return None
    return inside.argmax(1), n - inside[:, ::-1].argmax(1)


def _staying(n: int, levels: tuple[float, ...], gamma: float) -> float:
    """P(every count has a tail above gamma)."""
    from scipy.special import gammaln

    edges = _edges(n, levels, gamma)
    if edges is None:
        return 0.0
    factorial = gammaln(np.arange(n + 1) + 1.0)
    before, z_before, state = np.zeros(1, dtype=int), 0.0, np.ones(1)
    for low, high, z in zip(*edges, levels, strict=True):
        now = np.arange(low, high + 1)
        rest, step = n - before[:, None], now[None] - before[:, None]
        possible = step >= 0
        step = np.where(possible, step, 0)
        p = (z - z_before) / (1.0 - z_before)
        log_pmf = factorial[rest] - factorial[step] - factorial[rest - step]
        log_pmf = log_pmf + step * np.log(p) + (rest - step) * np.log1p(-p)
        state = state @ np.where(possible, np.exp(log_pmf), 0.0)
        before, z_before = now, z
    return float(state.sum())


def _p_value(n: int, levels: np.ndarray, counts: np.ndarray) -> float:
    key = tuple(levels.tolist())
    gamma = float(_tails(n, key)[np.arange(len(counts)), counts].min())
    bound = len(counts) * gamma  # the probability of a union is at most the sum
    if bound < _ROUNDING:
        return bound
    return min(max(1.0 - _staying(n, key, gamma), 0.0), bound, 1.0)


@lru_cache(maxsize=64)
def _band(n: int, levels: tuple[float, ...], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.log(alpha / (4 * len(levels))), np.log(min(2 * alpha, 1.0))
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if 1.0 - _staying(n, levels, float(np.exp(middle))) <= alpha:
            low = middle
        else:
            high = middle
    edges = _edges(n, levels, float(np.exp(low)))
    assert edges is not None
    return edges
