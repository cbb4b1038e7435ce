"""How a simulator wants to be called: one theta or a batch, torch or NumPy, with `rng` or `seed`.

`detect` finds out with a few tiny calls. The rules:

1. *torch or NumPy.* The simulator is shown a torch tensor first. If it raises, or answers with
   something other than a tensor, it gets NumPy arrays (float64).
2. *One theta or a batch.* It is called with 2 and with 8 rows; the answers must have 2 and 8 rows and
   the same shape per row. If it refuses a single theta, it takes batches. If it takes both,
   - the answer to a single theta must have the shape of a row (up to axes of length one); where it has
     not, nobody can tell which was meant, and the user is asked to say so;
   - if it is deterministic, the batch must give the very values that the single calls give;
   - if it is random, equal rows of theta must not get equal x (that would be one noise for all rows).
   Whatever fails here is called with one theta at a time. (Not seen: random simulators that mix the rows
   of a batch, such as a softmax over the first axis plus noise. Say `batched=False` for those.)
3. *Randomness.* A parameter named `rng` receives a NumPy Generator, one named `seed` an int.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.simulators.generators import all_generators, reseed

__all__ = ["CallStyle", "Simulator", "call", "detect"]

Simulator: TypeAlias = Callable[..., Any]
"""theta (D,) or (B, D), torch or NumPy -> x, as tensor, array, list or number."""

_PROBE_ROWS = (2, 8)
_ATTEMPTS = 8


@dataclass(frozen=True)
class CallStyle:
    """What a simulator takes.

    Attributes:
        batched: thetas come as (B, D) and x as (B, ...); else (D,) and (...).
        numpy: thetas come as NumPy float64 arrays; else as torch tensors.
        keywords: those of "rng" and "seed" that the simulator has a parameter for.
    """

    batched: bool
    numpy: bool
    keywords: tuple[str, ...] = ()


def call(simulator: Simulator, style: CallStyle, theta: Tensor, seed: int) -> Any:
    """One call under `seed`, which every generator gets; must run inside `all_generators`."""
    values = {"rng": lambda: np.random.default_rng(seed), "seed": lambda: seed}
    keywords = {name: values[name]() for name in style.keywords}
    # a copy, so that a simulator that writes into theta harms nothing
    argument = theta.numpy().astype(np.float64) if style.numpy else theta.clone()
    reseed(seed)
    return simulator(argument, **keywords)


def detect(simulator: Simulator, theta: Tensor, seed: int, *, batched: bool | None = None) -> CallStyle:
    """The call style of `simulator`, by the rules at the top of this file.

    Args:
        simulator: theta -> x.
        theta: rows to try, (n, D); further rows are tried only where earlier ones fail.
        seed: for the trial runs.
        batched: what the user says; None to find out.

    Raises:
        ValueError: it cannot be found out.

    >>> detect(lambda t: t * torch.randn_like(t), torch.rand(4, 2), 0)
    CallStyle(batched=True, numpy=False, keywords=())
    >>> detect(lambda t, rng: rng.normal(t[0], t[1]), torch.rand(4, 2), 0)
    CallStyle(batched=False, numpy=True, keywords=('rng',))
    """
    keywords = _keywords(simulator)
    shapes = (True, False) if batched is None else (batched,)
    # the last kind, torch with any answer, serves torch simulators that return a float or a list
    kinds = ((False, True), (True, False), (False, False))
    with all_generators(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="__array_wrap__")  # NumPy code that half works on tensors
        for first in range(min(_ATTEMPTS, theta.shape[0])):
            rows = theta.roll(-first, 0)
            for is_batched in shapes:
                for numpy, want_tensor in kinds:
                    style = CallStyle(is_batched, numpy, keywords)
                    trial = _Trial(simulator, style, rows, want_tensor)
                    if trial.fits(certain=batched is not None):
                        return style
    return CallStyle(bool(batched), False, keywords)


@dataclass(frozen=True)
class _Trial:
    """One style, tried on one choice of rows."""

    simulator: Simulator
    style: CallStyle
    theta: Tensor
    want_tensor: bool

    def fits(self, *, certain: bool) -> bool:
        """Whether the simulator answers as this style says; `certain` skips the doubts about batches."""
        if not self.style.batched or certain:
            return self._answer(self.theta[:1] if self.style.batched else self.theta[0]) is not None
        i, j = self.theta[0], self.theta[1 % len(self.theta)]
        few, many = _PROBE_ROWS
        small = self._answer(torch.stack([i, j]))
        if small is None or small.shape[:1] != (few,):
            return False
        large = self._answer(torch.stack([i, j] + [i] * (many - few)))
        if large is None or large.shape != (many, *small.shape[1:]):
            return False
        return self._rows_are_runs(large, i, j)

    def _rows_are_runs(self, x: np.ndarray, i: Tensor, j: Tensor) -> bool:
        one, again, other = self._answer(i), self._answer(i, seed=1), self._answer(j)
        if one is None or again is None or other is None:
            return True  # it does not take a single theta
        if _without_ones(one.shape) != _without_ones(x.shape[1:]):
            shapes = f"{len(x)} thetas give x {x.shape}, one theta gives x {one.shape}"
            raise ValueError(violation("batched", f"True or False, for a simulator where {shapes}", "None"))
        if np.array_equal(one, again, equal_nan=True):
            single = np.stack([one, other]).reshape(2, *x.shape[1:])
            return np.allclose(x[:2], single, rtol=1e-3, atol=1e-5, equal_nan=True)
        return not all(np.array_equal(x[0], row, equal_nan=True) for row in x[2:])

    def _answer(self, theta: Tensor, seed: int = 0) -> np.ndarray | None:
        """x as an array, or None where the simulator raises or answers in another kind."""
        try:
            x = call(self.simulator, self.style, theta, seed)
            if self.want_tensor and not isinstance(x, Tensor):
                return None
            return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
        except Exception:  # noqa: BLE001 - foreign code may raise anything; here that is an answer
            return None


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [length for length in shape if length != 1]


def _keywords(simulator: Simulator) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(simulator).parameters.values())[1:]
    except (TypeError, ValueError):  # some builtins have no signature
        return ()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return tuple(name for name in ("rng", "seed") if name in by_name)
