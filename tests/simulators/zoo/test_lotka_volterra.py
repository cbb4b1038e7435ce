"""The integrator against SciPy at tight tolerance, and far from where it was tuned."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from visbi.simulators.zoo import lynx_hare
from visbi.simulators.zoo.lotka_volterra import fastest_rate, log_populations

CENTRE = torch.tensor([0.55, 0.028, 0.80, 0.024, 33.9, 5.9], dtype=torch.float64)
SPREAD = torch.tensor([0.065, 0.0045, 0.09, 0.004, 2.9, 0.55], dtype=torch.float64)


def posterior_like(n):
    """Around the lynx-hare posterior, twice as wide."""
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (CENTRE + 2 * SPREAD * noise).clamp(min=1e-3)


def prior_draws(n, seed=0):
    torch.manual_seed(seed)
    return lynx_hare.task().prior.sample((n,))[:, :6].double()


def start(theta):
    alpha, beta, gamma, delta, u, v = theta.unbind(-1)
    return alpha, gamma, (delta * u).log(), (beta * v).log()


def scipy_states(theta, times):
    """log u and log v by an adaptive method of order eight."""
    states = []
    for alpha, beta, gamma, delta, u, v in theta.numpy():
        solution = solve_ivp(
            lambda _, s, a=alpha, b=beta, c=gamma, d=delta: [a - b * np.exp(s[1]), -c + d * np.exp(s[0])],
            (0, 20),
            [np.log(u), np.log(v)],
            method="DOP853",
            rtol=1e-11,
            atol=1e-11,
            t_eval=times,
        )
        assert solution.success
        states.append(solution.y.T)
    return torch.tensor(np.array(states))


def test_close_to_scipy_where_the_posterior_is():
    theta = posterior_like(60)
    error = (log_populations(theta, 20) - scipy_states(theta, np.arange(21))).abs()
    assert error.max() < 1e-4


def test_close_to_scipy_on_prior_draws():
    theta = prior_draws(60)
    rate = fastest_rate(*start(theta))
    error = (log_populations(theta, 20) - scipy_states(theta, np.arange(21))).abs().amax((1, 2))
    assert (rate <= 12).sum() > 40
    assert error[rate <= 12].max() < 1e-3
    assert error[rate <= 20].max() < 1e-2


def test_fastest_rate_is_the_largest_along_the_orbit():
    theta = prior_draws(40)
    dense = scipy_states(theta, np.linspace(0, 20, 2001))
    rates = (dense + torch.stack([theta[:, 3], theta[:, 1]], -1).log()[:, None]).exp().amax((1, 2))
    bound = fastest_rate(*start(theta))
    assert bool((rates <= bound * 1.001).all())
    assert (rates / bound).median() > 0.95  # a bound, and a sharp one


def test_rows_do_not_see_each_other():
    theta = torch.cat([posterior_like(5), prior_draws(20)])
    together = log_populations(theta, 20)
    alone = torch.cat([log_populations(row[None], 20) for row in theta])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_gradient_against_differences():
    calm, wild = posterior_like(2), prior_draws(30)
    wild = wild[fastest_rate(*start(wild)) > 3][:2]
    theta = torch.cat([calm, wild]).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: log_populations(t, 4), (theta,), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wild_draws_stay_finite(dtype):
    torch.manual_seed(0)
    anywhere = (torch.rand(1000, 6) * 60 - 30).exp()
    corners = torch.tensor([0.0, -1.0, 1e30, 1e-30])[torch.randint(4, (100, 6))]
    theta = torch.cat([prior_draws(3000), anywhere, corners]).to(dtype).requires_grad_()
    states = log_populations(theta, 20)
    assert bool(states.isfinite().all())
    (gradient,) = torch.autograd.grad(states.square().sum(), theta)
    assert bool(gradient.isfinite().all())


def test_no_rows():
    assert log_populations(torch.zeros(0, 6), 20).shape == (0, 21, 2)


def test_single_precision_parameters_are_integrated_in_double():
    theta = posterior_like(10).float()
    assert log_populations(theta, 20).dtype == torch.float64
    torch.testing.assert_close(log_populations(theta, 20), log_populations(theta.double(), 20))


def test_energy_is_kept_over_a_century():
    theta = posterior_like(20)
    alpha, gamma, p, q = start(theta)
    shift = torch.stack([theta[:, 3], theta[:, 1]], -1).log()
    end_p, end_q = (log_populations(theta, 100)[:, -1] + shift).unbind(-1)
    before = p.exp() - gamma * p + q.exp() - alpha * q
    after = end_p.exp() - gamma * end_p + end_q.exp() - alpha * end_q
    assert (after / before).log().abs().max() < 1e-4 and math.isfinite(before.sum())
