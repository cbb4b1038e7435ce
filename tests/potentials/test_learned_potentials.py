"""Likelihood and ratio potentials around estimators whose numbers are known."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from visbi.potentials import (
    LikelihoodPotential,
    RatioPotential,
    likelihood_estimator_based_potential,
    ratio_estimator_based_potential,
)
from visbi.priors import BoxUniform

PRIOR = Independent(Normal(torch.zeros(2), 2 * torch.ones(2)), 1)
THETA = torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.5, 0.5]])
X = torch.tensor([[1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])


def log_normal(theta, x):
    return Normal(theta, 0.5).log_prob(x).sum(-1)


class GaussianEstimator:
    """x | theta ~ N(theta, 0.25 I), in the shape of our estimators; says what was asked of it."""

    def __init__(self):
        self.training, self.device, self.asked = True, "cpu", []

    def eval(self):
        self.training = False

    def to(self, device):
        self.device = str(device)

    def log_prob(self, x, theta):
        self.asked.append("paired")
        return log_normal(theta, x)

    def log_prob_iid(self, x, theta):
        self.asked.append("iid")
        return log_normal(theta[:, None], x[None]).sum(1)

    def log_ratio(self, theta, x):
        return self.log_prob(x, theta)

    def log_ratio_iid(self, theta, x):
        return self.log_prob_iid(x, theta)


KINDS = pytest.mark.parametrize("kind", [LikelihoodPotential, RatioPotential])


@KINDS
def test_iid_trials_add_up(kind):
    potential = kind(GaussianEstimator(), PRIOR)
    values = potential.evaluate(THETA, X)
    each = torch.stack([log_normal(THETA, x) for x in X])
    torch.testing.assert_close(values, each.sum(0) + PRIOR.log_prob(THETA))


@KINDS
def test_paired_rows_go_together(kind):
    potential = kind(GaussianEstimator(), PRIOR)
    values = potential.evaluate(THETA, X, x_is_iid=False)
    torch.testing.assert_close(values, log_normal(THETA, X) + PRIOR.log_prob(THETA))
    assert potential.evaluate(THETA, X).sub(values).abs().max() > 1  # the two do differ


@KINDS
def test_one_row_is_paired_with_all(kind):
    potential = kind(GaussianEstimator(), PRIOR)
    one_x = potential.evaluate(THETA, X[:1], x_is_iid=False)
    torch.testing.assert_close(one_x, potential.evaluate(THETA, X[:1]))
    one_theta = potential.evaluate(THETA[:1], X, x_is_iid=False)
    torch.testing.assert_close(one_theta, potential.evaluate(THETA[:1].expand(3, 2), X, x_is_iid=False))


@KINDS
def test_rows_that_do_not_pair(kind):
    with pytest.raises(ValueError, match=r"^`theta` and `x`: expected equally many rows, .*; got 3 and 2$"):
        kind(GaussianEstimator(), PRIOR).evaluate(THETA, X[:2], x_is_iid=False)


@KINDS
def test_gradients_reach_theta(kind):
    theta = THETA.clone().requires_grad_()
    kind(GaussianEstimator(), PRIOR).evaluate(theta, X).sum().backward()
    expected = ((X[:, None] - THETA) / 0.25).sum(0) - THETA / 4
    torch.testing.assert_close(theta.grad, expected)


@KINDS
def test_the_stateful_interface_is_the_pure_one(kind):
    potential = kind(GaussianEstimator(), PRIOR, X)
    assert torch.equal(potential(THETA), potential.evaluate(THETA, X))
    potential.set_x(X, x_is_iid=False)
    assert torch.equal(potential(THETA), potential.evaluate(THETA, X, x_is_iid=False))
    other = potential.evaluate(THETA, 2 * X, x_is_iid=False)
    assert not torch.equal(potential(THETA), other)
    assert torch.equal(potential.return_x_o(), X)  # asking for another x set nothing
    assert not potential.x_is_iid
    assert torch.equal(potential.evaluate(THETA, None), potential.evaluate(THETA, X))


@KINDS
def test_gradients_on_demand(kind):
    potential = kind(GaussianEstimator(), PRIOR, X)
    theta = THETA.clone().requires_grad_()
    assert potential(theta).requires_grad
    assert not potential(theta, track_gradients=False).requires_grad
    assert torch.is_grad_enabled()


@KINDS
def test_the_estimator_stops_training(kind):
    estimator = GaussianEstimator()
    kind(estimator, PRIOR)
    assert not estimator.training


@KINDS
def test_no_observation(kind):
    potential = kind(GaussianEstimator(), PRIOR)
    for call in (lambda: potential(THETA), lambda: potential.evaluate(THETA, None), lambda: potential.x_o):
        with pytest.raises(
            ValueError, match=r"^`x_o`: expected an observation \(call set_x first\); got None$"
        ):
            call()
    assert potential.return_x_o() is None


@KINDS
@pytest.mark.parametrize("x_o", [[math.nan, 1.0], [[math.inf, 1.0]]])
def test_an_observation_that_is_not_finite(kind, x_o):
    with pytest.raises(ValueError, match=r"^`x_o`: expected finite numbers; got 1 of 2 NaN or Inf$"):
        kind(GaussianEstimator(), PRIOR, torch.tensor(x_o))
    potential = kind(GaussianEstimator(), PRIOR, X)
    with pytest.raises(ValueError, match=r"^`x_o`: expected finite numbers"):
        potential.set_x(torch.tensor(x_o))
    assert torch.equal(potential.x_o, X)


@KINDS
@pytest.mark.parametrize(
    "theta", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, 3), torch.zeros(1, 3, 2)]
)
def test_theta_of_a_wrong_shape(kind, theta):
    with pytest.raises(ValueError, match=r"^`theta`: expected shape \(N, 2\); got \("):
        kind(GaussianEstimator(), PRIOR).evaluate(theta, X)


class BadEstimator(GaussianEstimator):
    def log_prob_iid(self, x, theta):
        return super().log_prob_iid(x, theta)[None]  # (1, N) would broadcast into (1, N) unnoticed


@pytest.mark.parametrize(
    ("kind", "name"), [(LikelihoodPotential, "likelihood_estimator"), (RatioPotential, "ratio_estimator")]
)
def test_an_estimator_that_returns_a_wrong_shape(kind, name):
    message = rf"^`{name}`: expected to return shape \(3,\) for theta of shape \(3, D\); got \(1, 3\)$"
    with pytest.raises(ValueError, match=message):
        kind(BadEstimator(), PRIOR).evaluate(THETA, X)


@KINDS
def test_a_prior_that_is_none(kind):
    with pytest.raises(ValueError, match=r"^`prior`: expected one joint distribution"):
        kind(GaussianEstimator(), Normal(torch.zeros(2), torch.ones(2)))
    with pytest.raises(TypeError, match=r"^`prior`: expected a torch Distribution"):
        kind(GaussianEstimator(), None)


@KINDS
def test_everything_moves(kind):
    estimator = GaussianEstimator()
    potential = kind(estimator, PRIOR, X)
    assert potential.to("meta") is potential
    assert potential.device == estimator.device == "meta"
    assert potential.x_o.device.type == "meta"
    assert potential.prior.sample().device.type == "meta"
    assert PRIOR.sample().device.type == "cpu"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (likelihood_estimator_based_potential, LikelihoodPotential),
        (ratio_estimator_based_potential, RatioPotential),
    ],
)
def test_the_pair_of_potential_and_transform(make, kind):
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    potential, transform = make(GaussianEstimator(), prior, X)
    assert type(potential) is kind
    theta = prior.sample((5,))
    torch.testing.assert_close(transform.inv(transform(theta)), theta)
    assert transform(theta).abs().max() < 10
    torch.testing.assert_close(potential(theta), potential.evaluate(theta, X))
    _, identity = make(GaussianEstimator(), prior, None, enable_transform=False)
    assert torch.equal(identity(theta), theta)
