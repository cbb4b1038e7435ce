"""Priors beyond those of torch, boxes and products of unlike factors, and the door for every prior.

Every prior here is a torch Distribution over vectors: `batch_shape` () and `event_shape` (D,).
`as_prior` is the door: it takes what a user has and returns such a distribution, or says what to write
instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Uniform, constraints

from visbi.core.checks import violation
from visbi.core.devices import move
from visbi.core.types import Shape
from visbi.priors.supports import drawn_from, product_of

__all__ = ["BoxUniform", "MultipleIndependent", "as_prior"]


class BoxUniform(Independent):
    """Uniform density on a box.

    Args:
        low: lower corner, (D,) or a number.
        high: upper corner, (D,) or a number; above `low` in every entry.
        reinterpreted_batch_ndims: how many trailing dimensions form one event.
        device: where the corners live; None leaves them where they are.

    Raises:
        ValueError: a corner is not finite, or `low` is not below `high`.

    >>> prior = BoxUniform(low=torch.zeros(2), high=torch.ones(2))
    >>> prior.sample((5,)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        low: Tensor | float,
        high: Tensor | float,
        reinterpreted_batch_ndims: int = 1,
        device: str | torch.device | None = None,
    ) -> None:
        low_, high_ = (torch.atleast_1d(torch.as_tensor(end, device=device)) for end in (low, high))
        try:
            low_, high_ = torch.broadcast_tensors(*(_floating(end) for end in (low_, high_)))
        except RuntimeError as error:
            shapes = f"{tuple(low_.shape)} and {tuple(high_.shape)}"
            raise ValueError(violation("low`, `high", "corners of one shape", shapes)) from error
        if low_.device.type != "meta" and not bool((low_ < high_).all() and (high_ - low_).isfinite().all()):
            expected = "finite corners, low < high in every entry"
            raise ValueError(violation("low`, `high", expected, f"{low}, {high}"))
        super().__init__(Uniform(low_, high_, validate_args=False), reinterpreted_batch_ndims)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "BoxUniform":
        new = self._get_checked_instance(BoxUniform, _instance)
        return super().expand(torch.Size(batch_shape), _instance=new)


def _floating(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


class MultipleIndependent(Distribution):
    """Joint distribution of independent factors with unlike supports, concatenated along the last axis.

    Args:
        dists: the factors; each has `batch_shape` (D_i,) (univariate entries) or `event_shape` (D_i,).
        validate_args: accepted like everywhere in torch; each factor checks values by its own setting.
        arg_constraints: accepted for compatibility; extra constraints on arguments, usually empty.
        device: where to move the factors; None leaves them where they are.

    Raises:
        ValueError: no factor, or a factor that is not one-dimensional.
        TypeError: a factor is no Distribution.

    >>> from torch.distributions import Beta, HalfCauchy
    >>> prior = MultipleIndependent([Beta(torch.ones(2), 2.0), HalfCauchy(torch.ones(1))])
    >>> prior.log_prob(prior.sample((4,))).shape
    torch.Size([4])
    """

    def __init__(
        self,
        dists: Sequence[Distribution],
        validate_args: bool | None = None,
        arg_constraints: Mapping[str, constraints.Constraint] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if isinstance(dists, Distribution):
            raise TypeError(violation("dists", "a list of Distributions", type(dists).__name__))
        if not len(dists):
            raise ValueError(violation("dists", "at least one Distribution", "none"))
        self.dists = [_as_factor(i, d) for i, d in enumerate(dists)]
        if device is not None:
            self.dists = [move(d, device) for d in self.dists]
        self.dims = [d.event_shape[0] for d in self.dists]
        self._arg_constraints = dict(arg_constraints or {})
        super().__init__(torch.Size(), torch.Size([sum(self.dims)]), validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """What was given; the factors check their own arguments."""
        return self._arg_constraints

    def _split(self, value: Tensor) -> list[Tensor]:
        return list(value.split(self.dims, dim=-1))

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        with torch.no_grad():
            return torch.cat([d.sample(torch.Size(sample_shape)) for d in self.dists], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape[-1] != self.event_shape[0]:
            raise ValueError(violation("value", f"shape (..., {self.event_shape[0]})", tuple(value.shape)))
        parts = zip(self.dists, self._split(value), strict=True)
        return torch.stack([d.log_prob(v) for d, v in parts]).sum(0)

    @property
    def mean(self) -> Tensor:
        """Means of the factors, (D,)."""
        return torch.cat([d.mean for d in self.dists], dim=-1)

    @property
    def variance(self) -> Tensor:
        """Variances of the factors, (D,)."""
        return torch.cat([d.variance for d in self.dists], dim=-1)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The product of the factors' supports."""
        return product_of([drawn_from(d) for d in self.dists], self.dims)  # type: ignore[misc]


def _as_factor(index: int, dist: Any) -> Distribution:
    name = f"dists[{index}]"
    if not isinstance(dist, Distribution):
        raise TypeError(violation(name, "a torch Distribution", type(dist).__name__))
    if isinstance(dist, MultipleIndependent):
        return dist
    shapes = (len(dist.batch_shape), len(dist.event_shape))
    if shapes == (0, 0):
        return Independent(dist.expand((1,)), 1)
    if shapes == (1, 0):
        return Independent(dist, 1)
    if shapes == (0, 1):
        return dist
    expected = "one axis in all (batch_shape (D,) or event_shape (D,))"
    raise ValueError(violation(name, expected, _shapes(dist)))


def _shapes(dist: Any) -> str:
    return f"batch_shape {tuple(dist.batch_shape)}, event_shape {tuple(dist.event_shape)}"


def as_prior(prior: Any, name: str = "prior") -> Distribution:
    """`prior` as a Distribution with `event_shape` (D,), whatever D.

    A scalar distribution becomes one over vectors of length 1. Anything that has `sample` and `log_prob`
    of the right shapes passes unchanged, so priors of other packages are used as they are.

    Raises:
        TypeError: no `sample` or no `log_prob`.
        ValueError: a batch of distributions where one joint distribution is meant.

    >>> from torch.distributions import Normal
    >>> as_prior(Normal(0.0, 1.0)).event_shape
    torch.Size([1])
    """
    if not (callable(getattr(prior, "sample", None)) and callable(getattr(prior, "log_prob", None))):
        expected = "a torch Distribution (with sample and log_prob)"
        raise TypeError(violation(name, expected, type(prior).__name__))
    batch, event = getattr(prior, "batch_shape", torch.Size()), getattr(prior, "event_shape", None)
    if event is None:
        raise TypeError(violation(name, "a Distribution with `event_shape`", type(prior).__name__))
    if isinstance(prior, type):
        raise TypeError(violation(name, "a Distribution", f"the class {prior.__name__}"))
    if len(event) == 1 and len(batch) == 0:
        return prior
    if len(event) == 0 and (len(batch) == 0 or tuple(batch) == (1,)):
        return Independent(prior.expand((1,)), 1)
    if len(event) == 0 and len(batch) == 1:
        cure = "wrap it: torch.distributions.Independent(prior, 1), or use BoxUniform"
        expected = f"one joint distribution, event_shape (D,); {cure}"
        raise ValueError(violation(name, expected, f"batch_shape {tuple(batch)}"))
    raise ValueError(violation(name, "batch_shape () and event_shape (D,)", _shapes(prior)))
