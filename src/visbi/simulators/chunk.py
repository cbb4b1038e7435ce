"""One piece of work: run a simulator on some thetas under fixed seeds, and keep failures apart.

A run has failed if it raised or if its x holds NaN or Inf. A simulator of single thetas gets one seed a
run. A batched one gets one seed a chunk; if the batch raises, its rows run one at a time, each under a
seed of its own, so that one bad theta does not cost the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.random import spawn_seeds
from visbi.simulators.calling import CallStyle, Simulator, call
from visbi.simulators.generators import all_generators

__all__ = ["ChunkResult", "check_shape", "run_chunk"]

# NumPy goes between processes, since every joblib backend can send it


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """What came of the rows of one chunk.

    Attributes:
        x: the finite outputs, (K, ...), in the order of their thetas; None if there is none.
        succeeded: which rows they are, (B,) of bool.
        failures: for each other row, why.
    """

    x: np.ndarray | None
    succeeded: np.ndarray
    failures: tuple[str, ...]


def run_chunk(simulator: Simulator, style: CallStyle, theta: np.ndarray, seeds: list[int]) -> ChunkResult:
    """Run `simulator` on the rows of `theta`.

    Args:
        simulator: theta -> x.
        style: how it wants to be called.
        theta: (B, D), floating.
        seeds: one for the chunk if batched, else one for each row.

    Raises:
        ValueError: the rows' outputs differ in shape, or a batch came back with another length.
    """
    thetas = torch.tensor(theta)
    with all_generators(seeds[0]):
        outcomes = (
            _batch(simulator, style, thetas, seeds[0])
            if style.batched
            else _rows(simulator, style, thetas, seeds)
        )
    return _sort_out(outcomes)


def check_shape(expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    """Raise ValueError unless two runs' outputs have equal shapes."""
    if expected != got:
        rule = f"x of one shape from every run, here {expected} (let a failed run raise or return NaN)"
        raise ValueError(violation("simulator", rule, f"{got}"))


def _batch(simulator: Simulator, style: CallStyle, theta: Tensor, seed: int) -> list[Tensor | str]:
    try:
        x = _as_tensor(call(simulator, style, theta, seed), theta.dtype)
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything, and it is reported
        if len(theta) == 1:
            return [_text(error)]
        rows = zip(theta, spawn_seeds(seed, len(theta)), strict=True)
        return [_batch(simulator, style, row[None], row_seed)[0] for row, row_seed in rows]
    if x.shape[:1] != (len(theta),):
        raise ValueError(
            violation("simulator", f"x with {len(theta)} rows for as many thetas", f"shape {tuple(x.shape)}")
        )
    return list(x if x.ndim > 1 else x[:, None])


def _rows(simulator: Simulator, style: CallStyle, theta: Tensor, seeds: list[int]) -> list[Tensor | str]:
    outcomes: list[Tensor | str] = []
    for row, seed in zip(theta, seeds, strict=True):
        try:
            outcomes.append(torch.atleast_1d(_as_tensor(call(simulator, style, row, seed), theta.dtype)))
        except Exception as error:  # noqa: BLE001 - as above
            outcomes.append(_text(error))
    return outcomes


def _sort_out(outcomes: list[Tensor | str]) -> ChunkResult:
    shapes = [tuple(x.shape) for x in outcomes if isinstance(x, Tensor)]
    for shape in shapes:
        check_shape(shapes[0], shape)
    reasons = [x if isinstance(x, str) else _not_finite(x) for x in outcomes]
    good = [x for x, reason in zip(outcomes, reasons, strict=True) if isinstance(x, Tensor) and not reason]
    return ChunkResult(
        x=torch.stack(good).numpy() if good else None,
        succeeded=np.array([not reason for reason in reasons]),
        failures=tuple(reason for reason in reasons if reason),
    )


def _not_finite(x: Tensor) -> str:
    bad = int((~x.isfinite()).sum())
    return f"{bad} of {x.numel()} values NaN or Inf" if bad else ""


def _as_tensor(x: object, dtype: torch.dtype) -> Tensor:
    tensor = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
    return tensor.detach().to("cpu", dtype)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
