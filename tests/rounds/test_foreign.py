"""An x_o that is like no run of the prior is told, whatever the certificate of q says."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from visbi import BoxUniform
from visbi.certificate import prior_predictive_check
from visbi.certificate.ranks import ALPHA
from visbi.core.random import seeded
from visbi.estimators import TrainingOptions
from visbi.rounds import Inference, infer
from visbi.rounds.foreign import among_runs
from visbi.simulators import Simulations

PRIOR = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
FAR, NEAR = torch.tensor([30.0, -25.0]), torch.tensor([0.3, -0.4])


def simulator(theta: Tensor) -> Tensor:
    return theta + 0.3 * torch.randn_like(theta)


def small(x_o: Tensor, model: Any = simulator, **changes: Any) -> Inference:
    options: dict[str, Any] = dict(
        simulations=(200, 100),
        q="gaussian",
        ensemble=1,
        num_transforms=1,
        hidden_features=8,
        options=TrainingOptions(max_epochs=2),
        train={"max_num_iters": 5, "quality_control": False},
        seed=0,
        show_progress_bar=False,
    )
    return infer(model, PRIOR, x_o, **{**options, **changes})


def runs_of(x: Tensor) -> Simulations:
    return Simulations(torch.zeros(len(x), 1), x, torch.zeros(0, 1), (), None)


def test_a_foreign_x_o_is_told() -> None:
    """By a warning, in what `infer` returns, and in what that prints; at the level that `calibrate` has."""
    with pytest.warns(UserWarning, match=r"foreign: .*entries off: x\[0\], x\[1\]") as caught:
        found = small(FAR)
    assert [each.filename for each in caught] == [__file__]  # the line that called, not one of ours
    assert found.prior_check is not None and found.prior_check.verdict == "foreign"
    assert found.prior_check.alpha == ALPHA
    assert f"x_o among the prior's simulations: {found.prior_check}" in str(found)


def test_a_familiar_one_is_compared_with_the_first_round_s_runs_alone() -> None:
    """Later runs are near x_o as the networks see it: among them p would mean nothing."""
    found = small(NEAR)
    first = prior_predictive_check(NEAR, found.simulations[0].x)
    assert found.prior_check is not None and found.prior_check.verdict == "familiar"
    assert found.prior_check.n == 200 and str(found.prior_check) == str(first)
    assert "x_o among the prior's simulations: familiar" in str(found)


def test_it_is_told_again_when_a_store_goes_on(tmp_path: Path) -> None:
    """The first round's runs are read, not made, and say the same."""

    def never(theta: Tensor) -> Tensor:
        raise AssertionError("a finished run was repeated")

    never.__qualname__ = simulator.__qualname__
    said = []
    with pytest.warns(UserWarning, match="foreign"):
        said.append(str(small(FAR, store=tmp_path).prior_check))
    with (
        pytest.warns(UserWarning, match="whose code was another"),
        pytest.warns(UserWarning, match="foreign"),
    ):
        said.append(str(small(FAR, never, store=tmp_path).prior_check))
    assert said[0] == said[1]


def test_runs_that_failed_are_not_compared_with() -> None:
    def fails(theta: Tensor) -> Tensor:
        return torch.where(theta[:, :1] > 1, torch.nan, simulator(theta))

    found = small(NEAR, fails)
    assert found.prior_check is not None and found.simulations[0].n_failed > 0
    assert found.prior_check.n == len(found.simulations[0]) < 200


def test_only_runs_that_are_learnt_from_count() -> None:
    """Among runs of which most are far away, an x_o beside the usable ones would look familiar."""

    def jumps(theta: Tensor) -> Tensor:
        return torch.where(theta[:, :1] > 0, 100.0, 0.0) * torch.randn_like(theta) + simulator(theta)

    x_o = torch.tensor([5.0, 5.0])
    with pytest.warns(UserWarning, match="foreign"):
        found = small(x_o, jumps, simulations=(400,), usable=lambda x: (x.abs() < 6).all(-1))
    assert found.prior_check is not None and 100 <= found.prior_check.n < 300
    assert prior_predictive_check(x_o, found.simulations[0].x).verdict == "familiar"


def test_few_runs_say_nothing() -> None:
    """With less than 100, p cannot be small enough; that is said, and no error."""
    found = small(FAR, simulations=(99, 100))
    assert found.prior_check is None
    assert "x_o among the prior's simulations: not compared (fewer than 100 runs, or a very long x)" in str(
        found
    )


def test_a_long_x_is_compared_with_fewer_runs() -> None:
    """Time and memory stay bounded, and what is odd is found."""
    with seeded(0):
        x = torch.randn(400, 40, 100)
    x_o = x[:1].clone()
    x_o[0, 7, 3] = 80.0
    check = among_runs(x_o, runs_of(x[1:]))
    assert check is not None and check.n == 262 and check.entries == ("x[7, 3]",)


def test_a_very_long_x_is_not_compared() -> None:
    """A hundred runs of 100,000 numbers would take two minutes."""
    assert among_runs(torch.randn(1, 100_000), runs_of(torch.randn(100, 100_000))) is None


def test_right_ones_are_called_foreign_once_in_twenty_at_most() -> None:
    with seeded(0):
        x = torch.randn(200, 150, 3)
    alarms = 0
    for some in x:
        check = among_runs(some[:1], runs_of(some[1:]))
        assert check is not None
        alarms += check.verdict == "foreign"
    assert alarms <= 18  # of 200, expected 10 at most: five chances in a thousand


def test_only_what_is_foreign_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(NEAR, simulations=(150,))
