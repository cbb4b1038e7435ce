import copy
import math
import pickle

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from visbi.core.random import seeded
from visbi.estimators import FLOWS, NeuralLikelihood, TrainingOptions, fit_likelihood, rows

MATRIX = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.3]])
COVARIANCE = torch.tensor([[0.5, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 0.2]])
LOCATION, SCALE = torch.tensor([100.0, 0.0, -3.0]), torch.tensor([50.0, 1.0, 0.01])
QUICK = TrainingOptions(max_epochs=40, learning_rate=2e-3, batch_size=100)


def exact(x, theta):
    return (
        MultivariateNormal(theta @ MATRIX.T, COVARIANCE).log_prob((x - LOCATION) / SCALE) - SCALE.log().sum()
    )


def linear_gaussian(n, seed=0):
    """x of very different scales, far from 0."""
    with seeded(seed):
        theta = torch.randn(n, 2)
        z = MultivariateNormal(theta @ MATRIX.T, COVARIANCE).sample()
    return theta, LOCATION + SCALE * z


@pytest.fixture(scope="module")
def trained():
    theta, x = linear_gaussian(2000)
    return fit_likelihood(theta, x, num_transforms=3, options=QUICK, seed=0, show_progress_bar=False)


@pytest.fixture(scope="module")
def untrained():
    """Random weights everywhere: shapes and identities hold for any network."""
    theta, x = linear_gaussian(200)
    options = TrainingOptions(max_epochs=1)
    ensemble = fit_likelihood(
        theta, x, flow="nsf", options=options, seed=0, show_progress_bar=False
    ).estimator
    member = ensemble.members[0]
    with seeded(1), torch.no_grad():
        for parameter in member.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return member


def test_learned_likelihood_is_close_to_the_exact_one(trained):
    theta, x = linear_gaussian(2000, seed=1)
    with torch.no_grad():
        log_q = trained.estimator.log_prob(x, theta)
    gap = exact(x, theta) - log_q
    assert abs(float(gap.mean())) < 0.03  # the Kullback-Leibler divergence, in nats
    assert float(gap.std()) < 0.2


def test_whitened_x(trained):
    theta, x = linear_gaussian(2000)
    whitened = fit_likelihood(
        theta, x, num_transforms=1, z_score_x="structured", options=QUICK, seed=0, show_progress_bar=False
    )
    theta, x = linear_gaussian(2000, seed=1)
    with torch.no_grad():
        gap = exact(x, theta) - whitened.estimator.log_prob(x, theta)
    assert abs(float(gap.mean())) < 0.03


@pytest.mark.parametrize("flow", FLOWS)
def test_one_dimensional_density_integrates_to_one_and_has_two_modes(flow):
    with seeded(0):
        theta = 2 * torch.rand(3000, 1) - 1
        side = torch.randint(0, 2, theta.shape) * 2 - 1
        x = 1000 * (theta + side * 1.5 + 0.3 * torch.randn_like(theta))
    options = TrainingOptions(max_epochs=25, learning_rate=2e-3)
    trained = fit_likelihood(
        theta, x, flow=flow, num_transforms=2, options=options, seed=0, show_progress_bar=False
    )
    grid = torch.linspace(-8000, 8000, 16001).unsqueeze(1)
    for value in (-0.9, 0.0, 0.7):
        with torch.no_grad():
            log_q = trained.estimator.log_prob(grid, torch.tensor([[value]]))
        density = log_q.exp()
        assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=2e-3)
        at_modes = [float(density[8000 + int(1000 * value) + shift]) for shift in (-1500, 1500)]
        between = float(density[8000 + int(1000 * value)])
        assert min(at_modes) > 5 * between


def test_two_dimensional_density_integrates_to_one():
    theta, x = linear_gaussian(200)
    options = TrainingOptions(max_epochs=1)
    fitted = fit_likelihood(
        theta, x[:, :2], num_transforms=2, options=options, seed=0, show_progress_bar=False
    )
    member = fitted.estimator.members[0]
    with seeded(1), torch.no_grad():
        for parameter in member.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    nodes = torch.linspace(-9, 9, 181)
    points = member.standardise_x.inverse(torch.cartesian_prod(nodes, nodes))
    cell = float((nodes[1] - nodes[0]) ** 2 * member.standardise_x.scale.prod())
    with torch.no_grad():
        total = float(member.log_prob(points, torch.zeros(1, 2)).exp().sum()) * cell
    assert total == pytest.approx(1.0, abs=0.005)


def test_iid_is_the_sum_over_trials(untrained, monkeypatch):
    theta, _ = linear_gaussian(5)
    _, trials = linear_gaussian(7, seed=2)
    expected = torch.stack([untrained.log_prob(trial.expand(5, -1), theta) for trial in trials]).sum(0)
    torch.testing.assert_close(untrained.log_prob_iid(trials, theta), expected, rtol=1e-4, atol=1e-3)
    for pairs in (1, 10, 14):  # blocks of thetas, and trials in parts
        monkeypatch.setattr(rows, "_PAIRS", pairs)
        torch.testing.assert_close(untrained.log_prob_iid(trials, theta), expected, rtol=1e-4, atol=1e-3)


def test_iid_runs_the_networks_once_for_all_trials(untrained):
    calls = []
    handle = untrained.flow.layers[0].hyper.register_forward_hook(lambda *_: calls.append(1))
    theta, trials = linear_gaussian(30)
    untrained.log_prob_iid(trials, theta)
    handle.remove()
    assert len(calls) == 1


