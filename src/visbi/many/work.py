"""The piece of work: fit one chunk of observations, under the chunk's own seed.

A chunk runs in one thread and its seed is derived from its number, so that neither the number of workers,
nor the backend, nor what was finished earlier changes a digit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.random import seeded, spawn_seeds
from visbi.fitting.config import TrainOptions
from visbi.fitting.state import AutoFit, SingleFit
from visbi.fitting.together import fit_auto_together
from visbi.many.record import Record, no_fit, recorded
from visbi.posterior import VIPosterior
from visbi.simulators.generators import all_generators

__all__ = ["Job", "Payload", "fit_chunk", "records_of", "run_chunk"]

Payload = list[tuple[Any, Mapping[str, np.ndarray]]]
"""Records as they travel: JSON values and NumPy arrays, which every joblib backend can send."""


@dataclass(frozen=True)
class Job:
    """What all chunks share.

    Attributes:
        template: an untrained posterior: potential, prior, coordinates, family, divergence.
        options: of every fit, without a seed.
        in_rows: whether the potential takes rows of theta and x.
        x_is_iid: whether the rows within an observation are independent trials.
    """

    template: VIPosterior
    options: TrainOptions
    in_rows: bool
    x_is_iid: bool

    @property
    def side_by_side(self) -> bool:
        """Whether the observations of a chunk are fitted in common calls."""
        return self.template.automatic and self.in_rows and self.options.retrain_from_scratch

    def observations(self, x: Tensor) -> list[Tensor]:
        """Each of x (F, ...) as `VIPosterior.train` takes it."""
        return list(x) if self.x_is_iid else list(x.split(1))


def run_chunk(index: int, job: Job, x: np.ndarray, seed: int) -> tuple[int, Payload]:
    """Fit the observations x (F, ...) of chunk `index`."""
    with all_generators(seed), _one_thread():
        records = _fitted(job, torch.from_numpy(x).to(job.template.coordinates.low.device), seed)
    return index, [(r.content, {name: t.numpy() for name, t in r.tensors.items()}) for r in records]


def records_of(payload: Payload) -> list[Record]:
    """The records again."""
    return [
        Record(content, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
        for content, arrays in payload
    ]


def fit_chunk(job: Job, x: Tensor, seed: int) -> list[SingleFit | AutoFit | str]:
    """A fit with its report for each of x (F, ...), finite; or why there is none."""
    observations, seeds = job.observations(x), spawn_seeds(seed, len(x))
    together = _together(job, observations, seed) if job.side_by_side and len(x) > 1 else [None] * len(x)
    each = zip(together, observations, seeds, strict=True)
    return [_fit(job, x_o, its_seed) if fit is None else fit for fit, x_o, its_seed in each]


class _Raised(RuntimeError):  # noqa: N818  (it was not us)
    """What a potential raised at several observations; which of them is to blame is found by trying each."""


def _together(job: Job, x: list[Tensor], seed: int) -> list[AutoFit | None]:
    """The fits that a climb side by side found; None where there is none yet."""
    potential, rows = job.template.potential_fn, torch.cat(x)

    def log_p(theta: Tensor, which: Tensor) -> Tensor:
        repeated = rows[which].repeat_interleave(theta.shape[1], 0)
        try:
            values = potential.evaluate(theta.flatten(0, 1), repeated, x_is_iid=False)
        except Exception as error:
            raise _Raised(str(error)) from error
        return values.reshape(theta.shape[:2])

    try:
        return fit_auto_together(log_p, job.template.coordinates, x, replace(job.options, seed=seed))
    except _Raised:
        return [None] * len(x)


def _fit(job: Job, x_o: Tensor, seed: int) -> SingleFit | AutoFit | str:
    options = replace(job.options, seed=seed)
    posterior = job.template.sibling()
    try:
        posterior.train(x_o, **vars(options))
        with seeded(seed):
            _ = posterior.report  # made on first use: here, under the seed
    except Exception as error:  # noqa: BLE001 - a user's potential may raise anything, and it is reported
        return f"{type(error).__name__}: {error}"
    assert isinstance(posterior.fit, SingleFit | AutoFit)
    return posterior.fit


def _fitted(job: Job, x: Tensor, seed: int) -> list[Record]:
    finite = torch.isfinite(x.flatten(1)).all(1)
    outcomes = iter(fit_chunk(job, x[finite], seed) if bool(finite.any()) else [])
    records = []
    for row, good in zip(x, finite.tolist(), strict=True):
        if not good:
            bad = int((~row.isfinite()).sum())
            records.append(no_fit(violation("x", "finite numbers", f"{bad} of {row.numel()} NaN or Inf")))
            continue
        fit = next(outcomes)
        if isinstance(fit, str):
            records.append(no_fit(fit))
        elif "interrupted" in (fit.trace.stop_reason, fit.report.stop_reason):
            raise KeyboardInterrupt  # half a fit is none of many
        else:
            records.append(recorded(job.template, fit))
    return records


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch in one thread: workers share the cores, and sums come out the same wherever they are made."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
