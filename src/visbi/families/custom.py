"""Families that are a user's own: torch Distributions, module distributions, and callables that build one.

The distribution's support decides whether it needs the link: one that already lives inside the prior's
support is used as it is; one on an unbounded space, for a bounded prior, is carried over by the coordinates.

What trains are the tensors given as `parameters=` and those of `modules=`, or else what the distribution
shows itself: `parameters()`, or leaf tensors with `requires_grad` among its attributes and those of its
bases. A tensor computed from others, as in `Normal(loc, log_scale.exp())`, does not change when they do: an
`nn.Module` that builds its distribution in every call is the cure.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from visbi.core.checks import violation
from visbi.families.base import Draws, Family, kept_inside, path_part
from visbi.families.tied import computed, moved, portable
from visbi.priors.supports import bounds, inside
from visbi.priors.transforms import Coordinates

__all__ = ["DistributionFamily", "family_from", "trainable_tensors"]


class DistributionFamily(Family):
    """A torch Distribution as a family.

    Args:
        distribution: over vectors (D,), or over z (d,) if `coords` is given.
        trainable: the tensors to optimise; parts of the distribution, not copies.
        coords: carry the distribution to the prior's support, or None if it lives there.
        rebuild: makes a fresh family like this one, or None if the given object is all there is; then `fresh`
            puts `start` back.

    Attributes:
        start: the trainable tensors as they were, for `fresh`.
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
        self.start = [t.detach().clone() for t in self._trainable]
        rsample = callable(getattr(distribution, "rsample", None))
        self.reparameterised = self.has_rsample = bool(getattr(distribution, "has_rsample", rsample))
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
            contained, safe = kept_inside(self.coords, theta)
            z, ladj = self.coords.to_z(safe)
            log_q = self.distribution.log_prob(z.to(theta.dtype)).double() - ladj
            return torch.where(contained & ~log_q.isnan(), log_q, -torch.inf)
        support, contained = _support(self.distribution), torch.isfinite(theta).all(-1)
        if support is not None:
            contained = contained & inside(support, theta)
        log_q = torch.full(theta.shape[:-1], -torch.inf, dtype=torch.float64, device=theta.device)
        if not bool(contained.any()):
            return log_q
        log_q = log_q.masked_scatter(contained, self.distribution.log_prob(theta[contained]).double())
        return torch.where(log_q.isnan(), -torch.inf, log_q)

    def fresh(self) -> "DistributionFamily":
        if self._rebuild is not None:
            return self._rebuild()
        with torch.no_grad():
            for tensor, start in zip(self._trainable, self.start, strict=True):
                tensor.copy_(start)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if "distribution" in state:  # a module keeps its own tensors, and stands elsewhere
            state["distribution"] = portable(self.distribution)
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> "DistributionFamily":
        super()._apply(fn, recurse)
        if all(fn(t.data).data_ptr() == t.data_ptr() for t in self._trainable):
            return self  # already there
        self.distribution = moved(self.distribution, self._trainable, fn)
        self.start = [fn(t) for t in self.start]
        return self


def family_from(
    q: Any,
    coords: Coordinates,
    *,
    parameters: Iterable[Tensor] | None = None,
    modules: Iterable[nn.Module] | None = None,
    device: str = "cpu",
) -> Family:
    """A family from a user's Distribution, or from a callable that builds one.

    Args:
        q: the object, or a callable (event_shape, link_transform, device) -> Distribution. A `Family` passes
            unchanged.
        coords: coordinates of the prior.
        parameters, modules: what to train; None lets the distribution say.
        device: handed to the callable.

    Raises:
        TypeError: neither of these.
        ValueError: nothing to train, or the wrong event shape.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import BoxUniform, coordinates
    >>> loc, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> box = coordinates(BoxUniform(torch.zeros(2), torch.ones(2)))
    >>> family = family_from(Independent(Normal(loc, scale), 1), box)  # carried into the box
    >>> len(family.trainable()), bool((family.sample((100,)) < 1).all())
    (2, True)
    """
    if isinstance(q, Family):
        return q
    if callable(getattr(q, "log_prob", None)) and callable(getattr(q, "sample", None)):
        return _from_distribution(q, coords, parameters, modules)
    if callable(q):
        return _from_callable(q, coords, device, parameters, modules)
    raise TypeError(
        violation("q", "a family's name, a Distribution, a VIPosterior or a callable", type(q).__name__)
    )


