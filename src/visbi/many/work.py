"""The piece of work: fit one chunk of observations, under the chunk's own seed.

A chunk runs in one thread and its seed is derived from its number, so that neither the number of workers,
nor the backend, nor what was finished earlier changes a digit.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.parallel import one_thread
from visbi.core.random import seeded, spawn_seeds
from visbi.families.base import LinkedFamily
from visbi.fitting.abreast import fit_abreast, goes_abreast
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import make_optimizer
from visbi.fitting.single import Problem, placed_alike
from visbi.fitting.state import AutoFit, SingleFit
from visbi.fitting.together import JointDensity, fit_auto_together
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

    @cached_property
    def side_by_side(self) -> bool:
        """Whether the observations of a chunk are fitted in common calls."""
        if not (self.in_rows and self.options.retrain_from_scratch):
            return False
        return self.template.automatic or goes_abreast(self.template.q, self.template.vi_method, self.options)

    def observations(self, x: Tensor) -> list[Tensor]:
        """Each of x (F, ...) as `VIPosterior.train` takes it."""
        return list(x) if self.x_is_iid else list(x.split(1))


def run_chunk(index: int, job: Job, x: np.ndarray, seed: int) -> tuple[int, Payload]:
    """Fit the observations x (F, ...) of chunk `index`."""
    with all_generators(seed), one_thread():
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
    together: Sequence[SingleFit | AutoFit | str | None] = [None] * len(x)
    if job.side_by_side and len(x) > 1:
        with contextlib.suppress(_Raised):  # then each is tried alone
            if job.template.automatic:
                together = _together(job, observations, seed)
            else:
                together = _abreast(job, observations, seeds)
    each = zip(together, observations, seeds, strict=True)
    return [_fit(job, x_o, its_seed) if fit is None else fit for fit, x_o, its_seed in each]


class _Raised(RuntimeError):  # noqa: N818  (it was not us)
    """What a potential raised at several observations; which of them is to blame is found by trying each."""


def _joint(job: Job, x: list[Tensor]) -> JointDensity:
    """The potentials of all observations in one call."""
    potential, rows = job.template.potential_fn, torch.cat(x)

    def log_p(theta: Tensor, which: Tensor) -> Tensor:
        repeated = rows[which].repeat_interleave(theta.shape[1], 0)
        try:
            values = potential.evaluate(theta.flatten(0, 1), repeated, x_is_iid=False)
        except Exception as error:
            raise _Raised(str(error)) from error
        return values.reshape(theta.shape[:2])

    return log_p


def _together(job: Job, x: list[Tensor], seed: int) -> list[AutoFit | None]:
    """The fits that a climb side by side found; None where there is none yet."""
    return fit_auto_together(_joint(job, x), job.template.coordinates, x, replace(job.options, seed=seed))


def _abreast(job: Job, x: list[Tensor], seeds: list[int]) -> list[SingleFit | AutoFit | str]:
    """The fits of a named family, trained abreast, with their reports."""
    template, log_p = job.template, _joint(job, x)
    problem = Problem(_no_potential, template.prior.log_prob, template.coordinates)
    assert isinstance(template.q, LinkedFamily)
    families = placed_alike(template.q, problem, job.options, len(x))
    traces = fit_abreast(families, log_p, job.options)
    fits = []
    for family, trace, x_o, seed in zip(families, traces, x, seeds, strict=True):
        options = replace(job.options, seed=seed)
        method = template.vi_method
        fit = SingleFit(family, x_o, trace, options, method, *make_optimizer(family, options))
        fits.append(_with_report(template.sibling(fit), seed))
    return fits


def _no_potential(theta: Tensor) -> Tensor:
    raise AssertionError("where such fits start does not depend on the potential")


def _with_report(posterior: VIPosterior, seed: int) -> SingleFit | AutoFit | str:
    """The posterior's fit with its report, made under the seed, or why there is none."""
    try:
        with seeded(seed):
            _ = posterior.report  # made on first use: here, under the seed
    except Exception as error:  # noqa: BLE001 - a user's potential may raise anything, and it is reported
        return f"{type(error).__name__}: {error}"
    assert isinstance(posterior.fit, SingleFit | AutoFit)
    return posterior.fit


def _fit(job: Job, x_o: Tensor, seed: int) -> SingleFit | AutoFit | str:
    options = replace(job.options, seed=seed)
    posterior = job.template.sibling()
    try:
        posterior.train(x_o, **vars(options))
    except Exception as error:  # noqa: BLE001 - a user's potential may raise anything, and it is reported
        return f"{type(error).__name__}: {error}"
    return _with_report(posterior, seed)


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
