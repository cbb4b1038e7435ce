r"""Modes hidden in a box, sought in theta itself, where a Gaussian that a side cuts off still is one.

A box is stretched to z = Phi^-1((theta - low) / (high - low)), and there a Gaussian likelihood is no
Gaussian: nothing fits to more than a tenth, and what `hidden` lives on, the rest that an exact fit leaves,
drowns. In theta the prior is flat and log p(theta) is a quadratic plus that rest, up to the sides. So the
search is made in y = (theta - middle) / sd of the prior. Means and precisions come from regressions of the
slopes, which do not mind that half of a Gaussian is missing:

    grad log p(y) = P (m - y).

Modes so found are matched once more in z, where everything else works.
"""

import torch
from torch import Tensor

from visbi.families.gaussians import Mixture
from visbi.fitting.hidden import beyond, of_slopes, with_hidden
from visbi.fitting.mixture import merged
from visbi.fitting.refine import COMPONENTS, matched
from visbi.fitting.target import FlatTarget, Target

__all__ = ["in_boxes"]

_TIMES = 2  # regressions, each around what the one before found


def in_boxes(target: Target, q: Mixture, z: Tensor, ell: Tensor, *, by: float) -> Mixture | None:
    """Gaussians, matched in z, at modes to which what those of q leave unexplained leads; None without any.

    Args: as of `hidden.with_hidden`; of q only where its components are matters.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> import math
    >>> from visbi.priors import BoxUniform, coordinates
    >>> box = BoxUniform(torch.zeros(4).double(), torch.ones(4).double())
    >>> def log_p(theta):  # of equal mass, but one a quarter as wide; a side cuts through the wide one
    ...     wide, narrow = (theta - torch.tensor([1.0, .4, .4, .4])), theta - 0.7
    ...     halved = math.log(2) - 50 * wide.square().sum(-1)
    ...     return torch.logaddexp(halved, 4 * math.log(4) - 800 * narrow.square().sum(-1))
    >>> target = Target(log_p, coordinates(box))
    >>> near = torch.special.ndtri(torch.tensor([0.95, .4, .4, .4]).double())
    >>> wide = Mixture.of(torch.zeros(1, 1), near[None, None], 0.05 * torch.eye(4).double()[None, None])
    >>> z = torch.randn(1, 512, 4).double()
    >>> found = in_boxes(target, wide, z, target.value(z), by=3.0)
    >>> assert found is not None
    >>> torch.special.ndtr(found.loc[0])
    tensor([[0.70, 0.70, 0.70, 0.70]], dtype=torch.float64)
    """
    flat = FlatTarget.of(target)
    if flat is None:
        return None
    near = _regressed(flat, flat.from_z(q.loc), flat.cov_from_z(q.loc, q.cov))
    if near is None:
        return None
    near = merged(near, torch.zeros_like(near.log_weights), COMPONENTS)
    both = with_hidden(flat, near, flat.from_z(z), flat.value_from_z(z, ell), by=by, matched=_regressed)
    new = None if both is None else beyond(both, near)
    if new is None:
        return None
    there = flat.inwards(new.loc, new.cov)
    return matched(target, flat.to_z(there), flat.cov_to_z(there, new.cov))


def _regressed(target: Target, starts: Tensor, cov: Tensor) -> Mixture | None:
    """Gaussians of equal weight whose slopes are those around starts (1, K, d); None where none has any."""
    loc = starts
    for _ in range(_TIMES):
        loc, cov, curved = of_slopes(target, target.inwards(loc, cov), cov)
        if not bool(curved.any()):
            return None
        loc, cov = loc[curved][None], cov[curved][None]
    return Mixture.of(torch.zeros_like(loc[..., 0]), loc, cov)
