"""What a conditional family is built from; apart from it, because that loads zuko."""

from dataclasses import dataclass
from typing import get_args

from visbi.core.checks import one_of, positive_int, violation
from visbi.core.types import ZScore
from visbi.families.names import CONDITIONAL_NAMES, FAMILY_NAMES

__all__ = ["ConditionalConfig"]


@dataclass(frozen=True, kw_only=True)
class ConditionalConfig:
    """What a `ConditionalFamily` is built from.

    Attributes:
        flow_type: one of `CONDITIONAL_NAMES`.
        num_transforms: layers of the flow.
        hidden_features: width of all networks.
        z_score_theta: which coordinates z is in.
        z_score_x: how x is standardised.

    Raises:
        ValueError: an unknown name, one without an amortised form, or a number below 1.
    """

    flow_type: str
    num_transforms: int
    hidden_features: int
    z_score_theta: ZScore
    z_score_x: ZScore

    def __post_init__(self) -> None:
        if one_of("flow_type", self.flow_type, FAMILY_NAMES) not in CONDITIONAL_NAMES:
            expected = f"a family with an amortised form ({', '.join(map(repr, CONDITIONAL_NAMES))})"
            raise ValueError(violation("flow_type", expected, repr(self.flow_type)))
        for name in ("num_transforms", "hidden_features"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        one_of("z_score_theta", self.z_score_theta, get_args(ZScore))
        one_of("z_score_x", self.z_score_x, get_args(ZScore))
