"""Families: named ones by name and weights; found ones by their body; of a user's own, the weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visbi.core.checks import violation
from visbi.core.encoding import Given, Kind, Unstorable, described
from visbi.core.random import seeded
from visbi.families import FAMILY_NAMES, Family, LinkedFamily, family_from, named_body
from visbi.families.affine import AffineBody
from visbi.families.base import Body
from visbi.families.custom import DistributionFamily
from visbi.families.names import OPTIONS
from visbi.fitting.auto import no_rebuilding
from visbi.priors.transforms import Coordinates
from visbi.saving.modules import dataclass_kind, weights_of, with_weights

__all__ = ["FAMILIES", "UsersFamily"]


def _name_and_options(build: Any) -> tuple[str, dict[str, Any]]:
    """The call of `named_body` that made `build`."""
    keywords: dict[str, Any] = getattr(build, "keywords", {})
    options = {name: keywords[name] for name in OPTIONS if name in keywords}
    for name in FAMILY_NAMES:
        named: Any = named_body(name, **options)
        if named.func is getattr(build, "func", None) and named.keywords == keywords:
            return name, options
    raise Unstorable("a family that has no name")


def _named_body(name: str, options: dict[str, Any], dim: int) -> Body:
    with seeded(0):
        return named_body(name, **options)(dim)


def _shapes(body: Body) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in body.state_dict().items()}


def _linked_fields(family: LinkedFamily) -> dict[str, Any]:
    if family.build is no_rebuilding:
        return {"coords": family.coords, "body": family.body}
    name, options = _name_and_options(family.build)
    body, places = family.body, []
    while type(body) is AffineBody:
        places.append((body.loc, body.scale_tril))
        body = body.inner
    again = _named_body(name, options, body.dim)
    if type(again) is not type(body) or _shapes(again) != _shapes(body):
        raise Unstorable(f"a family {name!r} with another body")
    return {
        "name": name,
        "options": options,
        "dim": body.dim,
        "coords": family.coords,
        "places": places,
        "weights": weights_of(body),
    }


def _linked(coords: Coordinates, body: Body | None = None, **named: Any) -> LinkedFamily:
    if body is None:
        return _named(coords, **named)
    if not isinstance(body, Body) or body.dim != coords.dim_z:
        raise TypeError(f"a body that is {described(body)}, not one over R^{coords.dim_z}")
    return LinkedFamily(body, coords, no_rebuilding)


def _named(
    coords: Coordinates,
    name: str,
    options: dict[str, Any],
    dim: int,
    places: list[tuple[Tensor, Tensor]],
    weights: dict[str, Any],
) -> LinkedFamily:
    body: Body = with_weights(_named_body(name, options, dim), weights)
    for loc, scale_tril in reversed(places):
        body = AffineBody(body, loc, scale_tril)
    return LinkedFamily(body, coords, named_body(name, **options))


@dataclass(frozen=True)
class UsersFamily:
    """In the place of a q that is a user's own.

    Attributes:
        q, parameters, modules: given, as to `VIPosterior`.
        tensors: what trains.
        start: the same as it began.
        buffers: other tensors of a module, by name.
    """

    q: Any
    parameters: Any
    modules: Any
    tensors: list[Tensor]
    start: list[Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, family: Family) -> "UsersFamily":
        """What is stored of `family`."""
        tensors = family.trainable()
        start = family.start if isinstance(family, DistributionFamily) else tensors
        return cls(
            q=Given("q", what=described(getattr(family, "distribution", family))),
            parameters=Given("parameters", required=False),
            modules=Given("modules", required=False),
            tensors=list(tensors),
            start=list(start),
            buffers=_own_buffers(family),
        )

    @torch.no_grad()
    def made(self, coords: Coordinates) -> Family:
        """The family, its stored weights written into the tensors of `q`.

        Raises:
            TypeError, ValueError: `q` is nothing that can be one, or trains tensors of other shapes.
        """
        with torch.enable_grad():
            family = family_from(self.q, coords, parameters=self.parameters, modules=self.modules)
        buffers = _own_buffers(family)
        ours = [tuple(t.shape) for t in (*self.tensors, *self.buffers.values())]
        theirs = [tuple(t.shape) for t in (*family.trainable(), *buffers.values())]
        if ours != theirs or buffers.keys() != self.buffers.keys():
            raise ValueError(violation("q", f"what was saved, with tensors of shapes {ours}", theirs))
        for tensor, stored in zip(family.trainable(), self.tensors, strict=True):
            tensor.copy_(stored)
        for name, buffer in buffers.items():
            buffer.copy_(self.buffers[name])
        if isinstance(family, DistributionFamily):
            family.start = [stored.clone() for stored in self.start]
        return family


def _own_buffers(family: Family) -> dict[str, Tensor]:
    return {name: b for name, b in family.named_buffers() if not name.startswith("coords.")}


FAMILIES = (
    Kind("LinkedFamily", LinkedFamily, _linked_fields, _linked),
    dataclass_kind(UsersFamily),
)
"""Kinds of families."""
