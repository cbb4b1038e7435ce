"""Inverses that survive being copied and saved.

A torch transform forgets its partner when it is pickled or deep-copied. For `transform.inv` the partner is
all there is, so a reloaded inverse has nothing to invert. `Inverted` keeps it as an ordinary attribute, and
`lasting` puts one in the place of every torch inverse inside a transform or a distribution.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, ExpTransform, Transform, constraints

__all__ = ["Inverted", "lasting"]

T = TypeVar("T")

_TorchInverse = type(ExpTransform().inv)


class Inverted(Transform):
    """The inverse of `forward`, which it keeps.

    >>> Inverted(ExpTransform())(torch.ones(1))
    tensor([0.])
    """

    def __init__(self, forward: Transform) -> None:
        super().__init__()
        self.forward = forward

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """What the forward transform maps to."""
        return self.forward.codomain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """What the forward transform maps from."""
        return self.forward.domain

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        """As the forward transform."""
        return self.forward.bijective

    @property
    def sign(self) -> int:
        """As the forward transform."""
        return self.forward.sign

    @property
    def inv(self) -> Transform:
        """The forward transform."""
        return self.forward

    def with_cache(self, cache_size: int = 1) -> "Inverted":
        return Inverted(self.forward.with_cache(cache_size))

    def __repr__(self) -> str:
        return f"Inverted({self.forward!r})"

    def _call(self, x: Tensor) -> Tensor:
        return self.forward._inv_call(x)  # type: ignore[return-value]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.forward(y)  # type: ignore[return-value]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.forward.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.forward.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.forward.forward_shape(shape)


def lasting(value: T, *, caching: bool = True) -> T:
    """A copy of a transform or distribution in which every torch inverse is an `Inverted`.

    Args:
        value: the transform or distribution.
        caching: whether transforms that cache go on to; what they hold now, a graph behind it, is dropped.

    >>> import pickle
    >>> log = pickle.loads(pickle.dumps(lasting(ExpTransform().inv)))
    >>> log(torch.ones(1))
    tensor([0.])
    """
    return _lasting(value, caching, {})


def _lasting(value: Any, caching: bool, seen: dict[int, Any]) -> Any:
    if type(value) is _TorchInverse:
        return Inverted(_lasting(value.inv, caching, seen))
    if isinstance(value, list):
        return [_lasting(entry, caching, seen) for entry in value]
    if id(value) in seen:  # shared or cyclic references stay so
        return seen[id(value)]
    if isinstance(value, Distribution | Transform) and not isinstance(value, nn.Module):
        seen[id(value)] = out = copy.copy(value)  # its own partner is left out, and made again when asked for
        entries = {name: entry for name, entry in vars(out).items() if name != "_inv"}
        out.__dict__.update({name: _lasting(entry, caching, seen) for name, entry in entries.items()})
        if "_cached_x_y" in entries:
            size = entries["_cache_size"] if caching else 0
            out.__dict__.update(_cached_x_y=(None, None), _cache_size=size)
        return out
    return value