def test_single_rows_are_paired_with_all(untrained):
    theta, x = linear_gaussian(4)
    torch.testing.assert_close(
        untrained.log_prob(x[:1], theta), untrained.log_prob(x[:1].expand(4, -1), theta), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        untrained.log_prob(x, theta[:1]), untrained.log_prob(x, theta[:1].expand(4, -1)), rtol=1e-5, atol=1e-4
    )


def test_gradients_agree_with_finite_differences(untrained):
    double = copy.deepcopy(untrained).double()
    theta, x = (tensor.double() for tensor in linear_gaussian(3))
    theta.requires_grad_()
    # x in units of its scale, so that one step size fits all
    z = double.standardise_x(x).requires_grad_()

    def log_q(theta, z):
        return double.log_prob(double.standardise_x.inverse(z), theta)

    assert torch.autograd.gradcheck(log_q, (theta, z), eps=1e-5, atol=1e-4)
    assert torch.autograd.gradcheck(
        lambda theta: double.log_prob_iid(double.standardise_x.inverse(z), theta), theta, eps=1e-5, atol=1e-4
    )


def test_mixed_precision_at_the_door(untrained):
    theta, x = linear_gaussian(3)
    torch.testing.assert_close(untrained.log_prob(x.double(), theta.double()), untrained.log_prob(x, theta))


def test_samples_have_the_learned_moments(trained):
    theta = torch.tensor([[0.5, -1.0], [0.0, 1.0]])
    draws = trained.estimator.sample(theta, 4000, seed=0)
    assert draws.shape == (4000, 2, 3)
    torch.testing.assert_close((draws.mean(0) - LOCATION) / SCALE, theta @ MATRIX.T, atol=0.1, rtol=0)
    spread = ((draws[:, 0] - LOCATION) / SCALE).T.cov()
    torch.testing.assert_close(spread, COVARIANCE, atol=0.08, rtol=0)


def test_samples_follow_the_density(untrained):
    """E_q[exp(log p - log q)] = 1 for a density p that q covers."""
    draws = untrained.sample(torch.zeros(1, 2), 20000, seed=0)[:, 0]
    narrow = Normal(untrained.standardise_x.inverse(torch.zeros(3)), 0.7 * untrained.standardise_x.scale)
    with torch.no_grad():
        log_weights = narrow.log_prob(draws).sum(-1) - untrained.log_prob(draws, torch.zeros(1, 2))
    assert float(log_weights.exp().mean()) == pytest.approx(1.0, abs=0.05)


def test_seeded_samples(untrained):
    before = torch.random.get_rng_state()
    first, again = (untrained.sample(torch.zeros(2, 2), 3, seed=4) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())


def test_events_of_two_axes_are_flattened():
    with seeded(0):
        theta = torch.randn(300, 1)
        x = theta[:, :, None] + torch.randn(300, 2, 2)
    trained = fit_likelihood(theta, x, options=TrainingOptions(max_epochs=1), seed=0, show_progress_bar=False)
    assert trained.estimator.log_prob(x[:3], theta[:3]).shape == (3,)
    assert trained.estimator.log_prob_iid(x[:5], theta[:3]).shape == (3,)
    assert trained.estimator.sample(theta[:3], 6).shape == (6, 3, 2, 2)


def test_theta_may_be_embedded():
    theta, x = linear_gaussian(300)
    net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh())
    before = net[0].weight.clone()
    trained = fit_likelihood(
        theta,
        x,
        theta_embedding_net=net,
        options=TrainingOptions(max_epochs=2),
        seed=0,
        show_progress_bar=False,
    )
    assert torch.equal(before, net[0].weight)
    learned = trained.estimator.members[0].theta_embedding[0].weight  # type: ignore[index]
    assert not torch.equal(before, learned)


def test_copies_and_pickles_agree(trained):
    theta, x = linear_gaussian(5)
    for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert torch.equal(other.estimator.log_prob(x, theta), trained.estimator.log_prob(x, theta))


def test_weights_are_saved_and_restored_by_config(trained):
    member = trained.estimator.members[0]
    empty = NeuralLikelihood(member.theta_features, member.x_shape, member.config)
    empty.load_state_dict(member.state_dict())
    theta, x = linear_gaussian(5)
    assert torch.equal(empty.log_prob(x, theta), member.log_prob(x, theta))


def test_importance_weights_move_the_fit():
    """Weights turn noise of sd 1 into noise of sd 1/sqrt(2), N(0, 1)^2."""
    with seeded(0):
        theta = torch.randn(2000, 1)
        noise = torch.randn(2000, 1)
    weights = (-0.5 * noise.square()).exp().squeeze(1)
    trained = fit_likelihood(
        theta,
        theta + noise,
        num_transforms=1,
        weights=weights,
        options=QUICK,
        seed=0,
        show_progress_bar=False,
    )
    draws = trained.estimator.sample(torch.zeros(1, 1), 4000, seed=0)
    assert float(draws.std()) == pytest.approx(math.sqrt(0.5), rel=0.1)


@pytest.mark.parametrize(
    ("theta_shape", "x_shape", "name"),
    [((4,), (4, 3), "theta"), ((4, 3), (4, 3), "theta"), ((4, 2), (4, 2), "x"), ((4, 2), (4, 3, 1), "x")],
)
def test_shapes_at_evaluation(untrained, theta_shape, x_shape, name):
    for evaluate in (untrained.log_prob, untrained.log_prob_iid):
        with pytest.raises(ValueError, match=f"`{name}`: expected shape"):
            evaluate(torch.zeros(x_shape), torch.zeros(theta_shape))


def test_lengths_at_evaluation(untrained):
    with pytest.raises(ValueError, match="`theta` and `x`: expected equally many rows; got 4 and 5"):
        untrained.log_prob(torch.zeros(5, 3), torch.zeros(4, 2))
