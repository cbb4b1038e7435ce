"""Folders of finished work: a manifest that says whose it is, and files that are there whole or not at all.

A folder has `manifest.json`: `format` and `version`, and what the work depends on. Asking for other work in
the same folder is an error, and what is there stays as it is. One process writes a folder at a time.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visbi.core.checks import violation

__all__ = ["as_folder", "differing", "open_folder", "read_manifest", "write_whole"]

_MANIFEST = "manifest.json"


def as_folder(path: Any, *, name: str = "store") -> Path:
    """A path at which there is a folder, or nothing yet.

    Raises:
        TypeError: it is no path.
        ValueError: there is a file.
    """
    try:
        folder = Path(path)
    except TypeError as error:
        raise TypeError(violation(name, "the path of a folder", type(path).__name__)) from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(violation(name, "a folder", f"the file {folder}"))
    return folder


def read_manifest(folder: Path, kind: Mapping[str, Any], *, name: str = "store") -> dict[str, Any] | None:
    """The manifest of `folder`; None if the folder is absent or empty.

    Args:
        folder: the folder.
        kind: `format`, what the folder must hold, and its `version`.
        name: of the argument that errors speak of.

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
        expected = f"an empty folder or a store of {kind['format'].removeprefix('visbi ')}"
        raise ValueError(violation(name, expected, f"{folder}")) from error
    for key, value in kind.items():
        if manifest.get(key) != value:
            raise ValueError(violation(name, f"{key} {value!r}", repr(manifest.get(key))))
    return manifest


def open_folder(
    folder: Path,
    kind: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    remarks: Mapping[str, Any] | None = None,
    name: str = "store",
) -> None:
    """Make `folder` with this manifest, or see that the one it has says the same.

    Args:
        folder, kind, name: as for `read_manifest`.
        manifest: JSON values; what the work depends on.
        remarks: JSON values that are written beside these when the folder is made, and not compared.

    Raises:
        ValueError: it belongs to other work; the message names what differs.

    >>> import tempfile
    >>> folder, kind = Path(tempfile.mkdtemp()), {"format": "visbi examples", "version": 1}
    >>> open_folder(folder, kind, {"seed": 1})
    >>> read_manifest(folder, kind)
    {'format': 'visbi examples', 'version': 1, 'seed': 1}
    """
    found = read_manifest(folder, kind, name=name)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {**kind, **manifest, **(remarks or {})}
        write_whole(folder / _MANIFEST, json.dumps(content, indent=1).encode())
        return
    for key, value in manifest.items():
        if found.get(key) != value:
            asked, had = differing(value, found.get(key))
            expected = f"a store made with {key} {asked!r} (choose another folder for another run)"
            raise ValueError(violation(name, expected, f"{folder} with {key} {had!r}"))


def differing(asked: Any, had: Any) -> tuple[Any, Any]:
    """Two values that differ; of two dicts, what they do not share.

    >>> differing({"a": 1, "b": 2}, {"a": 1, "b": 3})
    ({'b': 2}, {'b': 3})
    """
    if not (isinstance(asked, Mapping) and isinstance(had, Mapping)):
        return asked, had
    shared = [key for key in asked if key in had and asked[key] == had[key]]
    return tuple({k: v for k, v in each.items() if k not in shared} for each in (asked, had))  # type: ignore[return-value]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
