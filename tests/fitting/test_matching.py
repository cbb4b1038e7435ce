"""Where the prior's draws tell that no Gaussian fits none is matched."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from visbi.fitting import looking, matching
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.pool import Pool
from visbi.fitting.target import Target
from visbi.priors import coordinates

PRIOR = MultivariateNormal(torch.zeros(1).double(), torch.eye(1).double())


def looked(log_p) -> Group:
    target = Target(log_p, coordinates(PRIOR))
    (now,) = looking.look(Group(target, [Record()], ALONE, Pool(target)))
    return now


def two(theta: Tensor, sd: float = 0.1) -> Tensor:
    each = [-0.5 * ((theta[:, 0] - side) / sd).square() for side in (-1.0, 1.0)]
    return torch.logaddexp(*each)


@pytest.mark.parametrize("sd", [0.05, 0.1, 0.2])
def test_the_bound_is_that_of_the_gaussian_with_the_same_moments(sd: float):
    """Of two modes that lie apart: their entropy is log 2 above one's."""
    torch.manual_seed(0)
    now = looked(lambda theta: two(theta, sd))
    divergence = math.log(math.hypot(1.0, sd) / sd) - math.log(2)
    assert float(matching._most_in_effect(now)) == pytest.approx(math.exp(-divergence), rel=0.05)


def test_of_a_gaussian_it_is_one():
    torch.manual_seed(0)
    now = looked(lambda theta: -50 * (theta[:, 0] - 0.3).square())
    assert float(matching._most_in_effect(now)) == pytest.approx(1.0, abs=0.02)


def test_the_prior_may_not_tell():
    torch.manual_seed(0)
    now = looked(lambda theta: two(theta, 1e-4))
    assert float(matching._most_in_effect(now)) == 1.0


@pytest.mark.parametrize(("sd", "matches"), [(0.1, False), (1e-4, True)])
def test_none_is_matched_where_none_fits(sd: float, matches: bool):
    torch.manual_seed(0)
    now = looked(lambda theta: two(theta, sd))
    before = now.target.n_gradients
    (rest,) = matching.gaussian(now)
    assert rest is now and (now.target.n_gradients > before) == matches
    (line,) = now.records[0].story
    assert line.startswith("a Gaussian had" if matches else "no Gaussian can have more than 0.")
