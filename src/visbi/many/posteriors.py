"""`Posteriors`: a posterior for each of many observations, as a sequence."""

import operator
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from visbi.certificate.report import Report
from visbi.core.checks import checked_shape, floating_tensor, one_of, violation
from visbi.core.folders import as_folder
from visbi.core.types import Shape
from visbi.many.draws import corrected
from visbi.many.record import NOT_YET, Record, no_fit
from visbi.many.store import FitStore, read_fits_manifest
from visbi.many.work import Job
from visbi.posterior import VIPosterior

__all__ = ["Posteriors"]

_COLUMNS = (
    "status",
    "khat",
    "ess_fraction",
    "total_variation",
    "log_evidence",
    "log_evidence_se",
    "rung",
    "n_values",
    "n_gradients",
    "seconds",
    "seed",
    "sentence",
)
_STATUSES = ("ok", "corrected", "suspect", "failed")
_ROWS = 64  # records in a file
_SHOWN = 8  # failing observations named by `str`


@dataclass(frozen=True, eq=False)
class Posteriors(Sequence[VIPosterior]):
    """One posterior for each observation: `fit_many` makes it.

    `posteriors[i]` is the `VIPosterior` fitted to `posteriors.x[i]`; `posteriors[2:5]`, `posteriors[[4, 0]]`
    and `posteriors[posteriors.x[:, 0] > 0]` are some of them, and a loop goes over all. An observation
    without a fit (x not finite, or a potential that raised) is among `failed`; asking for its posterior is a
    ValueError, in which a loop ends, too, and its draws and densities are NaN.

    Attributes:
        job: what the fits share.
        x: (n_obs, ...) the observations.
        records: what came of each.
    """

    job: Job
    x: Tensor
    records: tuple[Record, ...]
    _made: dict[int, VIPosterior] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> VIPosterior: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | Tensor) -> "Posteriors": ...

    def __getitem__(
        self, index: int | slice | Sequence[int] | np.ndarray | Tensor
    ) -> "VIPosterior | Posteriors":
        if _names_several(index):
            rows = range(len(self))[index] if isinstance(index, slice) else _rows(index, len(self))
            chosen = torch.tensor(list(rows), dtype=torch.long, device=self.x.device)
            return Posteriors(self.job, self.x[chosen], tuple(self.records[i] for i in rows))
        try:
            i = range(len(self))[operator.index(index)]  # type: ignore[arg-type]
        except TypeError as error:
            expected = "a number, a slice, numbers, or a bool for each"
            raise TypeError(violation("index", expected, repr(index))) from error
        if i not in self._made:
            (x_o,) = self.job.observations(self.x[i : i + 1])
            self._made[i] = self.records[i].posterior(self.job.template, x_o, self.job.options)
        return self._made[i]

    # -- how good they are -------------------------------------------------------------------------------

    @cached_property
    def reports(self) -> tuple[Report, ...]:
        """The certificate of each fit."""
        return tuple(record.report for record in self.records)

    @property
    def failed(self) -> Tensor:
        """Indices (K,) of observations whose status is "failed"; `x[failed]` are those."""
        return self._of_status("failed")

    @property
    def suspect(self) -> Tensor:
        """Indices (K,) of those whose status is "suspect"."""
        return self._of_status("suspect")

    def _of_status(self, status: str) -> Tensor:
        found = [i for i, report in enumerate(self.reports) if report.status == status]
        return torch.tensor(found, dtype=torch.long)

    def table(self) -> list[dict[str, Any]]:
        """A row for each observation: its index and what its report says, ready for `pandas.DataFrame`."""
        return [
            {"index": i, **{name: getattr(report, name) for name in _COLUMNS}}
            for i, report in enumerate(self.reports)
        ]

    def __str__(self) -> str:
        """At most ten lines."""
        counts = Counter(report.status for report in self.reports)
        said = ", ".join(f"{counts[status]} {status}" for status in _STATUSES if counts[status])
        lines = [f"{len(self)} posteriors over {self._dim} parameters: {said or 'none'}"]
        rungs = Counter(report.rung for report in self.reports if report.rung).most_common(4)
        if rungs:
            lines.append("answered by " + ", ".join(f"{rung} ({count})" for rung, count in rungs))
        for status in ("failed", "suspect"):
            which = self._of_status(status).tolist()
            if which:
                more = f" and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
                lines.append(f"{status}: x[{'], x['.join(map(str, which[:_SHOWN]))}]{more}")
                lines.append(f"  x[{which[0]}]: {self.reports[which[0]].sentence}")
        return "\n".join(line.replace("\n", " ")[:300] for line in lines)

    def __repr__(self) -> str:
        return f"Posteriors(n_obs={len(self)}, D={self._dim})"

    @property
    def _dim(self) -> int:
        return self.job.template.coordinates.dim_theta

    # -- draws and densities -----------------------------------------------------------------------------

    def sample(self, sample_shape: Shape = (), *, correct: bool | None = None) -> Tensor:
        """Draws for all observations, (*sample_shape, n_obs, D).

        Args:
            sample_shape: shape of the draws for each observation.
            correct: whether to correct draws by their importance weights; None: as `VIPosterior.sample`, that
                is after q="auto".

        Raises:
            TypeError, ValueError: `sample_shape` is no shape.
        """
        shape = checked_shape("sample_shape", sample_shape)
        n = max(shape.numel(), 1)  # no family need know how to draw nothing
        low = self.job.template.coordinates.low
        theta = low.new_full((n, len(self), self._dim), torch.nan)
        fits = [i for i, record in enumerate(self.records) if record.has_fit]
        asked = [i for i in fits if (self[i].fit.corrects if correct is None else correct)]  # type: ignore[union-attr]
        for i, draws in zip(
            asked, corrected([self[i] for i in asked], n, in_rows=self.job.in_rows), strict=True
        ):
            theta[:, i] = draws
        for i in sorted(set(fits) - set(asked)):
            theta[:, i] = self[i].sample((n,), correct=False)
        return theta[: shape.numel()].reshape(*shape, len(self), self._dim)

    def log_prob(self, theta: Tensor, *, normalized: str = "q") -> Tensor:
        """Log-densities (..., n_obs) of theta (..., n_obs, D), each at its own observation.

        Args:
            theta: one for each observation, as `sample` gives them; (..., 1, D) is taken at all of them.
            normalized: as for `VIPosterior.log_prob`.

        Raises:
            ValueError: theta of another shape.
            TypeError: theta is no array.
        """
        one_of("normalized", normalized, ("q", "potential"))
        theta = floating_tensor("theta", theta, self.job.template.coordinates.low)
        if theta.ndim < 2 or theta.shape[-1] != self._dim or theta.shape[-2] not in (1, len(self)):
            expected = f"shape (..., {len(self)}, {self._dim}), or (..., 1, {self._dim})"
            raise ValueError(violation("theta", expected, tuple(theta.shape)))
        theta = theta.expand(*theta.shape[:-2], len(self), self._dim)
        out = theta.new_full(theta.shape[:-1], torch.nan)
        for i, record in enumerate(self.records):
            if record.has_fit:
                rows = theta[..., i, :].reshape(-1, self._dim)
                out[..., i] = self[i].log_prob(rows, normalized=normalized).reshape(theta.shape[:-2])
        return out

    # -- files -------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all to a folder of tensors and JSON, as `fit_many(store=...)` does: no pickle, no code.

        Args:
            path: an empty folder, or one that is not there yet.

        Raises:
            ValueError: there is something in it, or it is a file.
            OSError: it cannot be written.
        """
        folder = as_folder(path, name="path")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(violation("path", "an empty folder", f"{folder}"))
        rows = min(_ROWS, max(len(self), 1))
        store = FitStore.open(folder, {"chunk_size": rows, "n_obs": len(self)}, None, self.job, self.x)
        for index in range(-(-len(self) // rows)):
            store.save(index, self.records[index * rows : (index + 1) * rows])

    @classmethod
    def load(cls, path: str | os.PathLike[str], **what_cannot_be_stored: Any) -> "Posteriors":
        """The posteriors in a folder that `save` or `fit_many(store=...)` wrote.

        Args:
            path: the folder; of an unfinished store, the observations that are missing have no fit.
            **what_cannot_be_stored: as for `VIPosterior.load`.

        Raises:
            ValueError, TypeError, OSError: as for `VIPosterior.load`.
        """
        folder = as_folder(path, name="path")
        manifest = read_fits_manifest(folder)
        if manifest is None:
            raise ValueError(violation("path", "a folder of fits", f"{folder}"))
        store = FitStore(folder)
        job, x = store.job(what_cannot_be_stored)
        rows, n_obs = manifest["chunk_size"], manifest["n_obs"]
        records: list[Record] = []
        for index in range(-(-n_obs // rows)):
            missing = min(rows, n_obs - index * rows)
            records += store.load(index) or [no_fit(NOT_YET)] * missing
        return cls(job, x.to(job.template.coordinates.low.device), tuple(records))


def _names_several(index: Any) -> bool:
    return isinstance(index, slice | list | tuple) or (
        isinstance(index, np.ndarray | Tensor) and index.ndim > 0
    )


def _rows(index: Any, n: int) -> list[int]:
    """The places in a sequence of n that numbers, or one bool for each, name.

    Raises:
        TypeError: they are of another kind.
        IndexError: there are no such places.
    """
    expected = f"whole numbers from {-n} to {n - 1}, or {n} bools"
    try:
        chosen = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(violation("index", expected, repr(index))) from error
    if not chosen.numel() and chosen.ndim == 1:
        return []
    if chosen.dtype == torch.bool and chosen.shape == (n,):
        return chosen.nonzero().flatten().tolist()
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise TypeError(violation("index", expected, f"{chosen.dtype} of shape {tuple(chosen.shape)}"))
    if int(chosen.min()) < -n or int(chosen.max()) >= n:
        raise IndexError(violation("index", expected, chosen.tolist()))
    return [i % n for i in chosen.tolist()]
