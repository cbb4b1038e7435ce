"""Moving things to a device: modules and tensors by their own `to`, distributions entry by entry."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

__all__ = ["map_tensors", "move"]

T = TypeVar("T")


def move(value: T, device: str | torch.device) -> T:
    """`value` with every tensor inside it on `device`; the original is unchanged unless it is a module.

    >>> from torch.distributions import Normal
    >>> move(Normal(torch.zeros(2), torch.ones(2)), "meta").loc.device.type
    'meta'
    """
    return map_tensors(value, lambda t: t.to(device))


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A copy of `value` with `function` applied to every tensor inside it.

    Goes through tensors, lists, tuples, dicts, and the attributes of torch distributions, transforms and
    constraints, which have no `to` of their own. A module is changed in place, as torch does. Anything
    else is returned as it is.
    """
    return _map(value, function, {})


def _map(value: Any, function: Callable[[Tensor], Tensor], seen: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, nn.Module):
        return value._apply(function)
    if id(value) in seen:  # shared or cyclic references stay shared
        return seen[id(value)]
    if isinstance(value, list):
        seen[id(value)] = out = []
        out.extend(_map(v, function, seen) for v in value)
        return out
    if type(value) is tuple:
        return tuple(_map(v, function, seen) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, function, seen) for k, v in value.items()}
    if isinstance(value, Distribution | Transform | Constraint):
        seen[id(value)] = out = copy.copy(value)
        for name, entry in vars(value).items():
            # a transform's weak reference to its inverse would lead back to the unmoved one
            out.__dict__[name] = None if isinstance(entry, weakref.ref) else _map(entry, function, seen)
        return out
    return value
