"""The local classifier test: right and wrong posteriors at one observation."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC
from torch import Tensor

from calibration_cases import WRONG, wrong_q
from visbi.certificate import LocalC2ST, local_c2st
from visbi.core.random import seeded
from visbi.simulators.zoo import linear_gaussian

TASK = linear_gaussian.task(2)


def pairs(n: int, seed: int = 0, **how: float) -> tuple[Tensor, Tensor, Tensor]:
    with seeded(seed):
        theta = TASK.prior.sample((n,))
        x = TASK.simulator(theta)
        return theta, x, wrong_q(TASK, x, **how).sample()


def at(x_o: Tensor, n: int = 300, **how: float) -> Tensor:
    with seeded(9):
        return wrong_q(TASK, x_o[None], **how).sample((n,))[:, 0]


def found(n: int, *, seed: int = 0, how: dict[str, float] | None = None, **options: Any) -> LocalC2ST:
    how = how or {}
    options = {"classifier": "quadratic", "n_null": 30, "seed": seed, **options}
    return local_c2st(*pairs(n, seed, **how), TASK.x_o, at(TASK.x_o, **how), **options)


QUICK = ["quadratic", "regression"]


@pytest.mark.parametrize("classifier", QUICK)
@pytest.mark.parametrize("verdict", WRONG)
def test_right_and_wrong_are_told_apart(verdict: str, classifier: str) -> None:
    result = found(800, how=WRONG[verdict], classifier=classifier)
    assert result.verdict == verdict, str(result)
    assert str(result).startswith(f"{verdict} at this x: ")
    if verdict == "biased":  # draws lie above, so the posterior is below
        assert result.shift.max() < -0.3
    elif verdict != "calibrated":
        assert np.all((result.scale > 1.1) == (verdict == "over-confident"))


@pytest.mark.parametrize("verdict", ["calibrated", "over-confident"])  # the hardest two
def test_the_network_tells_them_apart(verdict: str) -> None:
    how = {
        key: 1 + 1.5 * (value - 1) if key == "scale" else 1.2 * value for key, value in WRONG[verdict].items()
    }
    assert found(800, how=how, classifier="network", n_null=20).verdict == verdict


@pytest.mark.parametrize("classifier", QUICK)
def test_false_alarms_are_as_rare_as_promised(classifier: str) -> None:
    options = {"n_null": 9, "alpha": 0.2, "classifier": classifier}
    p = np.array([found(120, seed=seed, **options).p_value for seed in range(50)])
    for level in (0.1, 0.5):
        assert abs((p <= level).mean() - level) < 3.5 * (level * (1 - level) / len(p)) ** 0.5


@pytest.mark.parametrize(
    ("classifier", "slope", "least"),
    [("quadratic", 0.4, 1.0), ("regression", 0.15, 0.6)],  # a discriminant flattens what is large
)
def test_it_is_local(classifier: str, slope: float, least: float) -> None:
    """A q that is right where x_1 = -1.5 and shifted in proportion to the distance from there."""

    def shift(x: Tensor) -> Tensor:
        return slope * (x[..., :1] + 1.5)

    theta, x, exact = pairs(1500)
    left, right = (
        local_c2st(theta, x, exact + shift(x), x_o, at(x_o) + shift(x_o), classifier=classifier, n_null=40)
        for x_o in (torch.tensor([-1.5, 0.0]), torch.tensor([1.5, 0.0]))
    )
    assert right.verdict == "biased" and right.shift.max() < -least
    # the exchanges stand for a q that is right everywhere, so only the size says that little is wrong here
    assert np.abs(left.shift).max() < 0.3 and left.statistic < 0.1 * right.statistic


@pytest.mark.parametrize("classifier", QUICK)
def test_shift_and_scale_are_those_of_the_posterior(classifier: str) -> None:
    options = {"classifier": classifier}
    assert found(4000, how={"shift": 0.5}, **options).shift == pytest.approx([-0.5, -0.5], abs=0.15)
    assert found(4000, how={"scale": 0.8}, **options).scale == pytest.approx([1.25, 1.25], abs=0.12)
    assert found(4000, how={"scale": 1.25}, **options).scale == pytest.approx([0.8, 0.8], abs=0.08)


def test_a_classifier_of_the_user_s() -> None:
    classifier = GaussianNB()
    assert found(300, classifier=classifier).p_value > 0
    assert not hasattr(classifier, "classes_")  # a clone was fitted


def test_repeatable() -> None:
    state = torch.random.get_rng_state()
    a, b, c = (found(200, classifier="network", n_null=20, seed=seed) for seed in (0, 0, 1))
    assert a.statistic == b.statistic and np.array_equal(a.null, b.null)
    assert a.statistic != c.statistic
    assert torch.equal(state, torch.random.get_rng_state())


GOOD: dict[str, Any] = {
    "theta": torch.randn(120, 2),
    "x": torch.randn(120, 3),
    "draws": torch.randn(120, 2),
    "x_o": torch.zeros(3),
    "draws_o": torch.randn(60, 2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": torch.zeros(120)}, r"`theta`: expected shape \(N, D\), N >= 100"),
        ({"theta": torch.zeros(50, 2)}, "N >= 100"),
        ({"x": torch.zeros(100, 3)}, r"`x`: expected shape \(120, ...\)"),
        ({"draws": torch.zeros(120, 3)}, r"`draws`: expected shape \(120, 2\)"),
        ({"draws": torch.full((120, 2), torch.nan)}, "`draws`: expected finite"),
        ({"x_o": torch.zeros(1, 3)}, r"`x_o`: expected shape \(3,\)"),
        ({"draws_o": torch.zeros(60, 1)}, r"`draws_o`: expected shape \(M, 2\)"),
        ({"draws_o": torch.zeros(20, 2)}, "M >= 50"),
        ({"classifier": "forest"}, "'network', 'quadratic', 'regression'"),
        ({"n_null": 10}, "`n_null`: expected at least 20"),
        ({"alpha": 0.0}, "`alpha`"),
        ({"names": ["a"]}, "`names`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_c2st(**{**GOOD, **change})


def test_a_classifier_without_probabilities() -> None:
    with pytest.raises(TypeError, match="`classifier`: expected a classifier with `predict_proba`"):
        local_c2st(**GOOD, classifier=LinearSVC())
