r"""A potential: U(theta; x) = log p(theta | x) + const.

Inside the house a potential is pure: `evaluate(theta, x, x_is_iid)` changes nothing and depends on its
arguments. The field's interface is stateful (`set_x`, then call); `BasePotential` offers it on top of the
pure one, so that samplers of other packages accept ours. Without an x, `evaluate` takes the one that was set.

x has shape (T, ...) with T trials. With `x_is_iid` they are independent trials of one experiment and
their log-likelihoods add up; without, T is 1 or N and row n of theta is paired with row n of x.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import finite_tensor, violation
from visbi.core.devices import move

__all__ = ["BasePotential", "check_theta", "check_values", "paired", "rows"]


class BasePotential(ABC):
    """Base of all potentials; a subclass defines `evaluate`.

    Args:
        prior: the prior over theta, event_shape (D,), or None.
        x_o: the observation, or None to set it later.
        device: where x_o is kept and theta is expected.
        x_is_iid: whether the rows of x are independent trials.
    """

    def __init__(
        self,
        prior: Distribution | None = None,
        x_o: Tensor | None = None,
        device: str | torch.device = "cpu",
        x_is_iid: bool = True,
    ) -> None:
        self.prior = prior
        self.device = str(device)
        self._x_o: Tensor | None = None
        self.x_is_iid = x_is_iid
        if x_o is not None:
            self.set_x(x_o, x_is_iid)

    @abstractmethod
    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        """log p(theta | x) + const, (N,), for theta (N, D) and x (T, ...); None is the x that was set."""

    def __call__(self, theta: Tensor, track_gradients: bool | Tensor = True) -> Tensor:
        """The potential of theta (N, D) at the observation that was set, (N,).

        A tensor in place of `track_gradients` is an observation, as for a plain callable (theta, x_o): so
        samplers of other packages call what is not of a class of theirs.
        """
        if isinstance(track_gradients, Tensor):
            return self.evaluate(theta, track_gradients, self.x_is_iid)
        with torch.set_grad_enabled(track_gradients):
            return self.evaluate(theta, self.x_o, self.x_is_iid)

    def set_x(self, x_o: Tensor | None, x_is_iid: bool = True) -> None:
        """Set the observation used by `__call__`."""
        self._x_o = None if x_o is None else finite_tensor("x_o", x_o).to(self.device)
        self.x_is_iid = x_is_iid

    @property
    def x_o(self) -> Tensor:
        """The observation that was set; ValueError if there is none."""
        if self._x_o is None:
            raise ValueError(violation("x_o", "an observation (call set_x first)", None))
        return self._x_o

    @x_o.setter
    def x_o(self, x_o: Tensor | None) -> None:
        self.set_x(x_o, self.x_is_iid)

    def return_x_o(self) -> Tensor | None:
        """The observation that was set, or None."""
        return self._x_o

    def to(self, device: str | torch.device) -> "BasePotential":
        """Move everything to `device`; returns self."""
        self.device = str(device)
        self.prior = None if self.prior is None else move(self.prior, device)
        self._x_o = None if self._x_o is None else self._x_o.to(device)
        return self

    def _log_prior(self, theta: Tensor) -> Tensor:
        if self.prior is None:
            raise ValueError(violation("prior", "a Distribution", None))
        return self.prior.log_prob(theta)


def rows(name: str, value: Any, event_ndim: int | None = None) -> Tensor:
    """`value` as a batch (T, ...): a single event gets a leading axis of length 1."""
    tensor = torch.as_tensor(value)
    if event_ndim is not None and tensor.ndim not in (event_ndim, event_ndim + 1):
        raise ValueError(violation(name, f"{event_ndim} or {event_ndim + 1} axes", tuple(tensor.shape)))
    if event_ndim is None:
        return tensor[None] if tensor.ndim < 2 else tensor
    return tensor[None] if tensor.ndim == event_ndim else tensor


def paired(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """theta (N, D) and x (T, ...) with equally many rows, where one of N and T may be 1."""
    n = max(len(theta), len(x))
    if len(theta) not in (1, n) or len(x) not in (1, n):
        expected = "equally many rows, or one row in either"
        raise ValueError(violation("theta` and `x", expected, f"{len(theta)} and {len(x)}"))
    return theta.expand(n, *theta.shape[1:]), x.expand(n, *x.shape[1:])


def check_theta(theta: Tensor, prior: Distribution | None) -> None:
    """Raise ValueError unless theta is (N, D) with the D of the prior."""
    dim = prior.event_shape[0] if prior is not None else "D"
    if theta.ndim != 2 or (prior is not None and theta.shape[-1] != dim):
        raise ValueError(violation("theta", f"shape (N, {dim})", tuple(theta.shape)))


def check_values(values: Any, n: int, name: str = "potential_fn") -> Tensor:
    """What `name` returned for n rows of theta, (n,), or an error that shows what came."""
    if not isinstance(values, Tensor):
        raise TypeError(violation(name, f"to return a tensor of shape ({n},)", type(values).__name__))
    if values.shape == (n, 1):
        values = values[:, 0]
    if values.shape != (n,):
        expected = f"to return shape ({n},) for theta of shape ({n}, D)"
        raise ValueError(violation(name, expected, tuple(values.shape)))
    return values
