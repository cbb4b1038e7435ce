"""Finished chunks on disk, so that a killed run goes on where it stopped.

A store is a folder (`core.folders`) whose manifest says whose runs these are, with one safetensors file a
chunk.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from visbi.core import folders
from visbi.core.checks import violation
from visbi.core.folders import open_folder, write_whole
from visbi.simulators.chunk import ChunkResult

__all__ = ["ChunkStore", "read_manifest"]

_KIND = {"format": "visbi simulations", "version": 1}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the store in `folder`; None if the folder is absent or empty.

    Raises:
        ValueError: the folder holds something else, or a version that this code does not know.
    """
    return folders.read_manifest(folder, _KIND)


@dataclass(frozen=True)
class ChunkStore:
    """The chunks of one run in one folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any], code: str | None) -> "ChunkStore":
        """The store in `folder`, made if absent.

        Args:
            folder: where.
            manifest: JSON values; what the runs depend on.
            code: of the simulator, `identity.code_of`.

        Raises:
            ValueError: it belongs to another run; the message names what differs.

        Warns:
            UserWarning: its runs were made by other code of the same name.
        """
        found = read_manifest(folder)
        open_folder(folder, _KIND, manifest, remarks={"code": code})
        made_by = None if found is None else found.get("code")
        if None not in (code, made_by) and code != made_by:
            name = manifest["simulator"]
            problem = violation(
                "store", f"runs of {name!r} as it is now", f"{folder}, whose code was another"
            )
            warnings.warn(f"{problem}. They are used: choose another folder if it matters.", stacklevel=3)
        return cls(folder)

    def save(self, index: int, result: ChunkResult) -> None:
        """Write a finished chunk."""
        tensors = {"succeeded": result.succeeded}
        if result.x is not None:
            tensors["x"] = np.ascontiguousarray(result.x)
        write_whole(self._path(index), save(tensors, metadata={"failures": json.dumps(result.failures)}))

    def load(self, index: int) -> ChunkResult | None:
        """A finished chunk, or None if it is not there.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                failures = tuple(json.loads(file.metadata()["failures"]))
        except SafetensorError as error:
            raise ValueError(
                violation("store", "whole files (delete this one to run it again)", f"{path}")
            ) from error
        return ChunkResult(tensors.get("x"), tensors["succeeded"], failures)

    def _path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.safetensors"
