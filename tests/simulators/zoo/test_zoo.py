"""What all simulators of the zoo promise, and each one's own formulas."""

import dataclasses
import math
import pickle

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, Normal

from visbi.simulators import simulate
from visbi.simulators.calling import CallStyle, detect
from visbi.simulators.zoo import linear_gaussian, lynx_hare, slcp, two_moons

TASKS = {
    "lynx_hare": lynx_hare.task(),
    "two_moons": two_moons.task(),
    "slcp": slcp.task(),
    "linear_gaussian": linear_gaussian.task(3),
}
EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@EVERY
def test_shapes_and_types(task):
    theta = task.prior.sample((7,))
    x = task.simulator(theta)
    assert theta.shape == (7, task.dim) and x.shape == (7, *task.x_o.shape)
    assert x.dtype == theta.dtype == torch.float32 and task.simulator(theta.double()).dtype == torch.float64
    for observed in (task.x_o, task.x_o[None], x):
        assert task.log_likelihood(theta, observed).shape == (7,)


@EVERY
def test_pairs_are_taken_row_by_row(task):
    theta = task.prior.sample((4,)).double()
    x = task.simulator(theta)
    single = torch.cat([task.log_likelihood(t[None], y) for t, y in zip(theta, x, strict=True)])
    torch.testing.assert_close(task.log_likelihood(theta, x), single, rtol=1e-8, atol=1e-8)


@EVERY
def test_wrong_shapes_are_errors(task):
    theta = task.prior.sample((4,))
    for bad in (theta[0], theta[:, 1:], theta[None]):
        with pytest.raises(ValueError, match="`theta`: expected shape"):
            task.simulator(bad)
        with pytest.raises(ValueError, match="`theta`: expected shape"):
            task.log_likelihood(bad, task.x_o)
    for bad in (task.x_o[1:], task.x_o.expand(3, -1)):
        with pytest.raises(ValueError, match="`x`: expected shape"):
            task.log_likelihood(theta, bad)


@EVERY
def test_runs_through_simulate(task):
    theta = task.prior.sample((10,))
    assert detect(task.simulator, theta, 0) == CallStyle(batched=True, numpy=False)
    first, again = (simulate(task.simulator, task.prior, 300, seed=1, show_progress_bar=False) for _ in "ab")
    assert len(first) == 300 and torch.equal(first.x, again.x)


@EVERY
def test_simulator_can_be_sent_to_another_process(task):
    theta = task.prior.sample((2,))
    assert pickle.loads(pickle.dumps(task.simulator))(theta).shape == (2, *task.x_o.shape)


@EVERY
def test_likelihood_is_finite_on_the_prior(task):
    torch.manual_seed(0)
    theta = task.prior.sample((2000,)).requires_grad_()
    log_p = task.log_likelihood(theta, task.x_o)
    (gradient,) = torch.autograd.grad(log_p.sum(), theta)
    assert bool(log_p.isfinite().all() and gradient.isfinite().all())


INSIDE = {
    "lynx_hare": torch.tensor([0.55, 0.028, 0.80, 0.024, 33.9, 5.9, 0.25, 0.3]),
    "slcp": torch.tensor([0.7, -2.9, -1.0, -0.9, 0.6]),
    "linear_gaussian": torch.tensor([0.3, -0.2, 0.8]),
}


@pytest.mark.parametrize("name", INSIDE)
def test_simulator_and_likelihood_agree(name):
    """At the simulating theta the score has mean zero, and covariance minus the mean Hessian."""
    torch.manual_seed(0)
    theta = INSIDE[name].double().expand(4000, -1).clone().requires_grad_()
    x = TASKS[name].simulator(theta)
    log_p = TASKS[name].log_likelihood(theta, x)
    (score,) = torch.autograd.grad(log_p.sum(), theta)
    standard_error = score.std(0) / math.sqrt(len(score))
    assert bool((score.mean(0).abs() < 4.5 * standard_error).all())
    moved = theta.detach() + 1e-4 * torch.eye(theta.shape[1], dtype=theta.dtype)[-1] * theta[0, -1].item()
    ratio = (TASKS[name].log_likelihood(moved, x) - log_p).exp()
    assert abs(ratio.mean().item() - 1) < 4.5 * ratio.std().item() / math.sqrt(len(ratio))


