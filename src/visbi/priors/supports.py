"""What a torch constraint says about a support: its bounds, and its bijection from R^d."""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Transform, VonMises, biject_to, constraints

from visbi.core.checks import violation
from visbi.priors.simplex import StickBreaking

__all__ = [
    "Product",
    "bijection_to",
    "bounds",
    "drawn_from",
    "has_support",
    "inside",
    "product_of",
    "support_of",
]


class Product(constraints.cat):
    """`constraints.cat` over factors that are checked as a whole, such as a simplex.

    torch strings the verdicts of such factors together along the batch.
    """

    def check(self, value: Tensor) -> Tensor:
        return inside(self, value)


def product_of(supports: list[constraints.Constraint], lengths: list[int]) -> constraints.Constraint:
    """The support of vectors whose consecutive pieces, of these lengths, lie in `supports`.

    >>> positive, real = constraints.independent(constraints.positive, 1), constraints.real_vector
    >>> product_of([positive, real], [1, 2]).check(torch.tensor([[1.0, 2, 3], [-1, 2, 3]])).tolist()
    [True, False]
    """
    entries = [_entrywise(support) for support in supports]
    if all(entry.event_dim == 0 for entry in entries):
        return constraints.independent(constraints.cat(entries, dim=-1, lengths=lengths), 1)
    return Product(supports, dim=-1, lengths=lengths)


def _entrywise(support: constraints.Constraint) -> constraints.Constraint:
    """The same constraint as one on each entry, where it is one."""
    base = getattr(support, "base_constraint", None)
    return _entrywise(base) if isinstance(support, constraints.independent) and base is not None else support


def support_of(prior: Distribution) -> constraints.Constraint:
    """The prior's support, or a ValueError that says what to add.

    >>> from visbi.priors import BoxUniform
    >>> support_of(BoxUniform(torch.zeros(2), torch.ones(2))).event_dim
    1
    """
    if not has_support(prior):
        cure = "a Distribution with `support` (or pass `theta_transform`)"
        raise ValueError(violation("prior", cure, f"{type(prior).__name__} without one"))
    support = drawn_from(prior)
    assert support is not None
    if support.is_discrete:
        raise ValueError(violation("prior", "a continuous distribution", repr(support)))
    return support


def drawn_from(prior: Distribution) -> constraints.Constraint | None:
    """`prior.support`; of a von Mises distribution the turn that its draws come from.

    Its density is one on a turn, and repeats itself beyond, though torch calls its support real.

    >>> from torch.distributions import VonMises
    >>> drawn_from(VonMises(torch.zeros(2), torch.ones(2))).check(torch.tensor([-3.0, 9.0])).tolist()
    [True, False]
    """
    if isinstance(prior, Independent) and prior.reinterpreted_batch_ndims:
        base = drawn_from(prior.base_dist)
        return None if base is None else constraints.independent(base, prior.reinterpreted_batch_ndims)
    return constraints.interval(-math.pi, math.pi) if isinstance(prior, VonMises) else prior.support


def has_support(prior: Distribution) -> bool:
    """Whether the prior says what its support is."""
    try:
        return prior.support is not None
    except (NotImplementedError, AttributeError):
        return False


def bijection_to(support: constraints.Constraint) -> Transform:
    """A bijection from R^d to `support`: torch's, or our own on a simplex; ValueError if there is none."""
    entry = _entrywise(support)
    if isinstance(entry, constraints.MixtureSameFamilyConstraint) and _has_one_value(entry.base_constraint):
        base = entry.base_constraint
        return bijection_to(base if support is entry else constraints.independent(base, 1))
    if isinstance(support, type(constraints.simplex)):
        return StickBreaking()
    try:
        return biject_to(support)
    except NotImplementedError as error:
        cure = "a support that torch has a bijection for (or pass `theta_transform`)"
        raise ValueError(violation("prior", cure, repr(support))) from error


def _has_one_value(support: constraints.Constraint) -> bool:
    """Whether the bounds are numbers, so that all components of a mixture share them."""
    base = getattr(support, "base_constraint", support)
    return not any(isinstance(entry, Tensor) for entry in vars(base).values())


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
    low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return _bound(low, dim, "amin"), _bound(high, dim, "amax")


def _bound(end: Tensor | float, dim: int, widest: str) -> Tensor:
    bound: Tensor = torch.as_tensor(end).detach().to("cpu", torch.float64)
    if bound.ndim > 1:  # the components of a mixture
        bound = getattr(bound.flatten(0, -2), widest)(0)
    return bound.expand(dim).clone()


def inside(support: constraints.Constraint, theta: Tensor) -> Tensor:
    """Which rows of theta (..., D) lie in the support, (...) bool.

    >>> inside(torch.distributions.constraints.positive, torch.tensor([[1.0, 2.0], [1.0, -1.0]]))
    tensor([ True, False])
    """
    if isinstance(support, constraints.cat):  # torch strings the factors' rows together
        pieces = zip(support.cseq, theta.split(support.lengths, -1), strict=True)
        return torch.stack([inside(factor, piece) for factor, piece in pieces]).all(0)
    if not theta.numel():  # torch cannot
        return torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device)
    mask = support.check(theta)
    extra = mask.ndim - (theta.ndim - 1)
    return mask.all(-1) if extra > 0 else mask
