"""Draws that are right stay where they are; others walk to what q misses."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from mixture_cases import known, of_mixture
from visbi.fitting.drift import drift
from visbi.fitting.target import Target
from visbi.priors import coordinates

NARROW = known([1.0], [[1.0, -0.5]], 0.2)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_exact_draws_do_not_drift(dim, gradient):
    q = known([1.0], [[0.5] * dim], 0.5)
    found = [float(drift(of_mixture(q, 5.0), q.sample(512), q.log_prob, gradient=gradient)) for _ in range(3)]
    assert max(found) < 5


@pytest.mark.parametrize("gradient", [True, False])
def test_exact_draws_of_a_posterior_do_not_drift_however_wrong_q_is(gradient):
    """The mean of log-weights is stationary, whatever q."""
    q = known([1.0], [[0.4, -0.5]], 0.5)
    for _ in range(3):
        assert float(drift(of_mixture(NARROW), NARROW.sample(1024), q.log_prob, gradient=gradient)) < 5


@pytest.mark.parametrize("gradient", [True, False])
def test_draws_walk_to_what_q_misses_next_to_them(gradient):
    """q is one half of a Gaussian cut in two, smoothly; its draws are exact there."""
    whole = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())

    def log_q(z):
        return math.log(2) + whole.log_prob(z) + torch.nn.functional.logsigmoid(20 * z[..., 0])

    z = torch.randn(1, 1024, 2, dtype=torch.float64)
    z[..., 0] = z[..., 0].abs()
    target = Target(whole.log_prob, coordinates(whole))
    assert float(drift(target, z, log_q, gradient=gradient)) > 5
    assert drift(target, torch.randn_like(z), whole.log_prob, gradient=gradient).tolist() == [0.0]