KNOWN = {
    "two_moons": TASKS["two_moons"],
    **{f"linear_gaussian_{d}": linear_gaussian.task(d) for d in (1, 3, 10)},
    "linear_gaussian_wide": linear_gaussian.task(
        2, matrix=torch.arange(10.0).sin().reshape(5, 2), noise_scale=0.3, prior_scale=2.0
    ),
}


@pytest.mark.parametrize("task", KNOWN.values(), ids=KNOWN)
def test_known_posterior_is_bayes(task):
    torch.manual_seed(0)
    posterior = task.posterior(task.x_o)
    theta = posterior.sample((200,))
    assert theta.shape == (200, task.dim)
    joint = task.prior.log_prob(theta) + task.log_likelihood(theta, task.x_o)
    expected = joint - task.log_evidence(task.x_o)
    torch.testing.assert_close(posterior.log_prob(theta), expected, rtol=1e-4, atol=1e-3)


def test_task_names_every_parameter():
    with pytest.raises(ValueError, match="`theta_names`"):
        dataclasses.replace(TASKS["slcp"], theta_names=("a", "b"))


# lynx and hare


def test_pelts_are_the_published_ones():
    x_o = TASKS["lynx_hare"].x_o
    pelts = lynx_hare.to_pelts(x_o)
    assert pelts.shape == (21, 2) and len(lynx_hare.YEARS) == 21
    torch.testing.assert_close(pelts[0], torch.tensor([30.0, 4.0]))
    torch.testing.assert_close(pelts[-1], torch.tensor([24.7, 8.6]))
    torch.testing.assert_close(pelts.sum(0), torch.tensor([715.7, 423.5]))
    torch.testing.assert_close(x_o[21:].exp(), torch.tensor(lynx_hare.LYNX))
    torch.testing.assert_close(lynx_hare.from_pelts(pelts.expand(3, 21, 2)), x_o.expand(3, 42))


def test_lynx_hare_prior():
    torch.manual_seed(0)
    draws = TASKS["lynx_hare"].prior.sample((20000,))
    assert bool((draws > 0).all())
    for column, (loc, scale) in {0: (1, 0.5), 1: (0.05, 0.05), 2: (1, 0.5), 3: (0.05, 0.05)}.items():
        exact = stats.truncnorm(-loc / scale, math.inf, loc, scale)
        assert stats.kstest(draws[:, column].numpy(), exact.cdf).pvalue > 1e-4
    for column, loc in {4: math.log(10), 5: math.log(10), 6: -1, 7: -1}.items():
        assert stats.kstest(draws[:, column].log().numpy(), stats.norm(loc, 1).cdf).pvalue > 1e-4


