"""The first look, where hardly any draw of the prior can be used."""

import math

import pytest
import torch
from torch import Tensor

from visbi.fitting.ladder import climb
from visbi.fitting.target import Target
from visbi.priors import BoxUniform, coordinates


def cube(share: float, dim: int) -> Target:
    """Uniform on a cube that holds this share of the prior's box."""
    side = share ** (1 / dim)

    def log_p(theta: Tensor) -> Tensor:
        return torch.where(((theta > 0.3) & (theta < 0.3 + side)).all(-1), 0.0, -math.inf)

    return Target(log_p, coordinates(BoxUniform(torch.zeros(dim), torch.ones(dim))))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim", [2, 4])
def test_a_few_of_all_draws_that_are_searched_are_enough(dim: int, seed: int):
    """Seven of 32,768, of which the first 4096 often have none: the fit ended there, failed."""
    torch.manual_seed(seed)
    report = climb(cube(2e-4, dim)).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(math.log(2e-4), abs=0.05)


def test_in_more_dimensions_more_are_searched():
    """Seven parameters in order, 1/5040 of the box."""

    def ordered(theta: Tensor) -> Tensor:
        return torch.where((theta[:, 1:] > theta[:, :-1]).all(-1), 0.0, -math.inf)

    torch.manual_seed(2)
    target = Target(ordered, coordinates(BoxUniform(torch.zeros(7), torch.ones(7))))
    report = climb(target).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(-math.log(5040), abs=0.1)
    assert target.n_values > 30_000 and report.n_searched == 128  # led uphill


def test_where_none_can_be_used_that_is_said():
    with pytest.raises(ValueError, match="none at 32768"):
        climb(cube(0.0, 2))
