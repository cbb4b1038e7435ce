"""Predictive checks: what is foreign, what is wide, narrow or to one side, and which entries are off."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visbi.certificate import predictive_check, prior_predictive_check, sbc
from visbi.certificate.oddity import either, entry_scores, joint, neighbours, upper
from visbi.core.random import seeded


def manifold(n: int, width: int, seed: int = 0) -> Tensor:
    """Simulations near a plane in many dimensions, with skewed and heavy-tailed entries."""
    with seeded(seed):
        x = torch.randn(n, 3) @ torch.randn(3, width) + 0.3 * torch.randn(n, width)
    return torch.cat([x[:, : width // 2].exp(), x[:, width // 2 :]], 1)


@pytest.mark.parametrize("width", [2, 50])
def test_an_x_of_the_prior_is_familiar_as_often_as_promised(width: int) -> None:
    p = []
    for seed in range(120):
        x = manifold(200, width, seed)
        p.append(prior_predictive_check(x[0], x[1:]).p_value)
    share, deviation = np.mean(np.array(p) < 0.1), (0.09 / len(p)) ** 0.5
    assert 0.01 < share < 0.1 + 3 * deviation


def test_an_entry_that_is_off_is_named() -> None:
    x = manifold(1001, 40)
    x_o = x[0].clone()
    assert prior_predictive_check(x_o, x[1:]).verdict == "familiar"
    x_o[31] = 30.0
    found = prior_predictive_check(x_o, x[1:])
    assert found.verdict == "foreign" and found.entries == ("x[31]",)
    assert found.entry_p_values[31] < 0.01 and found.oddity[31] > 2
    assert int((found.entry_p_values < 0.05).sum()) == 1
    assert "entries off: x[31]" in str(found)


def test_entries_of_an_image_are_named_by_row_and_column() -> None:
    with seeded(0):
        x = torch.randn(400, 5, 6)
    x_o = x[0].clone()
    x_o[2, 4] = -9.0
    found = prior_predictive_check(x_o, x[1:])
    assert found.entries == ("x[2, 4]",) and found.oddity.shape == (5, 6) and found.oddity[2, 4] < -2


def test_a_wrong_combination_is_foreign_where_no_entry_is() -> None:
    with seeded(0):
        first = torch.randn(1000, 1)
        x = torch.cat([first, first + 0.1 * torch.randn(1000, 1)], 1)
    found = prior_predictive_check(torch.tensor([1.0, -1.0]), x)
    assert found.verdict == "foreign" and found.entries == ()
    assert "joint" in str(found) and "entry" not in str(found)


def test_between_two_clouds_is_foreign() -> None:
    with seeded(0):
        x = 0.3 * torch.randn(1000, 4) + 4 * torch.where(torch.rand(1000, 1) < 0.5, -1.0, 1.0)
    found = prior_predictive_check(torch.zeros(4), x)
    assert found.verdict == "foreign" and "odd: neighbours" in str(found)


def test_longer_than_there_are_simulations() -> None:
    x = manifold(150, 600)
    assert prior_predictive_check(x[0], x[1:]).verdict == "familiar"
    x_o = x[0] + 1.5 * torch.randn(600, generator=torch.Generator().manual_seed(0))
    assert prior_predictive_check(x_o, x[1:]).verdict == "foreign"


def test_constant_entries() -> None:
    x = torch.cat(
        [torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), torch.full((200, 1), 3.0)], 1
    )
    assert prior_predictive_check(torch.tensor([0.1, -0.1, 3.0]), x).verdict == "familiar"
    found = prior_predictive_check(torch.tensor([0.1, -0.1, 3.1]), x)
    assert found.verdict == "foreign" and found.entries == ("x[2]",)
    assert prior_predictive_check(torch.zeros(1), torch.zeros(100, 1)).verdict == "familiar"


def test_counts_that_are_mostly_zero() -> None:
    with seeded(0):
        x = torch.poisson(torch.full((1000, 20), 0.05))
    assert prior_predictive_check(x[0], x[1:]).verdict == "familiar"


def predicted(
    n: int, *, scale: float = 1.0, shift: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """theta_k ~ N(0, 1), x_k ~ N(theta_k, 1), k < 400: x, new data at the same theta, predictions."""
    with seeded(seed):
        theta = torch.randn(400)
        x, new = theta + torch.randn(400), theta + torch.randn(400)
        draws = x / 2 + 0.5**0.5 * (shift + scale * torch.randn(n, 400))
        return x, new, draws + torch.randn(n, 400)


WRONG = {
    "calibrated": {},
    "over-confident": {"scale": 0.1},
    "under-confident": {"scale": 2.0},
    "biased": {"shift": 0.5},
}


@pytest.mark.parametrize("verdict", WRONG)
def test_new_data_tell_right_and_wrong_apart(verdict: str) -> None:
    _, new, predictions = predicted(500, **WRONG[verdict])
    found = predictive_check(new, predictions, seen=False)
    assert found.verdict == verdict, str(found)
    assert str(found).startswith(f"{verdict}: ")


def test_data_that_were_seen_lie_in_the_middle_and_that_is_right() -> None:
    x, _, predictions = predicted(500)
    assert predictive_check(x, predictions).verdict == "calibrated"
    assert predictive_check(x, predictions, seen=False).verdict == "under-confident"


@pytest.mark.parametrize("seed", range(3))
def test_seen_data_tell_what_is_far_out(seed: int) -> None:
    with seeded(seed):
        x = torch.randn(50)
        predictions = torch.randn(300, 50)
    for verdict, x_o in (("calibrated", x), ("over-confident", 1.6 * x), ("biased", x + 0.7)):
        assert predictive_check(x_o, predictions).verdict == verdict


def of_seeds(n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A triple of `predicted` for each seed, short."""
    return [tuple(part[..., :20] for part in predicted(150, seed=seed)) for seed in range(n)]  # type: ignore[misc]