def test_lynx_hare_noise_is_lognormal_with_its_own_sigma():
    torch.manual_seed(0)
    theta = INSIDE["lynx_hare"].double().expand(4000, -1)
    x = TASKS["lynx_hare"].simulator(theta)
    torch.testing.assert_close(x[:, :21].std(0).mean(), torch.tensor(0.25).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(x[:, 21:].std(0).mean(), torch.tensor(0.3).double(), rtol=0.02, atol=0)
    at_start = x.mean(0)[[0, 21]].exp()
    torch.testing.assert_close(at_start, torch.tensor([33.9, 5.9]).double(), rtol=0.03, atol=0)


def test_lynx_hare_likelihood_prefers_the_posterior():
    torch.manual_seed(0)
    task = TASKS["lynx_hare"]
    best = task.log_likelihood(INSIDE["lynx_hare"][None], task.x_o)
    assert best > 0 and bool((task.log_likelihood(task.prior.sample((500,)), task.x_o) < best).all())


def test_lynx_hare_likelihood_is_finite_anywhere():
    torch.manual_seed(0)
    theta = (torch.rand(500, 8) * 60 - 30).exp().requires_grad_()
    log_p = TASKS["lynx_hare"].log_likelihood(theta, TASKS["lynx_hare"].x_o)
    (gradient,) = torch.autograd.grad(log_p.sum(), theta)
    assert bool(log_p.isfinite().all() and gradient.isfinite().all())


# two moons


def grid(low, high, n, dtype=torch.float64):
    axes = [torch.linspace(a, b, n, dtype=dtype) for a, b in zip(low, high, strict=True)]
    cell = math.prod((b - a) / (n - 1) for a, b in zip(low, high, strict=True))
    return torch.cartesian_prod(*axes), cell


def test_two_moons_density_is_that_of_the_simulator():
    torch.manual_seed(0)
    theta = torch.tensor([[0.4, -0.1]], dtype=torch.float64)
    x = two_moons.simulator(theta.expand(20000, 2))
    points, cell = grid(x.amin(0) - 0.02, x.amax(0) + 0.02, 1000)
    density = two_moons.log_likelihood(theta.expand(len(points), 2), points).exp() * cell
    assert abs(density.sum() - 1) < 2e-3
    middle = points.mean(0)
    for chosen in (lambda y: y[:, 0] > middle[0], lambda y: y[:, 1] > middle[1] + 0.05):
        expected = density[chosen(points)].sum()
        se = (expected * (1 - expected) / len(x)).sqrt()
        assert abs(chosen(x).double().mean() - expected) < 4.5 * se + 2e-3


def test_two_moons_posterior_integrates_to_one_and_is_what_it_draws():
    torch.manual_seed(0)
    posterior = TASKS["two_moons"].posterior(torch.tensor([0.05, -0.1], dtype=torch.float64))
    points, cell = grid((-1, -1), (1, 1), 1500)
    weight = posterior.log_prob(points).exp() * cell
    assert abs(weight.sum() - 1) < 5e-3
    draws = posterior.sample((20000,))
    for function in (
        lambda t: t[:, 0],
        lambda t: t[:, 1],
        lambda t: t[:, 0] * t[:, 1],
        lambda t: t[:, 0] ** 2,
    ):
        values = function(draws)
        assert abs(values.mean() - (weight * function(points)).sum()) < 4.5 * values.std() / 141 + 2e-3
    assert 0.45 < (draws.sum(-1) > 0).double().mean() < 0.55


def test_two_moons_posterior_refuses_where_it_is_not_simple():
    with pytest.raises(ValueError, match="`x`"):
        two_moons.TwoMoonsPosterior(torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="`x`"):
        two_moons.TwoMoonsPosterior(torch.tensor([0.0, 1.2]))


# SLCP


def test_slcp_likelihood_is_four_gaussians():
    torch.manual_seed(0)
    theta = TASKS["slcp"].prior.sample((50,)).double()
    x = slcp.simulator(theta)
    s_1, s_2, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, theta[:, 4].tanh()
    covariance = torch.stack([s_1**2, rho * s_1 * s_2, rho * s_1 * s_2, s_2**2], -1).unflatten(-1, (2, 2))
    factor = torch.linalg.cholesky(covariance)
    expected = sum(
        MultivariateNormal(theta[:, :2], scale_tril=factor).log_prob(point)
        for point in x.unflatten(1, (4, 2)).unbind(1)
    )
    torch.testing.assert_close(slcp.log_likelihood(theta, x), expected, rtol=1e-6, atol=1e-6)


def test_slcp_has_four_symmetric_modes():
    theta = INSIDE["slcp"].repeat(4, 1)
    theta[1:, 2:4] *= torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    log_p = slcp.log_likelihood(theta, TASKS["slcp"].x_o)
    assert bool((log_p == log_p[0]).all())


# linear Gaussian


def test_linear_gaussian_in_one_dimension_by_hand():
    task = linear_gaussian.task(1, noise_scale=0.5, prior_scale=2.0)
    posterior = task.posterior(torch.tensor([1.7]))
    variance = 1 / (1 / 0.25 + 1 / 4)
    torch.testing.assert_close(posterior.covariance_matrix, torch.tensor([[variance]]))
    torch.testing.assert_close(posterior.mean, torch.tensor([variance * 1.7 / 0.25]))
    exact = Normal(0.0, math.sqrt(4.25)).log_prob(torch.tensor(1.7))
    torch.testing.assert_close(task.log_evidence(torch.tensor([1.7])), exact)


def test_linear_gaussian_takes_a_batch_of_observations():
    task = linear_gaussian.task(3)
    x = task.simulator(task.prior.sample((6,)))
    batch = task.posterior(x)
    assert batch.batch_shape == (6,) and task.log_evidence(x).shape == (6,)
    torch.testing.assert_close(batch.mean[2], task.posterior(x[2]).mean)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(dim=0), "dim"),
        (dict(noise_scale=0.0), "noise_scale"),
        (dict(prior_scale=-1.0), "prior_scale"),
        (dict(matrix=torch.ones(3, 5)), "matrix"),
        (dict(x_o=torch.ones(7)), "x_o"),
        (dict(x_o=torch.tensor([1.0, torch.nan])), "x_o"),
    ],
)
def test_linear_gaussian_errors(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        linear_gaussian.task(**options)
