"""A folder of fits: what `fit_many` goes on from after a kill, and what `Posteriors.save` writes.

    manifest.json        what the fits depend on (`core.folders`)
    posterior.visbi      the posterior that is fitted, without a fit
    job.visbi            x, and what all fits share beside the posterior
    chunk-000000.visbi   records of the observations of a chunk

Each file is tensors and JSON (`core.archive`), written whole or not at all. The potential is recognised by
its
values at a few thetas: they agree to a part in a thousand wherever they are computed, and no code is
compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visbi import __version__
from visbi.core.archive import Archive, ArchiveError, read_archive, write_archive
from visbi.core.checks import violation
from visbi.core.encoding import Decoder, Encoder, Otherwise, described
from visbi.core.folders import open_folder, read_manifest
from visbi.core.words import digest, in_words
from visbi.fitting.config import TrainOptions
from visbi.many.record import Record
from visbi.many.work import Job
from visbi.posterior import VIPosterior
from visbi.saving import VOCABULARY

__all__ = ["FitStore", "fingerprint", "read_fits_manifest"]

_KIND = {"format": "visbi fits", "version": 1}
_POSTERIOR, _JOB = "posterior.visbi", "job.visbi"
_SHOWN_ONLY = ("show_progress_bar", "quality_control", "quality_control_metric", "allow_failed", "seed")
_TOLERANCE = 1e-3  # of the potential's values


def read_fits_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of fits; None if it is absent or empty.

    Raises:
        ValueError: the folder holds something else.
    """
    return read_manifest(folder, _KIND)


@dataclass(frozen=True)
class FitStore:
    """The chunks in one folder."""

    folder: Path

    @classmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], potential_values: Tensor | None, job: Job, x: Tensor
    ) -> "FitStore":
        """The store in `folder`, made if absent.

        Args:
            folder: where.
            manifest: JSON values; what the fits depend on.
            potential_values: (M,) by which the potential is recognised, or None.
            job: what all fits share.
            x: all observations.

        Raises:
            ValueError: it belongs to other fits; the message names what differs.
        """
        found = read_fits_manifest(folder)
        values = [] if potential_values is None else [float(value) for value in potential_values]
        # as text, since JSON has no infinity
        open_folder(folder, _KIND, manifest if found else {**manifest, "potential": list(map(str, values))})
        if found is not None and not _alike([float(value) for value in found["potential"]], values):
            expected = "a store made with this potential and prior (choose another folder for another run)"
            raise ValueError(violation("store", expected, f"{folder} with other values of the potential"))
        for left_by_a_kill in (*folder.glob(".*.part"), *folder.glob("*.draft")):
            left_by_a_kill.unlink()
        if not (folder / _POSTERIOR).exists():
            job.template.save(folder / _POSTERIOR)
        if not (folder / _JOB).exists():
            write_archive(folder / _JOB, _job_file(job, x))
        return cls(folder)

    def save(self, index: int, records: Sequence[Record]) -> None:
        """Write a finished chunk."""
        tensors = {f"{k}/{name}": t for k, r in enumerate(records) for name, t in r.tensors.items()}
        write_archive(self._path(index), Archive("fits", [r.content for r in records], tensors, __version__))

    def load(self, index: int) -> list[Record] | None:
        """A finished chunk, or None if it is not there.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            archive = read_archive(path, "fits")
        except ArchiveError as error:
            expected = "whole files (delete this one to fit it again)"
            raise ValueError(violation("store", expected, f"{path}")) from error
        tensors: list[dict[str, Tensor]] = [{} for _ in archive.content]
        for name, tensor in archive.tensors.items():
            number, _, own = name.partition("/")
            tensors[int(number)][own] = tensor
        return [Record(content, each) for content, each in zip(archive.content, tensors, strict=True)]

    def job(self, what_cannot_be_stored: Mapping[str, Any]) -> tuple[Job, Tensor]:
        """What the fits share, and x (n_obs, ...); errors as of `VIPosterior.load`."""
        template = VIPosterior.load(self.folder / _POSTERIOR, **what_cannot_be_stored)
        archive = read_archive(self.folder / _JOB, "fits of many")
        shared = Decoder(VOCABULARY, archive.tensors, {}).decode(archive.content)
        options = TrainOptions(**{name: v for name, v in shared["options"].items() if v is not None})
        return Job(template, options, shared["in_rows"], shared["x_is_iid"]), shared["x"]

    def _path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.visbi"


def fingerprint(template: VIPosterior, q: Any, x: Tensor, options: TrainOptions) -> dict[str, Any]:
    """What fits depend on beside seed, chunks and the potential, as JSON values.

    Args:
        template: what is fitted.
        q: as it was given.
        x: (n_obs, ...) all observations.
        options: of the fits.
    """
    chosen = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}
    told = {name: in_words(value) for name, value in chosen.items() if name not in _SHOWN_ONLY}
    family = q if isinstance(q, str) else described(q)
    if not options.retrain_from_scratch:
        family += f" {digest(*template.q.state_dict().values())}"
    return {
        "n_obs": len(x),
        "x": f"{tuple(x.shape)} {digest(x)}",
        "q": family,
        "vi_method": template.vi_method,
        "options": told,
    }


def _job_file(job: Job, x: Tensor) -> Archive:
    encoder = Encoder(VOCABULARY)
    chosen = {entry.name: getattr(job.options, entry.name) for entry in dataclasses.fields(job.options)}
    options = {
        name: Otherwise(value, None) for name, value in chosen.items()
    }  # code of a user's own is left out
    shared = {"x": x, "options": options, "in_rows": job.in_rows, "x_is_iid": job.x_is_iid}
    content = encoder.encode(shared, "job")
    return Archive("fits of many", content, encoder.tensors, __version__)


def _alike(known: list[float], values: list[float]) -> bool:
    pairs = torch.tensor([known, values], dtype=torch.float64) if len(known) == len(values) else None
    return pairs is not None and bool(
        torch.isclose(*pairs, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True).all()
    )
