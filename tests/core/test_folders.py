"""Folders of finished work: what may be one, and what is said of another."""

from pathlib import Path

import pytest

from visbi.core.folders import as_folder, open_folder

KIND = {"format": "visbi examples", "version": 1}


def test_a_folder_may_be_absent(tmp_path: Path) -> None:
    assert as_folder(tmp_path) == as_folder(str(tmp_path)) == tmp_path
    assert as_folder(tmp_path / "new") == tmp_path / "new"


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`store`: expected a folder; got the file .*file"):
        as_folder(tmp_path / "file")
    with pytest.raises(TypeError, match="`path`: expected the path of a folder; got int"):
        as_folder(3, name="path")


def test_only_what_differs_is_printed(tmp_path: Path) -> None:
    open_folder(tmp_path, KIND, {"options": {"a": 1, "b": 2, "c": 3}})
    with pytest.raises(ValueError, match=r"with options \{'b': 2, 'c': 3\}$") as raised:
        open_folder(tmp_path, KIND, {"options": {"a": 1, "b": 4}})
    assert "made with options {'b': 4} (" in str(raised.value)
