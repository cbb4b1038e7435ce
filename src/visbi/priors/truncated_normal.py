r"""The normal distribution restricted to an interval, exact however far out the interval lies.

With a, b the bounds in units of `scale` from `loc` and Phi the standard normal cdf,

    F(t) = (Phi(t) - Phi(a)) / (Phi(b) - Phi(a)),   F^-1(u) = Phi^-1(Phi(a) + u (Phi(b) - Phi(a))).

Phi has digits only in its lower tail, so an interval above `loc` is mirrored; and Phi underflows beyond 38
standard deviations, so it is handled as a logarithm and inverted from its logarithm by Newton steps. All in
float64.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from visbi.core.checks import violation
from visbi.core.types import Shape

__all__ = ["TruncatedNormal"]

_NEWTON_STEPS = 4
_LOG_SMALL = -690.0  # exp of less is close to underflow in float64


class TruncatedNormal(Distribution):
    """A normal distribution restricted to an interval, one per entry.

    Args:
        loc, scale: mean and standard deviation before the truncation, broadcastable.
        low, high: the interval, `-inf` and `inf` allowed.
        validate_args: accepted like everywhere in torch; values outside the interval have log-density -inf.

    Raises:
        ValueError: `loc` not finite, `scale` not positive, or `low` not below `high`.

    >>> prior = TruncatedNormal(torch.ones(2), 0.5, low=0.0)
    >>> bool((prior.sample((100,)) > 0).all())
    True
    """

    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float = 0.0,
        high: Tensor | float = math.inf,
        validate_args: bool | None = None,
    ) -> None:
        given = (loc, scale, low, high)
        device = next((v.device for v in given if isinstance(v, Tensor)), torch.device("cpu"))
        tensors = [torch.as_tensor(v) for v in given]
        dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        self.loc, self.scale, self.low, self.high = torch.broadcast_tensors(
            *(t.to(device, dtype) for t in tensors)
        )
        if self.loc.device.type != "meta":
            if not bool(self.loc.isfinite().all()):
                raise ValueError(violation("loc", "finite numbers", loc))
            if not bool((self.scale > 0).all() and self.scale.isfinite().all()):
                raise ValueError(violation("scale", "finite numbers > 0", scale))
            if not bool((self.low < self.high).all()):
                raise ValueError(violation("low`, `high", "low < high in every entry", f"{low}, {high}"))
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None: arguments are checked at construction."""
        return {}

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The interval, as the simplest torch constraint that describes it."""
        kinds = torch.stack([self.low.isinf(), self.high.isinf()], -1).reshape(-1, 2).unique(dim=0)
        if len(kinds) == 1:
            return _constraint(self.low, self.high, *kinds[0].tolist())
        if self.loc.ndim > 1:
            return constraints.interval(self.low, self.high)
        entries = [
            _constraint(low, high, bool(low.isinf()), bool(high.isinf()))
            for low, high in zip(self.low, self.high, strict=True)
        ]
        return constraints.cat(entries, dim=-1, lengths=[1] * len(entries))  # type: ignore[arg-type]

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "TruncatedNormal":
        args = [t.expand(batch_shape) for t in (self.loc, self.scale, self.low, self.high)]
        return TruncatedNormal(*args)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability below `value`, in float64."""
        a, b, sign = self._bounds()
        t = (sign * (value.double() - self.loc.double()) / self.scale.double()).clamp(a, b)
        log_part = _log_ndtr_between(a, t) - _log_ndtr_between(a, b)
        return torch.where(sign > 0, log_part.exp(), -torch.expm1(log_part))

    def icdf(self, value: Tensor) -> Tensor:
        """The point below which the probability is `value`, in float64."""
        a, b, sign = self._bounds()
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        part = torch.where(sign > 0, value.double(), 1 - value.double())
        below = torch.exp(log_a - log_b)
        t = _ndtri_exp(log_b + torch.log(below + part * (1 - below))).clamp(a, b)
        return self.loc.double() + self.scale.double() * sign * t

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=torch.float64, device=self.loc.device)
        return self.icdf(u).to(self.loc.dtype).clamp(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        t = (value.double() - self.loc.double()) / self.scale.double()
        log_p = _log_phi(t) - self.scale.double().log() - self._log_mass()
        inside = (value >= self.low) & (value <= self.high)
        return torch.where(inside, log_p, -math.inf).to(torch.promote_types(value.dtype, self.loc.dtype))

    @property
    def mean(self) -> Tensor:
        """Mean of the truncated distribution."""
        a, b = self._standardised()
        log_mass = self._log_mass()
        t = (torch.exp(_log_phi(a) - log_mass) - torch.exp(_log_phi(b) - log_mass)).clamp(a, b)
        return (self.loc.double() + self.scale.double() * t).to(self.loc.dtype)

    def _standardised(self) -> tuple[Tensor, Tensor]:
        """The bounds in units of `scale` from `loc`."""
        return self._unit(self.low.double()), self._unit(self.high.double())

    def _unit(self, end: Tensor) -> Tensor:
        infinite = end.isinf()
        loc = self.loc.double()
        # infinity divided by a scale has no gradient with respect to it
        return torch.where(infinite, end, (torch.where(infinite, loc, end) - loc) / self.scale.double())

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, mirrored to the lower tail where they lie in the upper one, and the sign used."""
        a, b = self._standardised()
        sign = torch.where(a > 0, -1.0, 1.0)
        return torch.where(sign > 0, a, -b), torch.where(sign > 0, b, -a), sign

    def _log_mass(self) -> Tensor:
        a, b, _ = self._bounds()
        return _log_ndtr_between(a, b)


def _constraint(low: Tensor, high: Tensor, low_open: bool, high_open: bool) -> constraints.Constraint:
    if low_open and high_open:
        return constraints.real
    if high_open:
        return constraints.greater_than(low)
    return constraints.less_than(high) if low_open else constraints.interval(low, high)


def _log_phi(t: Tensor) -> Tensor:
    return -0.5 * t.square() - 0.5 * math.log(2 * math.pi)


def _log_ndtr_between(a: Tensor, t: Tensor) -> Tensor:
    """log(Phi(t) - Phi(a)) for a <= t."""
    log_a, log_t = torch.special.log_ndtr(a), torch.special.log_ndtr(t)
    share = torch.where(log_t.isinf(), 0.0, -torch.expm1(log_a - log_t))
    return log_t + share.log()


def _ndtri_exp(log_p: Tensor) -> Tensor:
    """Phi^-1(exp(log_p)), also where exp(log_p) underflows; differentiable.

    log Phi is concave and nearly -t^2 / 2 in the tail, so Newton steps from there converge from the left.
    """
    with torch.no_grad():
        t = torch.special.ndtri(log_p.clamp_min(_LOG_SMALL).exp())
        s = -torch.sqrt(-2 * log_p.clamp_max(_LOG_SMALL))
        for _ in range(_NEWTON_STEPS):
            s = s - (torch.special.log_ndtr(s) - log_p) / _slope(s)
        t = torch.where(log_p < _LOG_SMALL, torch.where(log_p.isinf(), -math.inf, s), t)
        finite = torch.isfinite(t)
        slope = torch.where(finite, _slope(t), 1.0)
    return t + torch.where(finite, log_p - log_p.detach(), 0.0) / slope


def _slope(t: Tensor) -> Tensor:
    """d log Phi / dt."""
    return torch.exp(_log_phi(t) - torch.special.log_ndtr(t))
