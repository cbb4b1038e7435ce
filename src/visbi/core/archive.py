"""Files of tensors and JSON: an uncompressed zip of `manifest.json` and `tensors.safetensors`.

Reading one runs no code from it: JSON holds plain values, safetensors holds numbers, and nothing is unpickled
or imported. What the values stand for is decided by `core.encoding`.

The manifest says what the file is: `format`, `kind`, `format_version`, `visbi_version`, and `content`. The
format's version rises when an older visbi could no longer make sense of the content.
"""

import contextlib
import json
import os
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from visbi.core.checks import violation

__all__ = ["FORMAT_VERSION", "Archive", "ArchiveError", "read_archive", "write_archive"]

FORMAT_VERSION = 3
"""Of the files that this visbi writes; it reads these and all older ones.

2: amortised fits. 3: fits with q="auto", draws with their weights, longer reports.
"""

_FORMAT = "visbi"
_MANIFEST, _TENSORS = "manifest.json", "tensors.safetensors"
# what the standard library raises for one flipped byte or another
_BAD_ZIP = (
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
    zlib.error,
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal contents make equal files


class ArchiveError(ValueError):
    """A file that cannot be read: damaged, not ours, or from a newer version."""


@dataclass(frozen=True)
class Archive:
    """What a file holds.

    Attributes:
        kind: what it is, such as "posterior".
        content: JSON values.
        tensors: by the names that the content uses.
        visbi_version, format_version: of the writer.
    """

    kind: str
    content: Any
    tensors: Mapping[str, Tensor]
    visbi_version: str = ""
    format_version: int = FORMAT_VERSION


def write_archive(path: str | os.PathLike[str], archive: Archive) -> None:
    """Write a file as a whole or not at all: a crash leaves what was there before.

    Args:
        path: where; a file there is replaced, its folder must exist.
        archive: what.

    Raises:
        OSError: it cannot be written.
    """
    manifest = {
        "format": _FORMAT,
        "kind": archive.kind,
        "format_version": archive.format_version,
        "visbi_version": archive.visbi_version,
        "content": archive.content,
    }
    members = {
        _MANIFEST: json.dumps(manifest, allow_nan=False, indent=1).encode(),
        _TENSORS: safetensors.torch.save(dict(archive.tensors)),
    }
    with _replacing(Path(os.path.realpath(path))) as part, zipfile.ZipFile(part, "x") as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name, _EPOCH), data)


def read_archive(path: str | os.PathLike[str], kind: str) -> Archive:
    """Read a file that `write_archive` made.

    Args:
        path: the file.
        kind: what it must be.

    Raises:
        OSError: it is not there or cannot be opened.
        ArchiveError: it is damaged, foreign, another kind of thing, or newer than this visbi.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.visbi"
    >>> write_archive(path, Archive("example", {"answer": 42}, {}))
    >>> read_archive(path, "example").content
    {'answer': 42}
    """
    path = Path(path)
    manifest, data = _members(path, kind)
    try:
        header = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, kind, f"a damaged manifest ({error})") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise _unreadable(path, kind, "a manifest of something else")
    version, writer = header.get("format_version"), header.get("visbi_version", "unknown")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _unreadable(path, kind, f"format version {version!r}")
    if version > FORMAT_VERSION:
        raise _unreadable(
            path,
            kind,
            f"format version {version}, written by visbi {writer}; this visbi reads up to version "
            f"{FORMAT_VERSION}: install a newer one",
        )
    if header.get("kind") != kind:
        raise _unreadable(path, kind, f"a saved {header.get('kind')!r}")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _unreadable(path, kind, f"damaged tensors ({error})") from error
    return Archive(kind, header.get("content"), tensors, str(writer), version)


def _members(path: Path, kind: str) -> tuple[bytes, bytes]:
    """Both parts of the file, their checksums verified."""
    with path.open("rb") as raw:
        try:
            with zipfile.ZipFile(raw) as file:
                return file.read(_MANIFEST), file.read(_TENSORS)
        except KeyError as error:
            raise _unreadable(path, kind, f"a zip file with a part missing ({error.args[0]})") from error
        except _BAD_ZIP as error:
            raise _unreadable(path, kind, f"a damaged or foreign file ({error})") from error


def _unreadable(path: Path, kind: str, got: str) -> ArchiveError:
    return ArchiveError(violation("path", f"a {kind} saved by visbi", f"{str(path)!r}: {got}"))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, moved over it when all went well and removed when not."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
