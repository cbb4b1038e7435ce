"""Gradients that can be used, and those that cannot."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.fitting.probe import useful_gradient
from visbi.fitting.target import Target
from visbi.priors import coordinates


def standard(dim):
    return MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())


def judged(log_likelihood, dim=2, n=48, spread=1.0):
    prior = standard(dim)

    def log_p(theta):
        return log_likelihood(theta) + prior.log_prob(theta)

    z = spread * torch.randn(n, dim, dtype=torch.float64)
    return useful_gradient(Target(log_p, coordinates(prior)), z[None])


SMOOTH = {
    "Gaussian": lambda theta: -50 * (theta - 0.3).square().sum(-1),
    "steep": lambda theta: -5e7 * (theta - 0.3).square().sum(-1),
    "shallow": lambda theta: 1e-3 * theta.sum(-1),
    "wavy": lambda theta: (5 * theta).sin().sum(-1),
    "kinked": lambda theta: -theta.abs().sum(-1),
    "funnel": lambda theta: -0.5 * theta[:, 1].square() * (-3 * theta[:, 0]).exp(),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("seed", range(3))
def test_smooth(name, seed):
    torch.manual_seed(seed)
    assert judged(SMOOTH[name]) is True


@pytest.mark.parametrize("dim", [1, 10, 50])
def test_smooth_in_other_dimensions(dim):
    assert judged(SMOOTH["Gaussian"], dim)


@pytest.mark.parametrize("seed", range(3))
def test_steps(seed):
    """The gradient of the likelihood is zero, and yet it changes; the prior's part may not hide that."""
    torch.manual_seed(seed)
    assert judged(lambda theta: (3 * theta).floor().sum(-1)) is False
    assert judged(lambda theta: -(10 * theta).round().square().sum(-1)) is False


def test_nothing_that_autograd_could_follow():
    assert judged(lambda theta: -50 * theta.detach().square().sum(-1)) is False
    target = Target(lambda theta: -50 * theta.detach().square().sum(-1), coordinates(standard(2)))
    assert useful_gradient(target, torch.randn(1, 16, 2, dtype=torch.float64)) is False
    outside = Target(
        lambda theta: torch.from_numpy(-50 * (theta.detach().numpy() ** 2).sum(-1)), coordinates(standard(2))
    )
    assert useful_gradient(outside, torch.randn(1, 16, 2, dtype=torch.float64)) is False


def test_other_errors_are_not_swallowed():
    def broken(theta):
        raise RuntimeError("the solver has failed")

    with pytest.raises(RuntimeError, match="solver"):
        judged(broken)


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_gradient(seed):
    """A piece of it is detached: half of the slope, or another sign."""

    def half(theta):
        fixed = theta.detach()
        return -25 * (theta.square() + fixed.square()).sum(-1)

    def other_sign(theta):
        value = -50 * theta.square().sum(-1)
        return 2 * value.detach() - value

    def one_entry(theta):
        return -50 * (theta[:, 0] - theta[:, 1].detach()).square()

    torch.manual_seed(seed)
    assert [judged(log_p) for log_p in (half, other_sign, one_entry)] == [False, False, False]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6])
def test_a_flat_likelihood(shift):
    assert judged(lambda theta: 0 * theta.sum(-1) + shift) is True


@pytest.mark.parametrize(("shift", "smooth"), [(0.0, True), (1e3, True), (1e3, False)])
def test_a_constant_in_float32(shift, smooth):
    """Rounding hides the changes over the shortest lengths, not those over the longest."""

    def log_p(theta):
        theta = theta.float()
        value = -50 * (theta - 0.3).square() if smooth else -(10 * theta).round().square()
        return value.sum(-1) + shift

    assert judged(log_p) is smooth


def test_rounding_is_no_slope():
    """All that is seen of the likelihood is its rounding: nothing to foresee."""
    assert judged(lambda theta: (1e-4 * theta.sum(-1)).float() + 1e5) is True


def test_regions_that_are_not_finite():
    def log_p(theta):
        inside = -50 * (theta - 0.3).square().sum(-1)
        return torch.where(theta[:, 0] > -3.0, inside, -math.inf)

    assert judged(log_p) is True


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("edge", [0.5, 1.0, 1.6])
def test_an_edge_among_the_points_says_nothing_of_slopes(edge, seed):
    """Where a pair straddles it the likelihood changes by infinity, which no slope foresees."""
    torch.manual_seed(seed)

    def log_p(theta):
        inside = -2 * (theta - 0.3).square().sum(-1)
        return torch.where(theta[:, 0] > edge, -math.inf, inside)

    assert judged(log_p) is True


def test_points_where_the_likelihood_sinks_out_of_sight():
    """Most points lie where it is hopeless; those that do not decide nothing by themselves."""
    assert judged(lambda theta: -1e8 * (theta.norm(dim=-1) - 1).square(), spread=2.0) is True


def test_what_it_costs():
    target = Target(lambda theta: -theta.square().sum(-1), coordinates(standard(3)))
    useful_gradient(target, torch.randn(1, 10, 3, dtype=torch.float64))
    assert target.n_gradients == 60 and target.n_values == 0
