"""Values as JSON that can be compared later: what a folder of finished work is recognised by.

A tensor becomes a digest of its numbers, and what JSON has no word for its kind and name: never an address in
memory, which another process would not have again, and never a text that leaves numbers out.
"""

import hashlib
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from visbi.core.encoding import described

__all__ = ["digest", "in_words"]


def in_words(value: Any) -> Any:
    """A value as a JSON value that is the same in every process.

    >>> in_words(3), in_words(None), in_words(sorted)
    (3, None, "builtin_function_or_method 'sorted'")
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Integral | Real):  # those of NumPy
        return int(value) if isinstance(value, Integral) else float(value)
    return digest(value) if isinstance(value, Tensor) else described(value)


def digest(*tensors: Tensor) -> str:
    """A text that is the same for tensors of the same numbers.

    >>> import torch
    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.ones(2))
    (True, False)
    """
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256 {total.hexdigest()}"
