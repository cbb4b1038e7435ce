"""Potentials that are not ours: a user's callable, and stateful objects of other packages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.potentials.base import BasePotential, check_values

__all__ = ["AdaptedPotential", "CustomPotential", "as_potential"]


class CustomPotential(BasePotential):
    """A plain callable (theta (N, D), x_o) -> (N,) as a potential.

    Args:
        potential_fn: the callable; x_o arrives as it was given.
        prior, x_o, device: as for `BasePotential`.

    >>> potential = CustomPotential(lambda theta, x_o: -0.5 * (theta - x_o).square().sum(-1))
    >>> potential.evaluate(torch.zeros(3, 2), torch.ones(1, 2)).tolist()
    [-1.0, -1.0, -1.0]
    """

    def __init__(
        self,
        potential_fn: Callable[[Tensor, Tensor | None], Tensor],
        prior: Distribution | None = None,
        x_o: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not callable(potential_fn):
            raise TypeError(violation("potential_fn", "a callable (theta, x_o) -> (N,)", type(potential_fn).__name__))
        self.potential_fn = potential_fn
        super().__init__(prior, x_o, device)

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        return check_values(self.potential_fn(theta, x), len(theta))


class AdaptedPotential(BasePotential):
    """A stateful potential of another package behind our pure interface.

    The wrapped object keeps its own observation: it is set for the length of a call and put back.

    Args:
        inner: an object with `set_x`, `return_x_o` and `__call__(theta, track_gradients)`.
    """

    def __init__(self, inner: Any, prior: Distribution | None = None) -> None:
        self.inner = inner
        own = getattr(inner, "prior", None)
        super().__init__(own if own is not None else prior, device=getattr(inner, "device", "cpu"))
        self._x_o = inner.return_x_o() if hasattr(inner, "return_x_o") else getattr(inner, "_x_o", None)
        self.x_is_iid = bool(getattr(inner, "x_is_iid", True))

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        before = self.inner.return_x_o() if hasattr(self.inner, "return_x_o") else None
        iid_before = getattr(self.inner, "x_is_iid", True)
        try:
            if x is not None:
                self.inner.set_x(x, x_is_iid=x_is_iid)
            return check_values(self.inner(theta, track_gradients=torch.is_grad_enabled()), len(theta))
        finally:
            if before is not None:
                self.inner.set_x(before, x_is_iid=iid_before)

    def to(self, device: str | torch.device) -> "AdaptedPotential":
        moved = self.inner.to(device)
        self.inner = self.inner if moved is None else moved
        super().to(device)
        return self


def as_potential(potential_fn: Any, prior: Distribution | None = None) -> BasePotential:
    """Whatever a user has as a `BasePotential`: the door.

    Accepts ours, an object with `set_x` and `__call__` (the interface of the field, used unchanged), or a
    plain callable (theta, x_o) -> (N,).

    Raises:
        TypeError: none of these.
    """
    if isinstance(potential_fn, BasePotential):
        return potential_fn
    if callable(potential_fn) and callable(getattr(potential_fn, "set_x", None)):
        return AdaptedPotential(potential_fn, prior)
    if callable(potential_fn):
        return CustomPotential(potential_fn, prior)
    raise TypeError(
        violation("potential_fn", "a BasePotential or a callable (theta, x_o) -> (N,)", type(potential_fn).__name__)
    )
