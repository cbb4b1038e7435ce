r"""Does the potential have a gradient that says where to go?

Three things go wrong: there is none (a potential that leaves autograd); it is wrong (a detached piece); or
it is right and useless (a likelihood that is flat in steps: zero gradient, and yet it changes). Only the
likelihood matters, L = ell - log N(z; 0, I); the prior's part would hide all three. At pairs of points z -+
delta / 2, for |delta| from 1e-3 to .1, the change of L is compared with the mean of the slopes at both
ends; a pair that straddles an edge of where ell is finite says nothing of slopes. A gradient is taken

    if at one of those lengths half of the pairs agree to a fifth of the change, and
    if at the longest one it foresees more than a hundredth of how L changes.
"""

import torch
from torch import Tensor

from visbi.fitting.target import Target, is_usable, log_standard_normal

__all__ = ["useful_gradient"]

_LENGTHS = (1e-3, 1e-2, 1e-1)
_AGREE = 0.2
_FORESEEN = 1e-2


def useful_gradient(target: Target, z: Tensor, resolution: float = 1e-6) -> bool:
    """Whether the gradient of ell can be used, judged at points z (F, n, d) of all its potentials.

    Args:
        target: the target.
        z: (F, n, d) points at which ell is finite.
        resolution: relative rounding of the potential's values.

    Raises:
        BudgetReached: the target's budget has less than 6 n evaluations left.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> z = torch.randn(1, 32, 2, dtype=torch.float64)
    >>> def smooth(theta):
    ...     return prior.log_prob(theta) - 9 * theta.square().sum(-1)
    >>> def in_steps(theta):
    ...     return prior.log_prob(theta) - (3 * theta).round().square().sum(-1)
    >>> [useful_gradient(Target(log_p, coordinates(prior)), z) for log_p in (smooth, in_steps)]
    [True, False]
    """
    direction = torch.randn_like(z)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    lengths = torch.tensor(_LENGTHS, dtype=z.dtype, device=z.device)[:, None, None]
    z, direction = z[:, None], direction[:, None]
    ends = torch.stack(
        [z - 0.5 * lengths * direction, z + 0.5 * lengths * direction], 1
    )  # (F, 2, lengths, n, d)
    try:
        ell, gradient = target.value_and_gradient(ends)
    except RuntimeError as error:
        if "grad" in str(error):
            return False
        raise
    ends, gradient = (each.movedim(0, 2).flatten(2, 3) for each in (ends, gradient))  # all fits' points
    ell, direction = ell.movedim(0, 2).flatten(2, 3), direction.flatten(0, 2)
    inside = is_usable(ell).all(0)  # (lengths, all fits' pairs)
    value = ell - log_standard_normal(ends)
    change = torch.where(inside, value[1] - value[0], 0.0)
    foreseen = torch.where(inside, ((gradient + ends).mean(0) * lengths * direction).sum(-1), 0.0)
    rounding = resolution * (1 + ell.abs().amax(0))
    told = (change.abs() > 10 * rounding) | (foreseen.abs() > 10 * rounding)
    agree = (change - foreseen).abs() <= _AGREE * torch.maximum(change.abs(), foreseen.abs()) + 10 * rounding
    shares = [float(a[t].double().mean()) if bool(t.any()) else 1.0 for a, t in zip(agree, told, strict=True)]
    flat = bool((change[-1].abs() <= 10 * rounding[-1]).all())  # nothing to foresee
    useful = float(foreseen[-1].square().sum()) > _FORESEEN**2 * float(change[-1].square().sum())
    return max(shares) >= 0.5 and (useful or flat)