def _from_callable(
    q: Callable[..., Any],
    coords: Coordinates,
    device: str,
    parameters: Iterable[Tensor] | None = None,
    modules: Iterable[nn.Module] | None = None,
) -> DistributionFamily:
    built = q(torch.Size([coords.dim_theta]), coords.transform().inv, device=device)
    family = _from_distribution(built, coords, parameters, modules)
    if parameters is None and modules is None:  # those given are the same tensors however often q is called
        family._rebuild = partial(_from_callable, q, coords, device)
    return family


def _from_distribution(
    q: Any, coords: Coordinates, parameters: Iterable[Tensor] | None, modules: Iterable[nn.Module] | None
) -> DistributionFamily:
    shapes = getattr(q, "event_shape", None), getattr(q, "batch_shape", ())
    if shapes[0] is None or len(shapes[0]) != 1 or tuple(shapes[1]) != ():
        got = ", ".join(str(None if shape is None else tuple(shape)) for shape in shapes)
        raise ValueError(violation("q", "event_shape (D,) and batch_shape ()", got))
    dim = shapes[0][0]
    unbounded_prior = _unbounded(coords.support, coords.dim_theta)
    needs_link = dim == coords.dim_z and _unbounded(_support(q), dim) and not unbounded_prior
    if not needs_link and dim != coords.dim_theta:
        raise ValueError(violation("q", f"event_shape ({coords.dim_theta},) as the prior's", f"({dim},)"))
    tensors = trainable_tensors(q, parameters, modules)
    return DistributionFamily(q, tensors, coords if needs_link else None)


def _support(q: Any) -> Constraint | None:
    """Where q lives, None for not said; torch's base class raises where nothing is said."""
    try:
        return getattr(q, "support", None)
    except NotImplementedError:
        return None


def _unbounded(support: Constraint | None, dim: int) -> bool:
    if support is None:
        return True
    low, high = bounds(support, dim)
    return bool(low.isinf().all() and high.isinf().all())


def trainable_tensors(
    q: Any, parameters: Iterable[Tensor] | None = None, modules: Iterable[nn.Module] | None = None
) -> list[Tensor]:
    """The leaf tensors to optimise, each once.

    Args:
        q: a distribution, asked where the other two are None.
        parameters: tensors. modules: modules, for their parameters.

    Raises:
        TypeError: `parameters` holds something else than tensors.
        ValueError: there are none, or they are computed from others.
    """
    if parameters is not None or modules is not None:
        found = list(parameters or ()) + [p for m in modules or () for p in m.parameters()]
    elif callable(getattr(q, "parameters", None)):
        found = list(q.parameters())
    else:
        found = _own_tensors(q, set())
    for tensor in found:
        if not isinstance(tensor, Tensor):
            raise TypeError(violation("parameters", "tensors", type(tensor).__name__))
    unique = list({id(t): t for t in found if t.requires_grad}.values())
    if not unique:
        expected = "trainable parameters (pass `parameters=` or `modules=`)"
        raise ValueError(violation("q", expected, f"{type(q).__name__} without any"))
    if any(not t.is_leaf for t in unique):
        cure = "tensors with requires_grad that are not computed from others (or pass `parameters=`)"
        raise ValueError(violation("parameters", cure, "a computed tensor"))
    return unique


def _own_tensors(value: Any, seen: set[int]) -> list[Tensor]:
    """Tensors among the attributes of a distribution and its parts; for a view, what it looks at."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value if computed(value) or value._base is None else value._base]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, Distribution | torch.distributions.Transform):
        return [t for entry in vars(value).values() for t in _own_tensors(entry, seen)]
    if isinstance(value, list | tuple):
        return [t for entry in value for t in _own_tensors(entry, seen)]
    return []
