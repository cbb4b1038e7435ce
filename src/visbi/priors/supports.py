"""What a torch constraint says about a support: its bounds, and its bijection from R^d."""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints

from visbi.core.checks import violation

__all__ = ["bijection_to", "bounds", "inside", "support_of"]


def support_of(prior: Distribution) -> constraints.Constraint:
    """The prior's support, or a ValueError that says what to add.

    >>> from visbi.priors import BoxUniform
    >>> support_of(BoxUniform(torch.zeros(2), torch.ones(2))).event_dim
    1
    """
    try:
        support = prior.support
    except (NotImplementedError, AttributeError):
        support = None
    if support is None:
        cure = "a Distribution with `support` (or pass `theta_transform`)"
        raise ValueError(violation("prior", cure, f"{type(prior).__name__} without one"))
    return support


def bijection_to(support: constraints.Constraint) -> Transform:
    """torch's bijection from unconstrained space to `support`, or a ValueError."""
    try:
        return biject_to(support)
    except NotImplementedError as error:
        cure = "a support that torch has a bijection for (or pass `theta_transform`)"
        raise ValueError(violation("prior", cure, repr(support))) from error


def bounds(support: constraints.Constraint, dim: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of each of `dim` entries, each (dim,) float64; infinite where there is none.

    >>> low, high = bounds(torch.distributions.constraints.positive, 2)
    >>> low.tolist(), high.tolist()
    ([0.0, 0.0], [inf, inf])
    """
    base = getattr(support, "base_constraint", None)
    if base is not None:
        return bounds(base, dim)
    if isinstance(support, constraints.cat):
        parts = [bounds(c, n) for c, n in zip(support.cseq, support.lengths, strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if isinstance(support, type(constraints.simplex)):
        return torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
    ends = [getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)]
    low, high = (
        torch.as_tensor(end).detach().to("cpu", torch.float64).expand(dim).clone() for end in ends
    )
    return low, high


def inside(support: constraints.Constraint, theta: Tensor) -> Tensor:
    """Which rows of theta (..., D) lie in the support, (...) bool.

    >>> inside(torch.distributions.constraints.positive, torch.tensor([[1.0, 2.0], [1.0, -1.0]]))
    tensor([ True, False])
    """
    mask = support.check(theta)
    extra = mask.ndim - (theta.ndim - 1)
    return mask.all(-1) if extra > 0 else mask
