"""How near a learned likelihood comes to the true one where x has many entries: slow."""

import math

import pytest
import torch

from visbi.core.random import seeded
from visbi.estimators import TrainingOptions, fit_likelihood

TIMES = torch.linspace(0, 20, 21)


def moments(theta):
    """Two oscillations with eight parameters: means (N, 42) and log noise scales (N, 42)."""
    a, b, c, d, e, f = (theta[:, i : i + 1] for i in range(6))
    phase = 0.6 * torch.exp(0.12 * a) * TIMES + 0.5 * b
    first = 3 + 0.3 * c + torch.exp(0.2 * d) * torch.sin(phase)
    second = 2.5 + 0.3 * e + torch.exp(0.2 * f) * torch.sin(phase - 1.2 + 0.2 * c * d)
    second = second + 0.3 * torch.tanh(first - 3)
    return torch.cat([first, second], 1), (-1 + 0.3 * theta[:, 6:]).repeat_interleave(21, 1)


def simulations(n, seed):
    with seeded(seed):
        theta = torch.randn(n, 8)
        mean, log_scale = moments(theta)
        return theta, mean + log_scale.exp() * torch.randn(n, 42)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "largest_gap"), [({}, 1.0), ({"weight_decay": 1.0}, 0.8)])
def test_nonlinear_mean_and_noise_in_42_dimensions(options, largest_gap):
    """A masked flow without the regression on theta has a gap of 1.5 to 2 nats here."""
    theta, x = simulations(5000, seed=0)
    fitted = fit_likelihood(theta, x, options=TrainingOptions(**options), seed=0, show_progress_bar=False)
    theta, x = simulations(2000, seed=1)
    theta.requires_grad_()
    mean, log_scale = moments(theta)
    standardised = (x - mean) * torch.exp(-log_scale)
    log_p = (-0.5 * standardised.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(1)
    log_q = fitted.estimator.log_prob(x, theta)
    assert 0 < float((log_p - log_q).detach().mean()) < largest_gap
    (exact,) = torch.autograd.grad(log_p.sum(), theta)
    (learned,) = torch.autograd.grad(log_q.sum(), theta)
    assert float((exact - learned).norm() / exact.norm()) < 0.55
