"""The constructor's options of a posterior in one value, for those who keep settings in files."""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from visbi.core.checks import one_of, positive_int
from visbi.core.types import ZScore
from visbi.families.names import FAMILY_NAMES, ZukoFlowType
from visbi.fitting.config import AUTO, METHODS

__all__ = ["VIPosteriorParameters", "family_name"]


def family_name(name: str, value: Any, *, also: tuple[str, ...] = ()) -> str:
    """A family's name from one of `FAMILY_NAMES`, in any case, or from a `ZukoFlowType`.

    Args:
        name: of the argument, for the message.
        value: the name.
        also: names that are accepted beside them.

    Raises:
        ValueError: none of these.
    """
    value = value.value if isinstance(value, ZukoFlowType) else value
    return one_of(name, value.lower() if isinstance(value, str) else value, (*also, *FAMILY_NAMES))


@dataclass(frozen=True, kw_only=True)
class VIPosteriorParameters:
    """Options of `VIPosterior`, with their defaults; in `train_amortized` they stand above the instance's.

    Attributes:
        q: the variational family: "auto", a name, a `ZukoFlowType`, or what else `VIPosterior` takes. To
            amortised fits, which need a name, "auto" is no wish.
        vi_method: the divergence of fits to one observation; amortised fits maximise the ELBO.
        num_transforms, hidden_features: layers and width of flows.
        z_score_theta: the coordinates flows live in: "none", "independent" or "structured".
        z_score_x: how x is standardised in amortised fits.

    Raises:
        ValueError: an unknown name or a number below 1.

    >>> VIPosteriorParameters(q=ZukoFlowType.NSF, num_transforms=3).q
    'nsf'
    """

    q: Any = "maf"
    vi_method: str = METHODS[0]
    num_transforms: int = 5
    hidden_features: int = 50
    z_score_theta: ZScore = "independent"
    z_score_x: ZScore = "independent"

    def __post_init__(self) -> None:
        if isinstance(self.q, str | ZukoFlowType):
            object.__setattr__(self, "q", family_name("q", self.q, also=(AUTO,)))
        one_of("vi_method", self.vi_method, METHODS)
        for name in ("num_transforms", "hidden_features"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        for name in ("z_score_theta", "z_score_x"):
            one_of(name, getattr(self, name), get_args(ZScore))

    @classmethod
    def like(cls, value: Any) -> "VIPosteriorParameters | None":
        """The same options from a dataclass with these fields, as the `sbi` package has one; else None."""
        names = [field.name for field in dataclasses.fields(cls)]
        if isinstance(value, type) or not dataclasses.is_dataclass(value):
            return None
        return cls(**{n: getattr(value, n) for n in names}) if all(hasattr(value, n) for n in names) else None
