"""Files of tensors and JSON: what comes back, what cannot, and what damaged or foreign ones say."""

import dataclasses
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visbi.core.archive import FORMAT_VERSION, Archive, ArchiveError, read_archive, write_archive
from visbi.core.encoding import Decoder, Encoder, Given, Kind, Otherwise, Unstorable, Vocabulary


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


class Subpair(Pair):
    pass


PAIR = Kind("Pair", Pair, vars, Pair)
WORDS = Vocabulary(kinds=(PAIR,), names={"sqrt": math.sqrt})


def there_and_back(value: Any) -> Any:
    encoder = Encoder(WORDS)
    text = json.dumps(encoder.encode(value, "value"), allow_nan=False)
    return Decoder(WORDS, encoder.tensors, {}).decode(json.loads(text))


def example() -> Archive:
    encoder = Encoder(WORDS)
    content = encoder.encode({"a": [1, 2.5], "b": torch.arange(5.0)}, "content")
    return Archive("example", content, encoder.tensors, "0.0.1")


def rewritten(path: Path, manifest: Any, tensors: bytes | None = None) -> Path:
    """A copy of an archive with another manifest."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["manifest.json"] = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    if tensors is not None:
        members["tensors.safetensors"] = tensors
    changed = path.with_name("changed.visbi")
    with zipfile.ZipFile(changed, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return changed


def manifest_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("manifest.json"))


# -- values ----------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        10**30,
        0.1,
        1e-320,
        math.inf,
        -math.inf,
        'text with \u2603 and "quotes"',
        [],
        [1, [2, [3]]],
        (),
        (1, (2, "x")),
        torch.Size([2, 3]),
        torch.float64,
        torch.bool,
        {},
        {"is": "tensor", "name": "no tensor"},
        {0: "zero", (1, 2): None},
        Pair(1, Pair((2,), None)),
        math.sqrt,
    ],
    ids=repr,
)
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_any_nesting_of_plain_values_comes_back(value: Any) -> None:
    assert repr(there_and_back(value)) == repr(value)


def test_nan_comes_back() -> None:
    assert math.isnan(there_and_back(math.nan))


@pytest.mark.parametrize(("value", "plain"), [(np.int64(3), 3), (np.float32(0.5), 0.5)])
def test_numpy_numbers_become_plain_ones(value: Any, plain: float) -> None:
    back = there_and_back(value)
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.tensor([math.nan, math.inf, -0.0]),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([2**62]),
        torch.arange(6).reshape(2, 3).mT,
        torch.randn(2, 3, 4).permute(1, 2, 0),
        torch.randn(10, 3)[::2, 1],
        torch.ones(1).expand(4, 3),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)} {t.stride()}",
)
def test_tensors_come_back_to_the_bit(tensor: torch.Tensor) -> None:
    back = there_and_back(tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.nan_to_num(7.0), tensor.nan_to_num(7.0)) if tensor.is_floating_point() else True
    assert torch.equal(back.isnan(), tensor.isnan())
    assert torch.equal(back.signbit(), tensor.signbit())


def test_order_in_memory_is_kept() -> None:
    # products of matrices add up in another order, and to other digits, if it is not
    tril = torch.linalg.cholesky(torch.eye(3) + 0.1)
    assert not tril.is_contiguous()
    assert there_and_back(tril).stride() == tril.stride()


def test_graph_and_device_views_stay_behind() -> None:
    leaf = torch.ones(2, requires_grad=True)
    back = there_and_back(leaf * 2)
    assert not back.requires_grad
    assert back.tolist() == [2.0, 2.0]


def test_one_object_in_two_places_comes_back_as_one() -> None:
    shared = Pair(1, torch.ones(1))
    first, second = there_and_back([shared, (shared,)])
    assert second[0] is first
    other, same_again = there_and_back([Pair(1, 2), Pair(1, 2)])
    assert other is not same_again


def test_decoded_tensors_are_their_own() -> None:
    encoder = Encoder(WORDS)
    tree = encoder.encode(torch.zeros(2), "value")
    decoder = Decoder(WORDS, encoder.tensors, {})
    decoder.decode(tree).add_(1)
    assert decoder.decode(tree).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: None, "function"),
        (object(), "class object"),
        (Subpair(1, 2), "class Subpair"),
        (math.cos, "'cos'"),
        (Path("x"), "Path"),
        (1j, "complex"),
        ({1, 2}, "set"),
        (torch.empty(1, device="meta"), "meta"),
        (torch.ones(1, dtype=torch.complex64), "complex64"),
        (Pair(1, [object()]), "class object"),
    ],
)
def test_what_no_kind_describes_is_named(value: Any, named: str) -> None:
    with pytest.raises(Unstorable, match=named):
        Encoder(WORDS).encode([value], "value")


def test_a_stand_in_takes_every_place_of_what_cannot_be_stored() -> None:
    alien = object()
    tree = [
        Otherwise(alien, Given("thing")),
        Pair(alien, Otherwise([1, alien, torch.ones(1)], Given("list"))),
    ]
    encoder = Encoder(WORDS)
    encoded = encoder.encode(tree, "value")
    assert encoder.missing == {"thing": "an object of class object"}
    back = Decoder(WORDS, encoder.tensors, {"thing": "given"}).decode(encoded)
    assert back[0] == "given"
    assert back[1].left == "given"
    assert back[1].right[:2] == [1, "given"]


def test_a_failed_attempt_leaves_nothing_behind() -> None:
    shared = Pair(1, 2)
    encoder = Encoder(WORDS)
    tree = encoder.encode([Otherwise([shared, torch.ones(1), object()], Given("thing")), shared], "value")
    assert encoder.tensors == {}
    assert Decoder(WORDS, {}, {"thing": 0}).decode(tree) == [0, shared]


def test_optional_ones_are_none_unless_given() -> None:
    encoder = Encoder(WORDS)
    tree = encoder.encode([Given("a", required=False)], "value")
    assert (encoder.missing, encoder.optional) == ({}, ["a"])
    assert Decoder(WORDS, {}, {}).decode(tree) == [None]
    assert Decoder(WORDS, {}, {"a": 5}).decode(tree) == [5]


@pytest.mark.parametrize(
    "tree",
    [
        {"is": "name", "name": "os.system"},
        {"is": "object", "kind": "subprocess.Popen", "id": 0, "fields": {"args": "true"}},
        {"is": "object", "kind": "Pair", "id": 0, "fields": {"left": 1}},
        {"is": "object", "kind": "Pair", "id": 0, "fields": {"left": 1, "right": 2, "other": 3}},
        {"is": "same", "id": 0},
        {"is": "pickle", "data": "gASVIQAAAAAAAACMBXBvc2l4"},
        {"is": "tensor", "name": "elsewhere"},
        {"is": "dtype", "name": "complex64"},
        {"is": "dict", "items": [[[], 1]]},
        {"kind": "Pair"},
    ],
    ids=str,
)
def test_only_known_words_are_decoded(tree: Any) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        Decoder(WORDS, {}, {}).decode(tree)


# -- files ----------------------------------------------------------------


def test_an_archive_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.visbi"
    write_archive(path, example())
    back = read_archive(path, "example")
    assert back.content == example().content
    assert back.tensors["content.b"].tolist() == [0, 1, 2, 3, 4]
    assert (back.kind, back.visbi_version, back.format_version) == ("example", "0.0.1", FORMAT_VERSION)
    assert [p.name for p in tmp_path.iterdir()] == ["a.visbi"]


def test_equal_contents_make_equal_files(tmp_path: Path) -> None:
    write_archive(tmp_path / "a", example())
    write_archive(tmp_path / "b", example())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strings_and_symbolic_links_are_paths(tmp_path: Path) -> None:
    target, link = tmp_path / "target.visbi", tmp_path / "link.visbi"
    write_archive(str(target), Archive("example", 1, {}))
    link.symlink_to(target)
    write_archive(str(link), Archive("example", 2, {}))
    assert link.is_symlink()
    assert read_archive(str(target), "example").content == 2


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "a.visbi"
    write_archive(path, Archive("example", "old", {}))
    written = zipfile.ZipFile.writestr

    def crash(self: zipfile.ZipFile, name: Any, data: Any) -> None:
        written(self, name, data[: len(data) // 2])
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "writestr", crash)
    with pytest.raises(error):
        write_archive(path, Archive("example", "new", {}))
    assert read_archive(path, "example").content == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.visbi"]


def test_a_missing_folder_or_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_archive(tmp_path / "nowhere" / "a.visbi", example())
    with pytest.raises(FileNotFoundError):
        read_archive(tmp_path / "a.visbi", "example")
    with pytest.raises(IsADirectoryError):
        read_archive(tmp_path, "example")


def foreign_files() -> dict[str, bytes]:
    numpy, pickled, with_torch = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(numpy, a=np.ones(3))
    pickle.dump({"a": 1}, pickled)
    torch.save({"a": 1}, with_torch)
    files = {"numpy": numpy, "pickle": pickled, "torch.save": with_torch}
    return {
        "empty": b"",
        "text": b"theta,x\n1,2\n",
        **{name: file.getvalue() for name, file in files.items()},
    }


@pytest.mark.parametrize("name", foreign_files())
def test_foreign_files_are_named_in_the_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "foreign.visbi"
    path.write_bytes(foreign_files()[name])
    with pytest.raises(
        ArchiveError, match=r"`path`: expected a example saved by visbi; got '.*foreign\.visbi'"
    ):
        read_archive(path, "example")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "something else"),
        ({"format": None}, "something else"),
        ({"kind": "simulations"}, "a saved 'simulations'"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": 0}, "format version 0"),
        ({"format_version": True}, "format version True"),
        ({"format_version": FORMAT_VERSION + 1, "visbi_version": "9.1"}, "visbi 9.1.*install a newer one"),
    ],
)
def test_another_header_says_what_it_is(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "a.visbi"
    write_archive(path, example())
    with pytest.raises(ArchiveError, match=said):
        read_archive(rewritten(path, {**manifest_of(path), **change}), "example")


@pytest.mark.parametrize("manifest", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000], ids=len)
def test_a_broken_manifest(tmp_path: Path, manifest: bytes) -> None:
    path = tmp_path / "a.visbi"
    write_archive(path, example())
    with pytest.raises(ArchiveError, match="manifest"):
        read_archive(rewritten(path, manifest), "example")


@pytest.mark.parametrize("tensors", [b"", b"12345678", b"\xff" * 100], ids=len)
def test_broken_tensors(tmp_path: Path, tensors: bytes) -> None:
    path = tmp_path / "a.visbi"
    write_archive(path, example())
    with pytest.raises(ArchiveError, match="damaged tensors"):
        read_archive(rewritten(path, manifest_of(path), tensors), "example")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path, cut = tmp_path / "a.visbi", tmp_path / "cut.visbi"
    write_archive(path, example())
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        cut.write_bytes(data[:length])
        with pytest.raises(ArchiveError):
            read_archive(cut, "example")


def test_every_flipped_byte_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    path, flipped = tmp_path / "a.visbi", tmp_path / "flipped.visbi"
    write_archive(path, example())
    data, good = path.read_bytes(), read_archive(path, "example")
    noticed = 0
    for position in range(len(data)):
        flipped.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            back = read_archive(flipped, "example")
        except ArchiveError:
            noticed += 1
            continue
        assert back.content == good.content
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in good.tensors.items())
    assert noticed > 0.8 * len(data)
