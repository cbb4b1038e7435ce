"""Copies of a distribution in which what was tied to a trainable tensor stays tied to it.

torch's distributions broadcast their arguments, so `MultivariateNormal(loc, scale_tril=L)` holds a view of
the user's `loc`, not `loc` itself. A pickle or a deepcopy would sever it: the copy's optimiser would step a
tensor that the copy's density no longer reads. Here a view is written down as what it is, the tensor it looks
at and how, and is made again when the copy is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.devices import map_tensors

__all__ = ["computed", "moved", "portable"]


def computed(tensor: Tensor) -> bool:
    """Whether a tensor is a result from trainable ones, which a step of theirs would leave behind."""
    return not tensor.is_leaf and not _is_view_of_leaf(tensor)


def portable(distribution: Any) -> Any:
    """The distribution with its views replaced by notes from which pickle and deepcopy make them again.

    Raises:
        ValueError: it holds tensors computed from trainable ones, whose graph cannot be copied.
    """

    def note(tensor: Tensor) -> Any:
        if computed(tensor):
            expected = "a distribution that holds its trainable tensors themselves, to be copied"
            raise ValueError(violation("q", expected, "one that holds results computed from them"))
        return _View(tensor) if _is_view_of_leaf(tensor) else tensor

    return map_tensors(distribution, note)


def moved(distribution: Any, trainable: list[Tensor], function: Callable[[Tensor], Tensor]) -> Any:
    """The distribution with `function` applied to its tensors; the trainable ones keep their identity.

    Args:
        distribution: left as it was, but for its trainable tensors.
        trainable: leaf tensors, changed in place.
        function: such as a move to another device.
    """
    known = {id(t) for t in trainable}
    for tensor in trainable:
        tensor.grad = None
        tensor.data = function(tensor.data)

    def place(tensor: Tensor) -> Tensor:
        if id(tensor) in known:
            return tensor
        if id(tensor._base) in known:
            return _View(tensor).made()
        return function(tensor)

    return map_tensors(distribution, place)


def _is_view_of_leaf(tensor: Tensor) -> bool:
    return tensor._base is not None and tensor._base.is_leaf and tensor._base.requires_grad


class _View:
    """How a tensor looks at its base."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor._base is not None
        self._how = tensor._base, tensor.size(), tensor.stride(), int(tensor.storage_offset())

    def made(self) -> Tensor:
        return _make_view(*self._how)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_view, self._how


def _make_view(base: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    return base.as_strided(size, stride, offset)
