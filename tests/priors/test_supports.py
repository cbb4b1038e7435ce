"""What constraints say: bounds, membership, bijections."""

import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Dirichlet,
    Independent,
    MixtureSameFamily,
    Normal,
    Uniform,
    constraints,
)

from prior_cases import PRIORS
from visbi.priors.supports import Product, bijection_to, bounds, inside, product_of, support_of

INF = math.inf
BOUNDS = {
    "real": (constraints.real, [-INF, -INF], [INF, INF]),
    "real vector": (constraints.real_vector, [-INF, -INF], [INF, INF]),
    "nonnegative": (constraints.nonnegative, [0, 0], [INF, INF]),
    "less than": (constraints.less_than(3.0), [-INF, -INF], [3, 3]),
    "unit": (constraints.independent(constraints.unit_interval, 1), [0, 0], [1, 1]),
    "tensor": (constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])), [0, 1], [1, 3]),
    "half open": (constraints.half_open_interval(-1, 1), [-1, -1], [1, 1]),
    "simplex": (constraints.simplex, [0, 0], [1, 1]),
    "cat": (
        constraints.cat([constraints.positive, constraints.less_than(2.0)], -1, [1, 1]),
        [0, -INF],
        [INF, 2],
    ),
}


@pytest.mark.parametrize(("support", "low", "high"), BOUNDS.values(), ids=BOUNDS)
def test_bounds(support, low, high):
    got = bounds(support, 2)
    assert got[0].tolist() == low
    assert got[1].tolist() == high
    assert got[0].dtype is got[1].dtype is torch.float64


def test_bounds_of_a_mixture_hold_all_its_components():
    corners = torch.tensor([[0.0, 5.0], [2.0, 3.0]])
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Uniform(corners, corners + 1), 1))
    low, high = bounds(mixture.support, 2)
    assert (low.tolist(), high.tolist()) == ([0, 3], [3, 6])


def test_bounds_are_their_own():
    low = torch.zeros(2, dtype=torch.float64)
    bounds(constraints.greater_than(low), 2)[0].add_(1)
    assert low.tolist() == [0, 0]


@pytest.mark.parametrize("case", PRIORS.values(), ids=PRIORS)
def test_draws_are_inside_and_a_bijection_leads_there(case):
    support = support_of(case.prior)
    theta = case.prior.sample((3, 5))
    assert inside(support, theta).shape == (3, 5)
    assert inside(support, theta).all()
    if isinstance(support, Product):  # coordinates take it factor by factor
        return
    link = bijection_to(support)
    y = torch.randn(20, link.inverse_shape(theta.shape)[-1], dtype=torch.float64)
    assert inside(support, link(y)).all()


def test_one_entry_outside_is_enough():
    theta = torch.tensor([[0.5, 0.5], [0.5, 1.5], [-0.5, 0.5]])
    for support in (constraints.unit_interval, constraints.independent(constraints.unit_interval, 1)):
        assert inside(support, theta).tolist() == [True, False, False]
    assert inside(constraints.simplex, theta).tolist() == [True, False, False]
    assert not inside(constraints.simplex, torch.tensor([0.5, 0.6]))


def test_no_bijection():
    with pytest.raises(ValueError, match=r"^`prior`: expected a support that torch has a bijection for"):
        bijection_to(constraints.integer_interval(0, 3))
    assert bijection_to(Dirichlet(torch.ones(3)).support).domain is constraints.real_vector


def test_no_support():
    class Silent(Normal):
        support = None

    with pytest.raises(
        ValueError, match=r"^`prior`: expected a Distribution with `support` .*; got Silent without one$"
    ):
        support_of(Silent(0.0, 1.0))


def test_a_product_of_entries_is_one_of_torch_and_has_its_bijection():
    support = product_of([constraints.independent(constraints.positive, 1), constraints.real_vector], [2, 1])
    theta = torch.tensor([[1.0, 2.0, -3.0], [1.0, -2.0, 3.0]])
    assert support.check(theta).tolist() == [True, False]
    assert support.check(theta[0])
    link = bijection_to(support)
    y = torch.randn(20, 3)
    torch.testing.assert_close(link.inv(link(y)), y, rtol=1e-4, atol=1e-4)
    assert link.log_abs_det_jacobian(y, link(y)).shape == (20,)


def test_a_product_with_a_simplex_checks_rows():
    support = product_of([constraints.independent(constraints.positive, 1), constraints.simplex], [1, 2])
    assert isinstance(support, Product)
    theta = torch.tensor([[1.0, 0.4, 0.6], [-1.0, 0.4, 0.6], [1.0, 0.4, 0.7], [1.0, -0.4, 1.4]])
    assert support.check(theta).tolist() == [True, False, False, False]
    assert support.check(theta.reshape(2, 2, 3)).tolist() == [[True, False], [False, False]]
    assert support.check(theta[0])
    assert support.event_dim == 1
