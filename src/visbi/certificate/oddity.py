r"""How odd is each of n + 1 rows among the others, the last of which is the observation?

Every measure treats all rows alike. If the observation is one more draw of what the others come from, its
place among the n + 1 values is uniform, and `upper` and `either` are exact p-values whatever the measure
(conformal: Vovk, Gammerman, Shafer: Algorithmic learning in a random world. 2005).
"""

import numpy as np
import torch

__all__ = ["either", "entry_scores", "joint", "neighbours", "score", "shares", "squashed", "upper"]

_TAIL = 0.01
_NEIGHBOUR = 5
_ROUNDING = 1e-12  # of the variance; directions with less are constant


def upper(values: np.ndarray) -> float:
    """p-value (n + 1,) that the last value is as large as it is.

    >>> upper(np.array([1.0, 2.0, 3.0, 2.5]))
    0.5
    """
    return float((values >= values[-1]).mean())


def either(values: np.ndarray) -> float:
    """p-value that it is as far out on either side."""
    return min(1.0, 2.0 * min(upper(values), upper(-values)))


def score(values: np.ndarray) -> float:
    """The last value in deviations of the others, as far as these are finite, from their mean."""
    others = values[:-1][np.isfinite(values[:-1])]
    spread = float(others.std()) if len(others) else 0.0
    return float(values[-1] - others.mean()) / spread if spread > 0 else 0.0


def entry_scores(rows: np.ndarray) -> np.ndarray:
    """Of rows (n + 1, K): distance from the median in units of the distance of the 1 % tail, signed.

    So heavy and skewed entries speak no louder than others. Where that tail coincides with the median, the
    other tail's distance is the unit; an entry that differs from what is constant is infinitely far.
    """
    low, middle, high = np.quantile(rows, [_TAIL, 0.5, 1 - _TAIL], axis=0)
    away = rows - middle
    unit = np.where(away > 0, high - middle, middle - low)
    unit = np.where(unit > 0, unit, np.maximum(high - middle, middle - low))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(away == 0, 0.0, away / unit)


def shares(rows: np.ndarray) -> np.ndarray:
    """Of rows (n + 1, K): in (0, 1), the share of rows with a lower entry, ties counted half."""
    from scipy.stats import rankdata

    return (rankdata(rows, axis=0) - 0.5) / len(rows)


def squashed(rows: np.ndarray) -> np.ndarray:
    """Rows with a median of 0, a deviation of about 1, and tails drawn in, for distances."""
    low, middle, high = np.quantile(rows, [0.16, 0.5, 0.84], axis=0)
    unit = np.where(high > low, 0.5 * (high - low), rows.std(0))
    return np.arcsinh((rows - middle) / np.where(unit > 0, unit, 1.0))


def neighbours(z: np.ndarray) -> np.ndarray:
    """(n + 1,) distance of each row to the fifth nearest of the others."""
    rows = torch.from_numpy(z)
    nearest = [torch.cdist(part, rows).topk(_NEIGHBOUR + 1, largest=False).values for part in rows.split(512)]
    return torch.cat(nearest)[:, -1].numpy()


def joint(z: np.ndarray) -> np.ndarray:
    """(n + 1,) squared Mahalanobis distances to the mean, the covariance shrunk (Ledoit, Wolf 2004)."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    centred = z - z.mean(0)
    shrinkage, mean_variance = float(ledoit_wolf_shrinkage(centred, assume_centered=True)), centred.var()
    if mean_variance == 0.0:
        return np.zeros(len(z))
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    variance = singular**2 / len(z)
    kept = variance > _ROUNDING * mean_variance
    shrunk = (1 - shrinkage) * variance[kept] + shrinkage * mean_variance
    return (left[:, kept] ** 2 * singular[kept] ** 2 / shrunk).sum(1)
