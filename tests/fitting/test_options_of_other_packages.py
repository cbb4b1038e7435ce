"""Options in classes of other packages that have the names of ours."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from visbi.families import ZukoFlowType
from visbi.fitting.amortized_config import Choice, chosen_config
from visbi.fitting.parameters import VIPosteriorParameters


class TheirFlowType(Enum):
    NSF = "nsf"
    BPF = "bpf"


@dataclass
class Parameters:
    """In the shape of the sbi package's, with one field more."""

    q: Any = "maf"
    vi_method: str = "rKL"
    num_transforms: int = 2
    hidden_features: int = 8
    z_score_theta: str = "none"
    z_score_x: str = "structured"
    other: int = 0


@dataclass
class Fewer:
    q: str = "maf"


def test_parameters_with_our_fields() -> None:
    config = chosen_config(Choice(hidden_features=7), Parameters(q="NSF"))
    assert (config.flow_type, config.hidden_features, config.num_transforms) == ("nsf", 7, 2)
    assert (config.z_score_theta, config.z_score_x) == ("none", "structured")


@pytest.mark.parametrize("value", [Fewer(), Parameters, None, "maf", object()])
def test_without_them(value: Any) -> None:
    assert VIPosteriorParameters.like(value) is None


def test_theirs_are_checked_like_ours() -> None:
    with pytest.raises(ValueError, match="`num_transforms`"):
        chosen_config(Parameters(num_transforms=0))
    with pytest.raises(TypeError, match="`params`: expected a VIPosteriorParameters or None; got Fewer"):
        chosen_config(Fewer())


@pytest.mark.parametrize("flow_type", ["nsf", ZukoFlowType.NSF, TheirFlowType.NSF])
def test_flow_types(flow_type: Any) -> None:
    instance = VIPosteriorParameters()
    assert chosen_config(Choice(flow_type), instance).flow_type == "nsf"


def test_a_flow_type_that_we_lack() -> None:
    with pytest.raises(ValueError, match=r"`flow_type`: expected one of .*; got 'bpf'"):
        chosen_config(Choice(TheirFlowType.BPF), VIPosteriorParameters())
