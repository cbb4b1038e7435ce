"""All exchanges at once give what one discriminant after another gives, at any number of columns."""

from typing import Any

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression

from visbi.certificate.regression import exchanged_regressions

N, M, B = 300, 40, 5


def given(dim: int, k: int = 2, seed: int = 0, *, n: int = N, gap: float = 0.6) -> tuple[Any, Any, Any]:
    numbers = np.random.default_rng(seed)
    x, x_o = numbers.standard_normal((n, k)), np.repeat(numbers.standard_normal((1, k)), M, 0)
    true, drawn, at = (numbers.standard_normal((rows, dim)) for rows in (n, n, M))
    true[:, 0] += gap
    signs = np.where(numbers.random((B, n)) < 0.5, -1.0, 1.0)
    signs[0] = 1.0
    return (true, drawn, at), (x, x_o), signs


def features(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """For two parameters and two entries of x: all that ten pairs per product allow."""
    a, b = theta.T
    return np.stack([a, b, a**2, b**2, *(t * y for t in (a, b) for y in x.T), a * b], 1)


def test_one_discriminant_after_another_gives_the_same() -> None:
    (true, drawn, at), (x, x_o), signs = given(2)
    found = exchanged_regressions((true, drawn, at), (x, x_o), signs, seed=0)
    both = np.concatenate([x, x])
    line = LinearRegression().fit(both, np.concatenate([true, drawn]))
    left = [theta - line.predict(y) for theta, y in ((true, x), (drawn, x), (at, x_o))]
    pooled = np.concatenate(left[:2])
    left = [(part - pooled.mean(0)) / pooled.std(0) for part in left]
    rows = np.concatenate([features(left[0], x), features(left[1], x)])
    for i in range(B):
        model = LinearDiscriminantAnalysis().fit(rows, np.concatenate([signs[i], -signs[i]]))
        expected = model.predict_proba(features(left[2], x_o))[:, 1]
        assert found[i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("dim", "k"), [(1, 1), (3, 0), (5, 40), (40, 5), (400, 3), (3, 900)])
def test_any_number_of_columns(dim: int, k: int) -> None:
    """A clear difference of one parameter stands out among exchanges unless it drowns in projections."""
    theta, x, signs = given(dim, k, gap=1.5)
    found = ((exchanged_regressions(theta, x, signs, seed=0) - 0.5) ** 2).mean(1)
    assert np.isfinite(found).all()
    if dim <= N // 4:
        assert found[0] > 1.5 * found[1:].max()


def test_more_parameters_than_half_of_the_pairs_are_projected_not_dropped() -> None:
    (true, drawn, at), x, signs = given(400)
    found = exchanged_regressions((1.5 * true, drawn, at), x, signs, seed=0)  # all are too narrow
    statistic = ((found - 0.5) ** 2).mean(1)
    assert statistic[0] > 1.5 * statistic[1:].max()


def test_a_column_without_spread() -> None:
    (true, drawn, at), x, signs = given(2)
    for part in (true, drawn, at):
        part[:, 1] = 7.0
    assert np.isfinite(exchanged_regressions((true, drawn, at), x, signs, seed=0)).all()
