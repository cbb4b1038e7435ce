"""Validators: what passes, what does not, and how the message reads."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from visbi.core.checks import (
    finite_tensor,
    in_interval,
    non_negative_int,
    one_of,
    positive,
    positive_int,
    same_length,
    unknown_keyword,
)

NOT_WHOLE = [0.5, math.inf, -math.inf, math.nan, np.float32("inf"), True, np.True_, "3", None, 1j, [1]]


@pytest.mark.parametrize(
    "value", [1, 7, 3.0, np.int64(4), np.uint8(4), np.float32(5), Fraction(6, 2), 10**400]
)
def test_counts_are_whole_numbers_of_any_make(value):
    for check in (positive_int, non_negative_int):
        out = check("n", value)
        assert type(out) is int
        assert out == value


@pytest.mark.parametrize("check", [positive_int, non_negative_int])
@pytest.mark.parametrize("value", [*NOT_WHOLE, -1, -(10**400)])
def test_what_is_no_count(check, value):
    with pytest.raises(ValueError, match=r"^`n`: expected a whole number >= [01]; got ") as raised:
        check("n", value)
    assert str(raised.value).endswith(f"got {value!r}")


def test_zero_tells_the_two_counts_apart():
    assert non_negative_int("n", 0) == 0
    with pytest.raises(ValueError, match=r"^`n`: expected a whole number >= 1; got 0$"):
        positive_int("n", 0)


@pytest.mark.parametrize("value", [2, 1e-300, np.float64(0.3), np.int32(2), Fraction(1, 3)])
def test_positive_numbers(value):
    out = positive("rate", value)
    assert type(out) is float
    assert out == float(value)


@pytest.mark.parametrize("value", [0, -1e-300, math.inf, math.nan, True, "1", None, torch.ones(2)])
def test_what_is_not_positive(value):
    with pytest.raises(ValueError, match=r"^`rate`: expected a finite number > 0; got "):
        positive("rate", value)


@pytest.mark.parametrize(
    ("closed", "low", "high"),
    [("", False, False), ("l", True, False), ("r", False, True), ("lr", True, True)],
)
def test_ends_of_an_interval(closed, low, high):
    for end, included in ((0.0, low), (1, high)):
        if included:
            assert in_interval("gamma", end, 0, 1, closed=closed) == end
        else:
            with pytest.raises(ValueError, match="`gamma`: expected a number in "):
                in_interval("gamma", end, 0, 1, closed=closed)
    assert in_interval("gamma", np.float32(0.5), 0, 1, closed=closed) == 0.5


def test_an_interval_is_written_as_in_mathematics():
    with pytest.raises(ValueError, match=r"^`gamma`: expected a number in \(0, 1\]; got 1.5$"):
        in_interval("gamma", 1.5, 0, 1, closed="r")
    with pytest.raises(ValueError, match=r"^`gamma`: expected a number in \[0, inf\); got nan$"):
        in_interval("gamma", math.nan, 0, math.inf, closed="l")


def test_one_of():
    assert one_of("q", "maf", ["maf", "nsf"]) == "maf"
    for value in ("MAF", None, 3, ["maf"], np.array(["maf", "nsf"])):
        with pytest.raises(ValueError, match=r"^`q`: expected one of 'maf', 'nsf'; got "):
            one_of("q", value, iter(["maf", "nsf"]))


def test_finite_tensor_takes_what_torch_takes():
    x = torch.ones(2)
    assert finite_tensor("x_o", x) is x
    assert finite_tensor("x_o", [1, 2]).tolist() == [1, 2]
    assert finite_tensor("x_o", np.ones((2, 3))).dtype is torch.float64
    assert finite_tensor("x_o", torch.ones(2, device="meta")).device.type == "meta"


def test_finite_tensor_refuses_nan_and_inf():
    with pytest.raises(ValueError, match=r"^`x_o`: expected finite numbers; got 2 of 3 NaN or Inf$"):
        finite_tensor("x_o", [math.nan, 1.0, math.inf])


@pytest.mark.parametrize(("value", "got"), [("three", "str"), (None, "NoneType"), ([[1], [1, 2]], "list")])
def test_finite_tensor_refuses_what_is_no_array(value, got):
    with pytest.raises(TypeError, match=rf"^`x_o`: expected a tensor; got {got}$"):
        finite_tensor("x_o", value)


def test_same_length():
    same_length("theta", torch.ones(3, 2), "x", torch.ones(3))
    with pytest.raises(ValueError, match=r"^`theta` and `x`: expected equally many rows; got 3 and 4$"):
        same_length("theta", torch.ones(3, 2), "x", torch.ones(4, 1))


def test_unknown_keyword_lists_what_is_known_when_nothing_is_near():
    error = unknown_keyword("zzz", ["gamma", "alpha"], "train()")
    assert str(error) == "`zzz`: expected a keyword of train(); got an unknown one. Known: alpha, gamma."
