"""Families that are a user's own: torch Distributions, module distributions, and callables that build one.

The distribution's support decides whether it needs the link: one that already lives inside the prior's support is
used as it is; one on an unbounded space, for a bounded prior, is carried over by the coordinates.

What trains are the tensors given as `parameters=` and those of `modules=`, or else what the distribution shows
itself: `parameters()`, or leaf tensors with `requires_grad` among its attributes and those of its bases.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.families.base import Draws, Family, path_part
from visbi.priors.supports import bounds
from visbi.priors.transforms import Coordinates

__all__ = ["DistributionFamily", "family_from", "trainable_tensors"]


class DistributionFamily(Family):
    """A torch Distribution as a family.

    Args:
        distribution: over vectors (D,), or over z (d,) if `coords` is given.
        trainable: the tensors to optimise; parts of the distribution, not copies.
        coords: carry the distribution to the prior's support, or None if it lives there.
        rebuild: makes a fresh distribution and its trainable tensors, or None if the given object is all there is;
            then `fresh` puts a snapshot of its tensors back.
    """

    def __init__(
        self,
        distribution: Any,
        trainable: Iterable[Tensor],
        coords: Coordinates | None = None,
        rebuild: Callable[[], "DistributionFamily"] | None = None,
    ) -> None:
        super().__init__()
        self.distribution = distribution
        self._trainable = list(trainable)
        self.coords = coords
        self._rebuild = rebuild
        self._snapshot = [t.detach().clone() for t in self._trainable]
        self.reparameterised = self.has_rsample = bool(getattr(distribution, "has_rsample", False))
        dim = coords.dim_theta if coords is not None else distribution.event_shape[0]
        self.event_shape = torch.Size([dim])

    def trainable(self) -> list[Tensor]:
        return self._trainable

    def draw(self, n: int, *, path: bool = True) -> Draws:
        shape = torch.Size([n])
        z = self.distribution.rsample(shape) if self.reparameterised else self.distribution.sample(shape)
        log_q = self.distribution.log_prob(z).double()
        log_q_path = None
        if path and self.reparameterised and torch.is_grad_enabled():
            leaf = z.detach().requires_grad_()
            at_leaf = self.distribution.log_prob(leaf).sum()
            score = torch.autograd.grad(at_leaf, leaf)[0] if at_leaf.requires_grad else torch.zeros_like(z)
            log_q_path = path_part(log_q, z, score)
        if self.coords is None:
            return Draws(z, log_q, log_q_path)
        theta, ladj = self.coords.to_theta(z)
        return Draws(theta, log_q - ladj, None if log_q_path is None else log_q_path - ladj)

    def log_prob(self, theta: Tensor) -> Tensor:
        if self.coords is not None:
            contained = self.coords.contains(theta)
            z, ladj = self.coords.to_z(theta)
            log_q = self.distribution.log_prob(z.to(theta.dtype)).double() - ladj
        else:
            support = getattr(self.distribution, "support", None)
            contained = support.check(theta) if support is not None else torch.isfinite(theta).all(-1)
            contained = contained.all(-1) if contained.ndim == theta.ndim else contained
            inside = theta[contained]
            log_q = torch.full(theta.shape[:-1], -torch.inf, dtype=torch.float64, device=theta.device)
            if len(inside):
                log_q = log_q.masked_scatter(contained, self.distribution.log_prob(inside).double())
        return torch.where(contained & ~log_q.isnan(), log_q, -torch.inf)

    def fresh(self) -> "DistributionFamily":
        if self._rebuild is not None:
            return self._rebuild()
        with torch.no_grad():
            for tensor, start in zip(self._trainable, self._snapshot, strict=True):
                tensor.copy_(start)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "DistributionFamily":
        super()._apply(fn, recurse)
        for tensor in self._trainable:
            tensor.data = fn(tensor.data)
        return self


def family_from(
    q: Any,
    coords: Coordinates,
    *,
    parameters: Iterable[Tensor] | None = None,
    modules: Iterable[nn.Module] | None = None,
    device: str = "cpu",
) -> Family:
    """A family from a user's Distribution, or from a callable (event_shape, link_transform, device) -> Distribution.

    Args:
        q: the object or callable. A `Family` passes unchanged.
        coords: coordinates of the prior.
        parameters, modules: what to train; None lets the distribution say.
        device: handed to the callable.

    Raises:
        TypeError: neither of these. ValueError: nothing to train, or the wrong event shape.
    """
    if isinstance(q, Family):
        return q
    if isinstance(q, Distribution) or (callable(getattr(q, "log_prob", None)) and callable(getattr(q, "sample", None))):
        return _from_distribution(q, coords, parameters, modules)
    if callable(q):
        event_shape, link = torch.Size([coords.dim_theta]), coords.transform().inv

        def build() -> DistributionFamily:
            built = q(event_shape, link, device=device)
            family = _from_distribution(built, coords, None, None)
            family._rebuild = build
            return family

        return build()
    raise TypeError(violation("q", "a family's name, a Distribution, a VIPosterior or a callable", type(q).__name__))


def _from_distribution(
    q: Any, coords: Coordinates, parameters: Iterable[Tensor] | None, modules: Iterable[nn.Module] | None
) -> DistributionFamily:
    shape = tuple(q.event_shape)
    if len(shape) != 1 or tuple(getattr(q, "batch_shape", ())) != ():
        raise ValueError(violation("q", "event_shape (D,) and batch_shape ()", f"{shape}, {tuple(q.batch_shape)}"))
    needs_link = shape[0] == coords.dim_z and _unbounded(q, shape[0]) and not _unbounded(coords, coords.dim_theta)
    if not needs_link and shape[0] != coords.dim_theta:
        raise ValueError(violation("q", f"event_shape ({coords.dim_theta},) as the prior's", shape))
    tensors = trainable_tensors(q, parameters, modules)
    return DistributionFamily(q, tensors, coords if needs_link else None)


def _unbounded(q: Any, dim: int) -> bool:
    support = getattr(q, "support", None)
    if support is None:
        return True
    low, high = bounds(support, dim)
    return bool(low.isinf().all() and high.isinf().all())


def trainable_tensors(
    q: Any, parameters: Iterable[Tensor] | None = None, modules: Iterable[nn.Module] | None = None
) -> list[Tensor]:
    """The leaf tensors to optimise, each once.

    Raises:
        ValueError: there are none.
    """
    if parameters is not None or modules is not None:
        found = list(parameters or ()) + [p for m in modules or () for p in m.parameters()]
    elif callable(getattr(q, "parameters", None)):
        found = list(q.parameters())
    else:
        found = _leaves(q, set())
    unique = list({id(t): t for t in found if isinstance(t, Tensor) and t.requires_grad}.values())
    if not unique:
        raise ValueError(
            violation("q", "trainable parameters (pass `parameters=` or `modules=`)", f"{type(q).__name__} without any")
        )
    if any(not t.is_leaf for t in unique):
        raise ValueError(violation("parameters", "leaf tensors with requires_grad", "a computed tensor"))
    return unique


def _leaves(value: Any, seen: set[int]) -> list[Tensor]:
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        # broadcasting inside torch's distributions leaves views of the user's leaf
        base = value._base if value._base is not None else value
        return [base] if base.requires_grad and base.is_leaf else []
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, Distribution | torch.distributions.Transform):
        return [t for entry in vars(value).values() for t in _leaves(entry, seen)]
    if isinstance(value, list | tuple):
        return [t for entry in value for t in _leaves(entry, seen)]
    return []


