r"""The target in coordinates: ell(z) = U(theta(z)) + log|dtheta/dz|, its gradient, and a count of both.

Relative to the prior, L(z) = ell(z) - log N(z; 0, I) is the log-likelihood up to a constant wherever the
coordinates make the prior standard normal; tempering runs along it.

A potential that is not finite becomes a large negative number with no gradient, and is counted.
"""

import torch
from torch import Tensor

from visbi.core.types import LogDensity
from visbi.families.base import log_standard_normal
from visbi.fitting.budget import Budget
from visbi.priors.transforms import Coordinates

__all__ = ["Target", "is_usable", "log_standard_normal"]

_FLOOR = -1e30
_BATCH = 16_384


def is_usable(ell: Tensor) -> Tensor:
    """Where the potential was finite, for values of `Target`; bool, of ell's shape.

    >>> is_usable(torch.tensor([-3.0, -1e30]))
    tensor([ True, False])
    """
    return ell > 0.1 * _FLOOR


class Target:
    """ell and its gradient, in float64, for z of any leading shape.

    Args:
        log_p: the potential, (N, D) -> (N,).
        coords: the coordinates.
        budget: what evaluations are taken from; None is one without limits.

    Attributes:
        dim: d.
        n_values, n_gradients: evaluations so far, without and with gradient.
        n_nonfinite: how many of them were not finite, and
        n_broken: how many of those were NaN or +inf, which no density is.
    """

    def __init__(self, log_p: LogDensity, coords: Coordinates, budget: Budget | None = None) -> None:
        self._log_p, self._coords = log_p, coords
        self.budget = Budget() if budget is None else budget
        self.dim = coords.dim_z
        self.n_values = self.n_gradients = self.n_nonfinite = self.n_broken = 0

    @property
    def device(self) -> torch.device:
        """Where z is expected."""
        return self._coords.low.device  # type: ignore[return-value]

    def value(self, z: Tensor) -> Tensor:
        """ell(z), shape of z without its last axis."""
        self.budget.spend(z.shape[:-1].numel())
        with torch.no_grad():
            parts = [self._evaluate(piece) for piece in z.reshape(-1, self.dim).split(_BATCH)]
        self.n_values += z.shape[:-1].numel()
        return self._clean(torch.cat(parts)).reshape(z.shape[:-1])

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """ell(z) and its gradient, of z's shape."""
        self.budget.spend(z.shape[:-1].numel())
        values, gradients = [], []
        for piece in z.reshape(-1, self.dim).split(_BATCH):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                ell = self._evaluate(leaf)
                (gradient,) = torch.autograd.grad(ell.sum(), leaf)
            values.append(ell.detach())
            gradients.append(gradient)
        self.n_gradients += z.shape[:-1].numel()
        value, gradient = torch.cat(values), torch.cat(gradients)
        usable = torch.isfinite(value)[:, None] & torch.isfinite(gradient).all(-1, keepdim=True)
        gradient = torch.where(usable, gradient, torch.zeros_like(gradient))
        return self._clean(value).reshape(z.shape[:-1]), gradient.reshape(z.shape)

    def _evaluate(self, z: Tensor) -> Tensor:
        theta, ladj = self._coords.to_theta(z)
        return self._log_p(theta).double() + ladj

    def _clean(self, value: Tensor) -> Tensor:
        finite = torch.isfinite(value)
        self.n_nonfinite += int((~finite).sum())
        self.n_broken += int((~finite & (value != -torch.inf)).sum())
        return torch.where(finite, value.clamp_min(_FLOOR), _FLOOR)
