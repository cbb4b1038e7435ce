"""Modules and dataclasses as what they hold."""

import dataclasses
from typing import Any, TypeVar

from torch import Tensor, nn

from visbi.core.encoding import Kind

__all__ = ["dataclass_kind", "weights_of", "with_weights"]

M = TypeVar("M", bound=nn.Module)


def weights_of(module: nn.Module) -> dict[str, Any]:
    """What `with_weights` takes: parameters and buffers by name, and which of them do not train."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return {"tensors": dict(module.state_dict()), "frozen": frozen}


def with_weights(module: M, weights: dict[str, Any]) -> M:
    """`module` with these weights in the place of its own, to the last bit and in their dtype.

    Raises:
        RuntimeError: other names or shapes than the module's.
    """
    tensors: dict[str, Tensor] = weights["tensors"]
    module.load_state_dict(tensors, assign=True)
    for name in weights["frozen"]:
        module.get_parameter(name).requires_grad_(False)
    return module


def dataclass_kind(cls: type) -> Kind:
    """The kind of a dataclass whose fields are all storable."""
    names = [entry.name for entry in dataclasses.fields(cls)]
    return Kind(cls.__name__, cls, lambda value: {name: getattr(value, name) for name in names}, cls)
