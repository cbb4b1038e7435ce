"""Objects as JSON values and tensors, and back, by a fixed table of what may occur.

Plain values stand for themselves. Everything else becomes a JSON object whose "is" says what it is:

    float     inf, -inf, nan
    tuple, size, dict     with their items; a dict whose keys are not strings as a list of pairs
    dtype     of torch, by name
    tensor    by the name of its entry among the tensors
    name      something that a `Vocabulary` lists by name, such as an optimiser's class
    object    an instance of one of its `Kind`s, as named fields; "same" where it occurs again
    given     what cannot be stored: `decode` is given it by keyword

Decoding calls nothing but the `build` functions of the vocabulary, whatever the values say.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Decoder",
    "Encoder",
    "Given",
    "Kind",
    "Otherwise",
    "Unstorable",
    "Vocabulary",
    "WrongGiven",
    "described",
]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class Unstorable(TypeError):  # noqa: N818  (it says what something is, and is always caught)
    """Something that no kind describes; the message names it."""


class WrongGiven(ValueError):  # noqa: N818
    """What was passed at loading does not fit what is stored."""


@dataclass(frozen=True)
class Kind:
    """How objects of one class are stored.

    Attributes:
        name: in the file; never changes its meaning.
        type: the class itself, no subclass.
        fields: object -> named values, each storable in turn; raises `Unstorable` if it cannot describe it.
        build: named values -> object.
    """

    name: str
    type: type
    fields: Callable[[Any], Mapping[str, Any]]
    build: Callable[..., Any]


@dataclass(frozen=True)
class Vocabulary:
    """All that may occur in a file.

    Attributes:
        kinds: each `name` and each `type` once.
        names: objects that are stored by name alone.
    """

    kinds: Iterable[Kind] = ()
    names: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """A place for something that is passed at loading; `required` or None by default; `what` it was."""

    keyword: str
    required: bool = True
    what: str = ""


@dataclass(frozen=True)
class Otherwise:
    """`value`, or `instead` where it cannot be stored; the same `value` elsewhere becomes `instead` too."""

    value: Any
    instead: Any


def described(value: Any) -> str:
    """What a value is, in words.

    >>> described(math.sqrt), described(Vocabulary())
    ("builtin_function_or_method 'sqrt'", 'an object of class Vocabulary')
    """
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return f"{type(value).__name__} {name!r}"
    return f"an object of class {type(value).__qualname__}"


class Encoder:
    """Turns values into JSON and tensors.

    Attributes:
        tensors: by name, on the CPU.
        missing: keyword -> what is missing, for each required `Given`.
        optional: keywords of the others.

    >>> encoder = Encoder(Vocabulary())
    >>> encoder.encode({"a": torch.ones(2), "b": math.inf}, "x")["items"]["b"]
    {'is': 'float', 'value': 'inf'}
    >>> list(encoder.tensors)
    ['x.a']
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._kinds = {kind.type: kind for kind in vocabulary.kinds}
        self._names = {id(value): name for name, value in vocabulary.names.items()}
        self.tensors: dict[str, Tensor] = {}
        self.missing: dict[str, str] = {}
        self.optional: list[str] = []
        self._seen: dict[int, tuple[int, Any]] = {}  # the objects too, so that no id is used twice
        self._instead: dict[int, tuple[Any, Any]] = {}
        self._why = ""

    def encode(self, value: Any, path: str) -> Any:
        """`value` as JSON; tensors in it are named after `path`.

        Raises:
            Unstorable: something in it is of no known kind.
        """
        if id(value) in self._instead:
            return self.encode(self._instead[id(value)][1], path)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            number = float(value)
            return number if math.isfinite(number) else {"is": "float", "value": str(number)}
        if isinstance(value, Otherwise):
            return self._otherwise(value, path)
        if isinstance(value, Given):
            return self._given(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if id(value) in self._names:
            return {"is": "name", "name": self._names[id(value)]}
        if type(value) in self._kinds:
            return self._object(value, path)
        return self._container(value, path)

    def _container(self, value: Any, path: str) -> Any:
        if isinstance(value, torch.dtype):
            return {"is": "dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, dict):
            return {"is": "dict", "items": self._items(value, path)}
        if type(value) not in (list, tuple, torch.Size):
            raise Unstorable(described(value))
        items = [self.encode(entry, f"{path}.{index}") for index, entry in enumerate(value)]
        if type(value) is list:
            return items
        return {"is": "size" if isinstance(value, torch.Size) else "tuple", "items": items}

    def _items(self, value: dict[Any, Any], path: str) -> Any:
        if all(type(key) is str for key in value):
            return {key: self.encode(entry, f"{path}.{key}") for key, entry in value.items()}
        return [
            [self.encode(key, f"{path}.keys"), self.encode(v, f"{path}.{key}")] for key, v in value.items()
        ]

    def _object(self, value: Any, path: str) -> Any:
        if id(value) in self._seen:
            return {"is": "same", "id": self._seen[id(value)][0]}
        kind = self._kinds[type(value)]
        fields = {name: self.encode(part, f"{path}.{name}") for name, part in kind.fields(value).items()}
        number = len(self._seen)
        self._seen[id(value)] = number, value
        return {"is": "object", "kind": kind.name, "id": number, "fields": fields}

    def _tensor(self, value: Tensor, path: str) -> Any:
        if value.device.type == "meta" or str(value.dtype).removeprefix("torch.") not in _DTYPES:
            raise Unstorable(f"a tensor of {value.dtype} on {value.device}")
        value = value.detach()
        name = _unused(path, self.tensors)
        # equal numbers in another order in memory may add up to other digits
        axes = sorted(range(value.ndim), key=lambda axis: -value.stride(axis))
        transposed = value.permute(axes).is_contiguous() and not value.is_contiguous()
        stored = value.permute(axes) if transposed else value
        self.tensors[name] = stored.cpu().clone(memory_format=torch.contiguous_format)
        return {"is": "tensor", "name": name, **({"axes": axes} if transposed else {})}

    def _given(self, value: Given) -> Any:
        if value.required:
            self.missing.setdefault(value.keyword, value.what or self._why)
        elif value.keyword not in self.optional:
            self.optional.append(value.keyword)
        return {"is": "given", "keyword": value.keyword}

    def _otherwise(self, value: Otherwise, path: str) -> Any:
        before = dict(self.tensors), dict(self._seen), dict(self.missing), list(self.optional)
        try:
            return self.encode(value.value, path)
        except Unstorable as reason:
            self.tensors, self._seen, self.missing, self.optional = before
            self._instead[id(value.value)] = value.value, value.instead
            self._why = str(reason)
            return self.encode(value.instead, path)


class Decoder:
    """Turns the values of an `Encoder` back.

    Args:
        vocabulary: as for the encoder, or a larger one.
        tensors: by name.
        given: by keyword.
    """

    def __init__(
        self, vocabulary: Vocabulary, tensors: Mapping[str, Tensor], given: Mapping[str, Any]
    ) -> None:
        self._kinds = {kind.name: kind for kind in vocabulary.kinds}
        self._names, self._tensors, self._given = vocabulary.names, tensors, given
        self._made: dict[int, Any] = {}

    def decode(self, value: Any) -> Any:
        """The value that was encoded.

        Raises:
            LookupError, TypeError, ValueError: the JSON does not come from an encoder.
        """
        if isinstance(value, list):
            return [self.decode(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        what = value["is"]
        if what == "object":
            return self._object(value)
        if what == "same":
            return self._made[value["id"]]
        if what == "name":
            return self._names[value["name"]]
        if what == "given":
            return self._given.get(value["keyword"])
        if what == "tensor":
            return self._tensor(value)
        return self._container(what, value)

    def _container(self, what: str, value: dict[str, Any]) -> Any:
        if what == "float":
            number = float(value["value"])
            return math.nan if math.isnan(number) else number  # the one NaN that equals itself in a tuple
        if what == "dtype":
            return _DTYPES[value["name"]]
        if what == "dict":
            items = value["items"]
            pairs = items.items() if isinstance(items, dict) else items
            return {self.decode(key): self.decode(entry) for key, entry in pairs}
        if what == "tuple":
            return tuple(self.decode(entry) for entry in value["items"])
        if what == "size":
            return torch.Size(value["items"])
        raise LookupError(f"unknown entry {what!r}")

    def _object(self, value: dict[str, Any]) -> Any:
        fields = {str(name): self.decode(part) for name, part in value["fields"].items()}
        made = self._kinds[value["kind"]].build(**fields)
        self._made[value["id"]] = made
        return made

    def _tensor(self, value: dict[str, Any]) -> Tensor:
        stored = self._tensors[value["name"]].clone()
        axes = value.get("axes", list(range(stored.ndim)))
        return stored.permute(sorted(range(stored.ndim), key=axes.__getitem__))


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 1, name
    while free in taken:
        number, free = number + 1, f"{name}#{number + 1}"
    return free
