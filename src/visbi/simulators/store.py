"""Finished chunks on disk, so that a killed run goes on where it stopped.

A store is a folder with `manifest.json`, which says whose runs these are, and one safetensors file a
chunk. Each file is written beside its place, flushed and renamed: it is there whole or not at all. One
process writes a store at a time.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from visbi.core.checks import violation
from visbi.simulators.chunk import ChunkResult

__all__ = ["ChunkStore", "read_manifest"]

_FORMAT = {"format": "visbi simulations", "version": 1}
_MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the store in `folder`; None if the folder is absent or empty.

    Raises:
        ValueError: the folder holds something else, or a version that this code does not know.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        # a kill before the manifest was in place leaves only its draft
        if [entry.name for entry in folder.iterdir()] == [f"{_MANIFEST}.draft"]:
            return None
        raise ValueError(
            violation("store", "an empty folder or a store of simulations", f"{folder}")
        ) from error
    for key, value in _FORMAT.items():
        if manifest.get(key) != value:
            raise ValueError(violation("store", f"{key} {value!r}", repr(manifest.get(key))))
    return manifest


@dataclass(frozen=True)
class ChunkStore:
    """The chunks of one run in one folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any]) -> "ChunkStore":
        """The store in `folder`, made if absent.

        Raises:
            ValueError: it belongs to another run; the message names what differs.
        """
        found = read_manifest(folder)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**_FORMAT, **manifest}, indent=1)
            _write_whole(folder / _MANIFEST, text.encode())
            return cls(folder)
        for key, value in manifest.items():
            if found.get(key) != value:
                expected = f"a store made with {key} {value!r} (choose another folder for another run)"
                raise ValueError(violation("store", expected, f"{folder} with {key} {found.get(key)!r}"))
        return cls(folder)

    def save(self, index: int, result: ChunkResult) -> None:
        """Write a finished chunk."""
        tensors = {"succeeded": result.succeeded}
        if result.x is not None:
            tensors["x"] = np.ascontiguousarray(result.x)
        _write_whole(self._path(index), save(tensors, metadata={"failures": json.dumps(result.failures)}))

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


def _write_whole(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
