r"""The quick classifier of the local test: Fisher's discriminant, for all exchanges at once.

True pairs (a_i, x_i) and drawn ones (b_i, x_i), i = 1 .. N, are told apart by a regression of y = +1 (true)
and -1 (drawn) on features phi(theta, x), centred and scaled over both samples:

    f = phi' beta,    beta = G^-1 r,    r = sum_i s_i (phi(a_i, x_i) - phi(b_i, x_i)),
    G = sum_i phi(a_i, x_i) phi(a_i, x_i)' + phi(b_i, x_i) phi(b_i, x_i)'.

s_i is 1, and -1 where pair i has been exchanged. G does not know the labels: one decomposition serves all
exchanges, and a hundred trainings cost little more than one. f is the linear discriminant (Fisher: The use of
multiple measurements in taxonomic problems. Annals of Eugenics 7 (1936) 179), made smaller by the share R^2 =
r' beta / 2N of the labels that it explains, so that d = 1 / (1 + exp(-2 f / (1 - R^2))) is the probability of
"true".

Features are theta less its regression on x, and its squares. Products with x, which tell what is wrong at one
x from what is wrong everywhere, and products with each other come in only while there are ten pairs for each
feature (the rule of ten events per variable: Peduzzi et al., J. Clin. Epidemiol. 49 (1996) 1373): every one
of them that says nothing hides what the others say. Features of x alone would say nothing, as both rows of a
pair have the same x. Where even theta and its squares are more than half of the pairs, random projections of
theta stand in their place.
"""

import numpy as np

__all__ = ["exchanged_regressions"]

_PAIRS_PER_FEATURE, _PAIRS_PER_PRODUCT = 2, 10
_MOST_FEATURES = 1000  # what one decomposition may cost
_MOST_EXPLAINED = 0.999  # by features that tell both samples apart without an error
_UNSEEN = 1e-9  # of the largest eigenvalue


def exchanged_regressions(
    theta: tuple[np.ndarray, np.ndarray, np.ndarray],
    x: tuple[np.ndarray, np.ndarray],
    signs: np.ndarray,
    *,
    seed: int,
) -> np.ndarray:
    """Probabilities of "true" at rows, by a classifier for each way to exchange pairs.

    Args:
        theta: true, drawn, and to be judged: (N, D), (N, D) and (M, D).
        x: of the pairs, (N, K), and of the rows to be judged, (M, K).
        signs: (B, N), -1 where a pair is exchanged.
        seed: of the projections, where there are too many parameters.

    Returns:
        (B, M).
    """
    n = len(theta[0])
    beside = np.concatenate([x[0], x[0], x[1]])
    most = min(n // _PAIRS_PER_FEATURE, _MOST_FEATURES)
    columns = _less_regression(np.concatenate(theta), beside, 2 * n)
    if 2 * columns.shape[1] > most:
        normal = np.random.default_rng(seed).standard_normal((columns.shape[1], most // 2))
        columns = columns @ np.linalg.qr(normal)[0]
    phi = _scaled(_features(_scaled(columns, 2 * n), beside, n // _PAIRS_PER_PRODUCT), 2 * n)
    true, drawn, at = phi[:n], phi[n : 2 * n], phi[2 * n :]
    values, vectors = np.linalg.eigh(true.T @ true + drawn.T @ drawn)
    inverse = np.where(values > _UNSEEN * values.max(), 1.0 / values.clip(1e-300), 0.0)
    difference = (true - drawn).T @ signs.T
    beta = vectors @ (inverse[:, None] * (vectors.T @ difference))
    explained = (difference * beta).sum(0) / (2 * n)
    logit = 2.0 * (at @ beta) / (1.0 - explained.clip(0.0, _MOST_EXPLAINED))
    return (0.5 * (1.0 + np.tanh(0.5 * logit))).T


def _less_regression(columns: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """Columns without what is linear in x among the first n rows."""
    x = np.concatenate([np.ones((len(x), 1)), x], 1)
    return columns - x @ np.linalg.lstsq(x[:n], columns[:n], rcond=1e-6)[0]


def _features(columns: np.ndarray, x: np.ndarray, most: int) -> np.ndarray:
    """Columns and squares, then products with x and with each other while there are no more than `most`."""
    first, second = np.triu_indices(columns.shape[1], 1)
    found = np.concatenate([columns, columns**2], 1)
    for size, product in (
        (columns.shape[1] * x.shape[1], lambda: (columns[:, :, None] * x[:, None, :]).reshape(len(x), -1)),
        (len(first), lambda: columns[:, first] * columns[:, second]),
    ):
        if found.shape[1] + size <= min(most, _MOST_FEATURES):
            found = np.concatenate([found, product()], 1)
    return found


def _scaled(columns: np.ndarray, n: int) -> np.ndarray:
    """With mean 0 and deviation 1 over the first n rows."""
    scale = columns[:n].std(0)
    return (columns - columns[:n].mean(0)) / np.where(scale > 0, scale, 1.0)
