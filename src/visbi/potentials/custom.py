"""Potentials that are not ours: a user's callable, and stateful objects of other packages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
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
            expected = "a callable (theta, x_o) -> (N,)"
            raise TypeError(violation("potential_fn", expected, type(potential_fn).__name__))
        if not _takes_two(potential_fn):
            got = f"{getattr(potential_fn, '__name__', type(potential_fn).__name__)}{signature(potential_fn)}"
            raise TypeError(violation("potential_fn", "a callable (theta, x_o) -> (N,)", got))
        self.potential_fn = potential_fn
        super().__init__(prior, x_o, device)

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        x = self._x_o if x is None else x
        try:
            values = self.potential_fn(theta, x)
        except (TypeError, AttributeError) as error:
            if x is not None:
                raise
            # a callable may have its observation inside; this one has not
            raise ValueError(violation("x", "an observation (pass x or call set_default_x)", None)) from error
        return check_values(values, len(theta))


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it can be called with two arguments, as far as it says so."""
    try:
        signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # it does not
        pass
    return True


class AdaptedPotential(BasePotential):
    """A stateful potential of another package behind our pure interface.

    The wrapped object keeps its own observation and prior, or its lack of them: ours are set for the length
    of a call, and what was there is put back, also if the call raises.

    Args:
        inner: an object with `set_x(x, x_is_iid)`, `return_x_o()` and `__call__(theta, track_gradients)`.
        prior: used if `inner` has none.
    """

    def __init__(self, inner: Any, prior: Distribution | None = None) -> None:
        self.inner = inner
        own = getattr(inner, "prior", None)
        super().__init__(own if own is not None else prior, device=getattr(inner, "device", "cpu"))
        self._x_o = inner.return_x_o()
        self.x_is_iid = bool(getattr(inner, "x_is_iid", True))

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        with self._with_prior(), self._observing(self._x_o if x is None else x, x_is_iid):
            values = self.inner(theta, track_gradients=torch.is_grad_enabled())
        if isinstance(values, Tensor) and values.shape == (
            1,
            len(theta),
        ):  # sbi's, where theta and x are paired
            values = values[0]
        return check_values(values, len(theta))

    @contextmanager
    def _with_prior(self) -> Iterator[None]:
        """The wrapped object with our prior, if it has an attribute for one and none in it."""
        if self.prior is None or getattr(self.inner, "prior", self.prior) is not None:
            yield
            return
        try:
            self.inner.prior = self.prior
            yield
        finally:
            self.inner.prior = None

    @contextmanager
    def _observing(self, x: Tensor | None, x_is_iid: bool) -> Iterator[None]:
        """The wrapped object with x set; None leaves its own."""
        if x is None:
            yield
            return
        before, iid_before = self.inner.return_x_o(), getattr(self.inner, "x_is_iid", True)
        try:
            self.inner.set_x(x, x_is_iid=x_is_iid)
            yield
        finally:
            self.inner.set_x(before, x_is_iid=iid_before)

    def to(self, device: str | torch.device) -> "AdaptedPotential":
        moved = self.inner.to(device)
        self.inner = self.inner if moved is None else moved
        super().to(device)
        return self


def as_potential(potential_fn: Any, prior: Distribution | None = None) -> BasePotential:
    """Whatever a user has as a `BasePotential`: the door.

    Accepts ours, an object with `set_x`, `return_x_o` and `__call__` (the field's interface), or a plain
    callable (theta, x_o) -> (N,).

    Raises:
        TypeError: none of these.
    """
    if isinstance(potential_fn, BasePotential):
        return potential_fn
    if callable(potential_fn) and all(hasattr(potential_fn, name) for name in ("set_x", "return_x_o")):
        return AdaptedPotential(potential_fn, prior)
    if callable(potential_fn):
        return CustomPotential(potential_fn, prior)  # type: ignore[arg-type]
    expected = "a BasePotential or a callable (theta, x_o) -> (N,)"
    cure = " (give its `potential_fn`)" if hasattr(potential_fn, "potential_fn") else ""
    raise TypeError(violation("potential_fn", expected, type(potential_fn).__name__ + cure))
