"""Validators for arguments, and the one form their messages have.

Every message reads "`name`: expected WHAT; got WHAT", so that a user sees the argument, the rule and
the value that broke it in one line.
"""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "checked_shape",
    "finite_tensor",
    "floating_tensor",
    "in_interval",
    "non_negative_int",
    "one_of",
    "positive",
    "positive_int",
    "same_length",
    "unknown_keyword",
    "violation",
]


def violation(name: str, expected: str, got: object) -> str:
    """The text of every argument error.

    >>> violation("alpha", "a number > 0", -1)
    '`alpha`: expected a number > 0; got -1'
    """
    return f"`{name}`: expected {expected}; got {got}"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def _is_whole(value: Any) -> bool:
    finite = _is_number(value) and (isinstance(value, Integral) or math.isfinite(value))
    return finite and value == int(value)


def positive_int(name: str, value: Any) -> int:
    """`value` as an int of at least 1, or ValueError."""
    if not (_is_whole(value) and value >= 1):
        raise ValueError(violation(name, "a whole number >= 1", repr(value)))
    return int(value)


def non_negative_int(name: str, value: Any) -> int:
    """`value` as an int of at least 0, or ValueError."""
    if not (_is_whole(value) and value >= 0):
        raise ValueError(violation(name, "a whole number >= 0", repr(value)))
    return int(value)


def positive(name: str, value: Any) -> float:
    """`value` as a finite float above 0, or ValueError."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(violation(name, "a finite number > 0", repr(value)))
    return float(value)


def in_interval(name: str, value: Any, low: float, high: float, *, closed: str = "") -> float:
    """`value` as a float between `low` and `high`; `closed` holds "l" and "r" for included ends."""
    above = _is_number(value) and (value >= low if "l" in closed else value > low)
    below = _is_number(value) and (value <= high if "r" in closed else value < high)
    if not (above and below):
        interval = f"{'[' if 'l' in closed else '('}{low:g}, {high:g}{']' if 'r' in closed else ')'}"
        raise ValueError(violation(name, f"a number in {interval}", repr(value)))
    return float(value)


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """`value` if it is one of `options` (case counts), or a ValueError that lists them."""
    known = list(options)
    if not (isinstance(value, str) and value in known):
        raise ValueError(violation(name, f"one of {', '.join(map(repr, known))}", repr(value)))
    return value


def finite_tensor(name: str, value: Any) -> Tensor:
    """`value` as a tensor without NaN or Inf, or ValueError (TypeError if it is no array at all)."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(violation(name, "a tensor", type(value).__name__)) from error
    if tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(violation(name, "finite numbers", f"{bad} of {tensor.numel()} NaN or Inf"))
    return tensor


def floating_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """`value` as a tensor of floating numbers on the device of `like`; whole ones take its dtype.

    Raises:
        TypeError: it is no array.
    """
    try:
        tensor = torch.as_tensor(value).to(like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(violation(name, "a tensor", type(value).__name__)) from error
    return tensor if tensor.is_floating_point() else tensor.to(like.dtype)


def checked_shape(name: str, value: Any) -> torch.Size:
    """`value` as a shape, or TypeError; ValueError if a number in it is negative.

    >>> checked_shape("sample_shape", [2, 3])
    torch.Size([2, 3])
    """
    try:
        shape = torch.Size(value)
    except TypeError as error:
        raise TypeError(violation(name, "a shape such as (100,)", repr(value))) from error
    if any(n < 0 for n in shape):
        raise ValueError(violation(name, "no negative number", tuple(shape)))
    return shape


def same_length(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Raise ValueError unless `a` and `b` have equally many rows."""
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            violation(f"{name_a}` and `{name_b}", "equally many rows", f"{a.shape[0]} and {b.shape[0]}")
        )


def unknown_keyword(name: str, known: Iterable[str], where: str) -> TypeError:
    """The TypeError for a keyword that nothing knows; suggests the nearest known one.

    >>> print(unknown_keyword("n_partcles", ["n_particles", "gamma"], "train()"))
    `n_partcles`: expected a keyword of train(); got an unknown one. Did you mean `n_particles`?
    """
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(options)}."
    return TypeError(f"{violation(name, f'a keyword of {where}', 'an unknown one')}. {hint}")
