"""q: one contract, many bodies."""

from visbi.families.base import Body, Draws, Family, LinkedFamily
from visbi.families.custom import DistributionFamily, family_from
from visbi.families.names import CONDITIONAL_NAMES, FAMILY_NAMES, ZukoFlowType, named_body, named_family

__all__ = [
    "CONDITIONAL_NAMES",
    "FAMILY_NAMES",
    "Body",
    "DistributionFamily",
    "Draws",
    "Family",
    "LinkedFamily",
    "ZukoFlowType",
    "family_from",
    "named_body",
    "named_family",
]
