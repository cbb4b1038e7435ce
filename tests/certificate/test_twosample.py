"""The classifier two-sample test on samples whose best possible classifier is known."""

import math

import pytest
import torch

from visbi.certificate import c2st

N = 2000
NOISE = 4 * math.sqrt(1 / (8 * N))


def best_accuracy(shift: float) -> float:
    """Of a classifier between N(0, 1) and N(shift, 1): (1 + TV) / 2."""
    return 0.5 + 0.5 * math.erf(shift / 2 / math.sqrt(2))


@pytest.mark.parametrize("classifier", ["network", "trees", "both"])
def test_samples_of_one_distribution(classifier: str) -> None:
    assert abs(c2st(torch.randn(N, 2), torch.randn(N, 2), classifier=classifier) - 0.5) < NOISE


@pytest.mark.parametrize("classifier", ["network", "trees"])
def test_a_shift_is_seen_as_well_as_theory_allows(classifier: str) -> None:
    shifted = torch.randn(N, 1) + 1.0
    assert abs(c2st(shifted, torch.randn(N, 1), classifier=classifier) - best_accuracy(1.0)) < NOISE + 0.01


def test_a_lost_mode_is_seen() -> None:
    both = torch.randn(N, 2) * 0.3 + torch.where(torch.rand(N, 1) < 0.5, 3.0, -3.0)
    one = torch.randn(N, 2) * 0.3 + 3.0
    assert abs(c2st(one, both) - 0.75) < NOISE  # TV = 1/2


def test_scales_are_those_of_the_reference() -> None:
    a, b = torch.randn(N, 2), torch.randn(N, 2) + 0.5
    tiny = torch.tensor([1e-6, 1e6])
    assert c2st(a * tiny, b * tiny) == pytest.approx(c2st(a, b), abs=0.01)


def test_repeatable() -> None:
    a, b = torch.randn(200, 2), torch.randn(300, 2)
    assert c2st(a, b, seed=3) == c2st(a, b, seed=3)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"theta": torch.zeros(100, 3)}, "theta"),
        ({"theta": torch.full((100, 2), math.nan)}, "theta"),
        ({"folds": 1}, "folds"),
        ({"folds": 60}, "folds"),
        ({"classifier": "forest"}, "classifier"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_refused(wrong: dict[str, object], name: str) -> None:
    arguments = {"theta": torch.randn(100, 2), "reference": torch.randn(100, 2), **wrong}
    with pytest.raises(ValueError, match=name):
        c2st(**arguments)  # type: ignore[arg-type]
