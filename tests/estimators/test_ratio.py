import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from visbi.core.random import seeded
from visbi.estimators import RATIO_LOSSES, TrainingOptions, fit_ratio, rows
from visbi.estimators.ratio_losses import binary, contrastive, contrastive_normalised, contrasts, ratio_loss

QUICK = TrainingOptions(max_epochs=40, learning_rate=2e-3, batch_size=100)
NOISE = 0.5


def simulations(n, seed=0):
    with seeded(seed):
        theta = torch.randn(n, 1)
        return theta, theta + NOISE * torch.randn(n, 1)


def exact(theta, x):
    evidence = Normal(0.0, math.sqrt(1 + NOISE**2))
    return (Normal(theta, NOISE).log_prob(x) - evidence.log_prob(x)).squeeze(1)


@pytest.fixture(scope="module", params=RATIO_LOSSES)
def trained(request):
    theta, x = simulations(3000)
    fitted = fit_ratio(theta, x, loss=request.param, options=QUICK, seed=0, show_progress_bar=False)
    return request.param, fitted


def test_learned_ratio_is_close_to_the_exact_one(trained):
    loss, fitted = trained
    theta = torch.linspace(-1.5, 1.5, 13).unsqueeze(1)
    errors = []
    for value in (-1.0, 0.0, 1.2):
        x = torch.full((13, 1), value)
        with torch.no_grad():
            error = fitted.estimator.log_ratio(theta, x) - exact(theta, x)
        likely = exact(theta, x) > -4
        errors.append(error[likely] - (error[likely].mean() if loss == "contrastive" else 0.0))
    assert float(torch.cat(errors).square().mean().sqrt()) < 0.2


def two_by_two(loss, n_atoms):
    """The table f(theta, x) that minimises the exact expected loss on two thetas and two values of x."""
    prior, likelihood = torch.tensor([0.3, 0.7]), torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    f = torch.zeros(2, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([f], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    cases = list(itertools.product(range(2), repeat=n_atoms + 1))
    x = torch.tensor([case[0] for case in cases])
    theta = torch.tensor([case[1:] for case in cases])
    p = likelihood[theta[:, 0], x] * prior[theta].prod(1)

    def closure():
        optimizer.zero_grad()
        value = (p * loss(f[theta, x[:, None]])).sum()
        value.backward()
        return value

    optimizer.step(closure)
    evidence = prior @ likelihood
    return f.detach(), (likelihood / evidence).log()


@pytest.mark.parametrize(
    ("loss", "n"), [(binary, 2), (contrastive_normalised, 2), (contrastive_normalised, 4)]
)
def test_minimum_is_the_log_ratio(loss, n):
    f, log_ratio = two_by_two(loss, n)
    torch.testing.assert_close(f, log_ratio, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [2, 4])
def test_minimum_of_contrastive_is_the_log_ratio_up_to_a_factor_of_x(n):
    f, log_ratio = two_by_two(contrastive, n)
    torch.testing.assert_close(f[0] - f[1], log_ratio[0] - log_ratio[1], atol=1e-3, rtol=0)


def test_losses_on_known_logits():
    with seeded(0):
        logits = torch.randn(6, 5)
    torch.testing.assert_close(contrastive(logits), -logits.log_softmax(1)[:, 0])
    torch.testing.assert_close(contrastive_normalised(logits[:, :2]), binary(logits[:, :2]) / 2)
    torch.testing.assert_close(contrastive(logits + 3), contrastive(logits))
    huge = torch.tensor([[1e4, -1e4, 0.0]])
    for loss in (binary, contrastive, contrastive_normalised):
        assert torch.isfinite(loss(huge[:, :2] if loss is binary else huge)).all()


def test_contrasts_hold_each_row_first_and_no_row_twice():
    theta = torch.arange(7.0).unsqueeze(1)
    atoms = contrasts(theta, 5).squeeze(-1)
    assert torch.equal(atoms[:, 0], theta.squeeze(1))
    assert all(row.unique().numel() == 5 for row in atoms)
    assert torch.equal(atoms.flatten().long().bincount(), torch.full((7,), 5))


def test_iid_is_the_sum_over_trials(trained, monkeypatch):
    estimator = trained[1].estimator
    theta, trials = simulations(5)[0], simulations(7, seed=2)[1]
    expected = torch.stack([estimator.log_ratio(theta, trial.expand(5, 1)) for trial in trials]).sum(0)
    torch.testing.assert_close(estimator.log_ratio_iid(theta, trials), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(rows, "_PAIRS", 3)
    torch.testing.assert_close(estimator.log_ratio_iid(theta, trials), expected, rtol=1e-4, atol=1e-4)


def test_gradient_follows_the_exact_one(trained):
    theta = torch.tensor([[-1.0], [0.0], [1.0]], requires_grad=True)
    x = torch.tensor([[-0.6], [0.5], [0.4]])
    (slope,) = torch.autograd.grad(trained[1].estimator.log_ratio(theta, x).sum(), theta)
    torch.testing.assert_close(slope, ((x - theta) / NOISE**2).detach(), atol=0.5, rtol=0.2)


def test_images_of_counts_through_an_embedding():
    with seeded(0):
        theta = torch.randn(1500, 1)
        images = torch.poisson((0.5 * theta).exp()[:, :, None, None].expand(-1, 1, 4, 4))
        net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3))
    options = TrainingOptions(max_epochs=15, learning_rate=2e-3, batch_size=100)
    fitted = fit_ratio(theta, images, embedding_net=net, options=options, seed=0, show_progress_bar=False)
    many, few = images.new_full((1, 1, 4, 4), 3.0), images.new_zeros(1, 1, 4, 4)
    grid = torch.tensor([[-2.0], [2.0]])
    with torch.no_grad():
        assert fitted.estimator.log_ratio(grid, many).argmax() == 1
        assert fitted.estimator.log_ratio(grid, few).argmax() == 0
        assert fitted.estimator.log_ratio_iid(grid, torch.cat([few, few])).shape == (2,)


def test_shapes_at_evaluation(trained):
    estimator = trained[1].estimator
    with pytest.raises(ValueError, match="`theta`: expected shape"):
        estimator.log_ratio(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="`x`: expected shape"):
        estimator.log_ratio_iid(torch.zeros(3, 1), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="equally many rows"):
        estimator.log_ratio(torch.zeros(3, 1), torch.zeros(2, 1))


def test_unknown_loss_and_too_few_atoms():
    with pytest.raises(ValueError, match="`loss`: expected one of 'binary'"):
        ratio_loss("bce", 2)
    with pytest.raises(ValueError, match="`num_atoms`"):
        ratio_loss("contrastive", 1)
    theta, x = simulations(50)
    with pytest.raises(ValueError, match="`num_atoms`: expected batches and held-out rows of at least 10"):
        fit_ratio(theta, x, show_progress_bar=False)
