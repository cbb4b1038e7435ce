"""The families that have a name, each named once.

A name becomes a function d -> Body; `linked` carries the body to a prior's support.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

from visbi.core.checks import one_of, positive_int
from visbi.families.base import Body, LinkedFamily
from visbi.families.coupling import CouplingBody
from visbi.families.gaussian import GaussianBody
from visbi.families.lowrank import LowRankBody
from visbi.families.mixture import MixtureBody
from visbi.priors.transforms import Coordinates

__all__ = [
    "CONDITIONAL_NAMES",
    "FAMILY_NAMES",
    "OPTIONS",
    "ZukoFlowType",
    "name_of",
    "named_body",
    "named_family",
]

_AUTOREGRESSIVE = {"maf": "MAF", "nsf": "NSF", "naf": "NAF", "unaf": "UNAF", "sospf": "SOSPF"}

FAMILY_NAMES = (
    *_AUTOREGRESSIVE,
    "nice",
    "gf",
    "gaussian",
    "gaussian_diag",
    "mixture",
    "coupling",
    "iaf",
    "lowrank",
)
"""Every name that `q=` accepts."""

CONDITIONAL_NAMES = tuple(name for name in FAMILY_NAMES if name not in ("mixture", "lowrank"))
"""Those that have a form q(theta | x), for amortised fits."""

OPTIONS = ("num_transforms", "hidden_features", "num_components", "spline")
"""What `named_body` is told beside the name."""


class ZukoFlowType(Enum):
    """The flows by name, for those who prefer a member to a string; values are in `FAMILY_NAMES`.

    >>> ZukoFlowType.NSF.value
    'nsf'
    """

    GF = "gf"
    MAF = "maf"
    NAF = "naf"
    NICE = "nice"
    NSF = "nsf"
    SOSPF = "sospf"
    UNAF = "unaf"


def _autoregressive(dim: int, flow: str, num_transforms: int, hidden_features: int) -> Body:
    # zuko takes a third of a second to import: only for those who use it
    from visbi.core.spline import spline_flow
    from visbi.core.zuko_import import zuko
    from visbi.families.flows import AutoregressiveBody

    make = spline_flow if flow == "NSF" else getattr(zuko.flows, flow)
    if flow in ("NAF", "UNAF"):
        # the one-dimensional networks inside: as wide as the signal that steers them, not as zuko's 64 x 64
        make = partial(make, network={"hidden_features": [16, 16]})
    return AutoregressiveBody(dim, make, num_transforms=num_transforms, hidden_features=hidden_features)


def _iaf(dim: int, num_transforms: int, hidden_features: int) -> Body:
    from visbi.families.iaf import InverseAutoregressiveBody

    return InverseAutoregressiveBody(dim, num_transforms=num_transforms, hidden_features=hidden_features)


def _nice(dim: int, num_transforms: int, hidden_features: int) -> Body:
    from visbi.families.flows import CouplingFlowBody

    return CouplingFlowBody(dim, num_transforms=num_transforms, hidden_features=hidden_features)


def _gaussianization(dim: int, num_transforms: int) -> Body:
    from visbi.families.flows import GaussianizationBody

    return GaussianizationBody(dim, num_transforms=num_transforms)


def _coupling(dim: int, num_transforms: int, hidden_features: int, spline: bool) -> Body:
    return CouplingBody(dim, num_transforms, hidden_features, spline)


def _mixture(dim: int, num_components: int) -> Body:
    return MixtureBody(dim, num_components)


def named_body(
    name: str,
    *,
    num_transforms: int = 5,
    hidden_features: int = 50,
    num_components: int = 8,
    spline: bool = False,
) -> Callable[[int], Body]:
    """The function d -> Body for a family's name.

    Args:
        name: one of `FAMILY_NAMES`.
        num_transforms: layers of a flow.
        hidden_features: width of a flow's networks.
        num_components: Gaussians of a mixture.
        spline: whether the layers of "coupling" are splines, slower and for several modes, or affine.

    Raises:
        ValueError: unknown name, or a number below 1.

    >>> named_body("gaussian")(3).dim
    3
    """
    one_of("q", name, FAMILY_NAMES)
    positive_int("num_transforms", num_transforms)
    positive_int("hidden_features", hidden_features)
    positive_int("num_components", num_components)
    if name in _AUTOREGRESSIVE:
        return partial(
            _autoregressive,
            flow=_AUTOREGRESSIVE[name],
            num_transforms=num_transforms,
            hidden_features=hidden_features,
        )
    if name == "nice":
        return partial(_nice, num_transforms=num_transforms, hidden_features=hidden_features)
    if name == "iaf":
        return partial(_iaf, num_transforms=num_transforms, hidden_features=hidden_features)
    if name == "lowrank":
        return partial(LowRankBody)
    if name == "gf":
        return partial(_gaussianization, num_transforms=num_transforms)
    if name == "coupling":
        return partial(
            _coupling, num_transforms=num_transforms, hidden_features=hidden_features, spline=bool(spline)
        )
    if name == "mixture":
        return partial(_mixture, num_components=num_components)
    return partial(GaussianBody, diagonal=name == "gaussian_diag")


def named_family(
    name: str, coords: Coordinates, *, num_transforms: int = 5, hidden_features: int = 50
) -> LinkedFamily:
    """The named family on the support that `coords` lead to.

    >>> import torch
    >>> from visbi.priors import BoxUniform, coordinates
    >>> q = named_family("gaussian", coordinates(BoxUniform(torch.zeros(2), torch.ones(2))))
    >>> q.sample((4,)).shape
    torch.Size([4, 2])
    """
    build = named_body(name, num_transforms=num_transforms, hidden_features=hidden_features)
    return LinkedFamily(build(coords.dim_z).to(coords.low.device), coords, build)


def name_of(family: LinkedFamily) -> str | None:
    """The name under which `named_family` made a family, or None.

    >>> import torch
    >>> from visbi.priors import BoxUniform, coordinates
    >>> name_of(named_family("gaussian", coordinates(BoxUniform(torch.zeros(2), torch.ones(2)))))
    'gaussian'
    """
    keywords: dict[str, Any] = getattr(family.build, "keywords", {})
    options = {name: keywords[name] for name in OPTIONS if name in keywords}
    for name in FAMILY_NAMES:
        named: Any = named_body(name, **options)
        if named.func is getattr(family.build, "func", None) and named.keywords == keywords:
            return name
    return None
