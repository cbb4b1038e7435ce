"""Whether x has a density: flows describe continuous columns only."""

from torch import Tensor

from visbi.core.checks import violation

__all__ = ["check_continuous", "check_not_discrete"]

_LOOK_AT = 10_000  # rows
_FEWEST = 20  # rows from which repeated values tell something
_REPEATED = 0.05  # share of rows that repeat an earlier value of their column


def check_continuous(x: Tensor) -> None:
    """Raise ValueError if a column of x (N, n) is constant, whole-numbered or full of repeated values.

    >>> import torch
    >>> check_continuous(torch.tensor([[0.5, 1.0], [0.25, 3.0]]))
    Traceback (most recent call last):
    ValueError: `x`: expected columns with a density; got whole, repeated or constant values in column 1. ...
    """
    rows = x[:_LOOK_AT]
    if rows.shape[0] < 2:
        return
    suspects = _discrete(rows)
    if rows.shape[0] >= _FEWEST:
        repeated = 1 - _distinct(rows) / rows.shape[0] > _REPEATED
        if repeated.any():  # whole simulations that occur twice say nothing about a column
            unique = rows.unique(dim=0)
            repeated = 1 - _distinct(unique) / unique.shape[0] > _REPEATED
        suspects |= repeated
    _refuse(suspects)


def check_not_discrete(x: Tensor) -> None:
    """Raise ValueError if a column of the first of many x, (N, n), is constant or whole-numbered.

    Fewer than 20 say nothing, and which values come again is told by all of them alone.
    """
    if len(x) >= _FEWEST:
        _refuse(_discrete(x))


def _discrete(rows: Tensor) -> Tensor:
    return (rows == rows.round()).all(0) | (_distinct(rows) == 1)


def _refuse(suspects: Tensor) -> None:
    if suspects.any():
        columns = suspects.nonzero().flatten().tolist()
        listed = ", ".join(map(str, columns[:8])) + (", ..." if len(columns) > 8 else "")
        got = f"whole, repeated or constant values in column {listed}"
        raise ValueError(
            f"{violation('x', 'columns with a density', got)}. Discrete and mixed x are not supported yet: "
            "drop constant columns, use fit_ratio, or add uniform noise on (0, 1) to counts."
        )


def _distinct(rows: Tensor) -> Tensor:
    """Number of different values in each column."""
    ordered = rows.sort(0).values
    return 1 + (ordered[1:] != ordered[:-1]).sum(0)
