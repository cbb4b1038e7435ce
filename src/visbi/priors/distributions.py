"""Priors beyond those of torch: boxes, products of unlike factors, truncated normals.

Every prior here is a torch Distribution over vectors: `batch_shape` () and `event_shape` (D,).
`as_prior` is the door: it takes what a user has and returns such a distribution, or says what to write
instead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Uniform, constraints

from visbi.core.checks import violation
from visbi.core.types import Shape

__all__ = ["BoxUniform", "MultipleIndependent", "TruncatedNormal", "as_prior"]


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
        low_, high_ = (
            torch.atleast_1d(torch.as_tensor(end, dtype=None, device=device)) for end in (low, high)
        )
        low_, high_ = (end if end.is_floating_point() else end.float() for end in (low_, high_))
        if low_.device.type != "meta" and not bool((low_ < high_).all() and (high_ - low_).isfinite().all()):
            raise ValueError(violation("low`, `high", "finite corners, low < high in every entry", f"{low}, {high}"))
        super().__init__(Uniform(low_, high_, validate_args=False), reinterpreted_batch_ndims)


class TruncatedNormal(Distribution):
    """A normal distribution restricted to an interval, one per entry.

    The cdf between the bounds is (Phi(a) - Phi(lo)) / (Phi(hi) - Phi(lo)); it is computed in float64 on
    the side of zero where Phi does not round to one.

    Args:
        loc, scale: mean and standard deviation before the truncation, broadcastable.
        low, high: the interval, `-inf` and `inf` allowed.

    Raises:
        ValueError: `scale` not positive, or `low` not below `high`.

    >>> prior = TruncatedNormal(torch.ones(2), 0.5, low=0.0)
    >>> bool((prior.sample((100,)) > 0).all())
    True
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float = 0.0,
        high: Tensor | float = math.inf,
        validate_args: bool | None = None,
    ) -> None:
        tensors = [torch.as_tensor(v) for v in (loc, scale, low, high)]
        dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        tensors = [t.to(tensors[0].device, dtype) for t in tensors]
        self.loc, self.scale, self.low, self.high = torch.broadcast_tensors(*tensors)
        if self.loc.device.type != "meta":
            if not bool((self.scale > 0).all() and self.scale.isfinite().all()):
                raise ValueError(violation("scale", "finite numbers > 0", scale))
            if not bool((self.low < self.high).all()):
                raise ValueError(violation("low`, `high", "low < high in every entry", f"{low}, {high}"))
        super().__init__(self.loc.shape, validate_args=validate_args)

    def _standardised(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds in units of `scale`, mirrored to the lower tail where needed, and the sign used."""
        a = (self.low.double() - self.loc.double()) / self.scale.double()
        b = (self.high.double() - self.loc.double()) / self.scale.double()
        # Phi is precise in its lower tail only, so an interval in the upper tail is mirrored
        sign = torch.where(a > 0, -1.0, 1.0)
        return torch.where(sign > 0, a, -b), torch.where(sign > 0, b, -a), sign

    def _log_mass(self) -> Tensor:
        a, b, _ = self._standardised()
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        return log_b + torch.log1p(-torch.exp(log_a - log_b))

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval, as the simplest torch constraint that describes it."""
        low_open, high_open = bool(torch.isinf(self.low).all()), bool(torch.isinf(self.high).all())
        if low_open and high_open:
            return constraints.real
        if high_open and not bool(torch.isinf(self.low).any()):
            return constraints.greater_than(self.low)
        if low_open and not bool(torch.isinf(self.high).any()):
            return constraints.less_than(self.high)
        return constraints.interval(self.low, self.high)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "TruncatedNormal":  # noqa: N803
        args = [t.expand(batch_shape) for t in (self.loc, self.scale, self.low, self.high)]
        return TruncatedNormal(*args)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability below `value`, in float64."""
        a, b, sign = self._standardised()
        t = sign * (value.double() - self.loc.double()) / self.scale.double()
        lower = torch.special.ndtr(t.clamp(a, b)) - torch.special.ndtr(a)
        part = lower / (torch.special.ndtr(b) - torch.special.ndtr(a))
        return torch.where(sign > 0, part, 1 - part)

    def icdf(self, value: Tensor) -> Tensor:
        """The point below which the probability is `value`, in float64."""
        a, b, sign = self._standardised()
        part = torch.where(sign > 0, value.double(), 1 - value.double())
        low, high = torch.special.ndtr(a), torch.special.ndtr(b)
        t = torch.special.ndtri(low + part * (high - low)).clamp(a, b)
        return self.loc.double() + self.scale.double() * sign * t

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=torch.float64, device=self.loc.device)
        return self.icdf(u).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        t = (value - self.loc) / self.scale
        log_phi = -0.5 * t**2 - 0.5 * math.log(2 * math.pi) - self.scale.log()
        inside = (value >= self.low) & (value <= self.high)
        return torch.where(inside, log_phi - self._log_mass().to(log_phi.dtype), -math.inf)

    @property
    def mean(self) -> Tensor:
        """Mean of the truncated distribution."""
        a = (self.low.double() - self.loc.double()) / self.scale.double()
        b = (self.high.double() - self.loc.double()) / self.scale.double()
        shift = (_phi(a) - _phi(b)) / self._log_mass().exp()
        return (self.loc.double() + self.scale.double() * shift).to(self.loc.dtype)


def _phi(t: Tensor) -> Tensor:
    return torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi)


class MultipleIndependent(Distribution):
    """Joint distribution of independent factors with unlike supports, concatenated along the last axis.

    Args:
        dists: the factors; each has `batch_shape` (D_i,) (univariate entries) or `event_shape` (D_i,).
        validate_args: check values in `log_prob`; None follows torch's setting.
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

    arg_constraints = {}

    def __init__(
        self,
        dists: Sequence[Distribution],
        validate_args: bool | None = None,
        arg_constraints: Mapping[str, constraints.Constraint] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not len(dists):
            raise ValueError(violation("dists", "at least one Distribution", "none"))
        self.dists = [_as_factor(i, d) for i, d in enumerate(dists)]
        if device is not None:
            from visbi.core.devices import move

            self.dists = [move(d, device) for d in self.dists]
        self.dims = [d.event_shape[0] for d in self.dists]
        if arg_constraints:
            self.arg_constraints = dict(arg_constraints)
        super().__init__(torch.Size(), torch.Size([sum(self.dims)]), validate_args=validate_args)

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
    def support(self) -> constraints.Constraint:
        """The product of the factors' supports."""
        supports = [d.support for d in self.dists]
        return constraints.cat(supports, dim=-1, lengths=self.dims)  # type: ignore[arg-type]


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
    if shapes == (1, 1) and dist.batch_shape[0] == 1:
        # one batch entry of a vector distribution: the batch axis carries nothing
        return Independent(dist, 1) if dist.event_shape[0] == 1 else dist.expand(())
    if shapes == (0, 1):
        return dist
    raise ValueError(
        violation(name, "one axis in all (batch_shape (D,) or event_shape (D,))",
                  f"batch_shape {tuple(dist.batch_shape)}, event_shape {tuple(dist.event_shape)}")
    )


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
        raise TypeError(violation(name, "a torch Distribution (with sample and log_prob)", type(prior).__name__))
    batch, event = getattr(prior, "batch_shape", torch.Size()), getattr(prior, "event_shape", None)
    if event is None:
        raise TypeError(violation(name, "a Distribution with `event_shape`", type(prior).__name__))
    if len(event) == 1 and len(batch) == 0:
        return prior
    if len(event) == 0 and (len(batch) == 0 or tuple(batch) == (1,)):
        return Independent(prior.expand((1,)), 1)
    if len(event) == 0 and len(batch) == 1:
        cure = "wrap it: torch.distributions.Independent(prior, 1), or use BoxUniform"
        raise ValueError(violation(name, f"one joint distribution, event_shape (D,); {cure}", f"batch_shape {tuple(batch)}"))
    raise ValueError(
        violation(name, "batch_shape () and event_shape (D,)", f"batch_shape {tuple(batch)}, event_shape {tuple(event)}")
    )