def test_false_alarms_of_new_data() -> None:
    p = np.array([predictive_check(new, rows, seen=False).p_value for _, new, rows in of_seeds(80)])
    assert 0 < (p < 0.2).mean() < 0.2 + 3 * (0.16 / 80) ** 0.5


def test_a_statistic_of_the_user_s() -> None:
    with seeded(0):
        predictions = torch.randn(500, 100).cumsum(1)
        x_o = torch.randn(100).cumsum(0)
    jumps = {"largest jump": lambda x: x.diff(dim=-1).abs().max(-1).values}
    assert predictive_check(x_o, predictions, statistics=jumps).verdict == "calibrated"
    x_o[50:] += 2 - x_o[50] + x_o[49]
    x_o[50:] += 5
    found = predictive_check(x_o, predictions, statistics=jumps)
    assert "largest jump" in str(found) and found.verdict != "calibrated"
    assert found.measures == ("entry", "joint", "location", "spread", "largest jump")


def test_predictions_of_many_are_tested_by_ranks() -> None:
    with seeded(0):
        theta = torch.randn(400, 1)
        x, new = theta + 0.5 * torch.randn(400, 1), theta + 0.5 * torch.randn(400, 1)
        draws = 0.8 * x + 0.2**0.5 * torch.randn(100, 400, 1)
        narrow = 0.8 * x + 0.05**0.5 * torch.randn(100, 400, 1)
        noise = 0.5 * torch.randn(100, 400, 1)
    assert sbc(new, draws + noise, seed=1).verdict == "calibrated"
    assert sbc(new, narrow + noise, seed=1).verdict == "over-confident"


def test_p_values_by_hand() -> None:
    assert upper(np.array([1.0, 2.0, 3.0, 4.0])) == 0.25
    assert either(np.array([2.0, 3.0, 4.0, 1.0])) == 0.5
    assert either(np.array([1.0, 3.0, 4.0, 2.5, 2.6])) == 1.0


def test_entry_scores_by_hand() -> None:
    rows = np.arange(101.0)[:, None]
    scores = entry_scores(rows)[:, 0]
    assert scores[50] == 0 and scores[99] == pytest.approx(1) and scores[1] == pytest.approx(-1)


def test_distances_by_hand() -> None:
    line = np.arange(20.0)[:, None]
    assert neighbours(line)[[0, 10]].tolist() == [5, 3]
    rows = np.random.default_rng(0).normal(size=(5000, 2)) @ np.array([[1.0, 0.9], [0.0, 0.3]])
    inverse = np.linalg.inv(np.cov(rows.T))
    centred = rows - rows.mean(0)
    expected = np.einsum("ni,ij,nj->n", centred, inverse, centred)
    assert joint(rows) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("check", [predictive_check, prior_predictive_check])
@pytest.mark.parametrize(
    ("x_o", "x", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(50, 3), {}, r"`x`: expected shape \(n, ...\), n >= 100"),
        (torch.zeros(2), torch.zeros(100, 3), {}, r"`x_o`: expected shape \(3,\); got \(2,\)"),
        (torch.full((3,), torch.nan), torch.zeros(100, 3), {}, "`x_o`: expected finite"),
        (torch.zeros(3), torch.full((100, 3), torch.inf), {}, "`x`: expected finite"),
        (torch.zeros(3), torch.zeros(100, 3), {"names": ["a"]}, "`names`: expected 3 names"),
        (torch.zeros(3), torch.zeros(100, 3), {"alpha": 2}, "`alpha`"),
    ],
)
def test_what_is_refused(check: Any, x_o: Tensor, x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(x_o, x, **options)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"a": lambda x: x}, r"`statistics\['a'\]`: expected to give one number for each of 101 rows"),
        ({"a": lambda x: x.sum(1) * torch.nan}, "expected finite"),
        ({"joint": lambda x: x.sum(1)}, "`statistics`: expected names other than"),
    ],
)
def test_refused_statistics(statistics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictive_check(torch.zeros(3), torch.randn(100, 3), statistics=statistics)
