"""Mixtures: densities of torch, and gradients through draws against quadrature."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from visbi.families import LinkedFamily, named_body
from visbi.families.mixture import MixtureBody
from visbi.families.names import name_of
from visbi.objectives import reverse_kl
from visbi.priors import coordinates

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def moments(dim, k=3):
    generator = torch.Generator().manual_seed(dim)
    like = {"dtype": torch.float64, "generator": generator}
    root = 0.4 * torch.randn(k, dim, dim, **like).tril(-1) + (0.5 + torch.rand(k, dim, **like)).diag_embed()
    return torch.randn(k, dim, **like), root @ root.mT


def exact(weights, loc, cov):
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(loc, cov))


def mixture(dim):
    return MixtureBody.of(WEIGHTS, *moments(dim))


@pytest.mark.parametrize("dim", [1, 2, 3, 10])
def test_is_the_mixture_of_its_moments(dim):
    loc, cov = moments(dim)
    body = MixtureBody.of(7 * WEIGHTS, loc, cov)
    torch.testing.assert_close(body.weights.detach(), WEIGHTS)
    torch.testing.assert_close(body.loc.detach(), loc)
    torch.testing.assert_close(body.cov.detach(), cov)
    z = 2 * torch.randn(100, dim, dtype=torch.float64)
    torch.testing.assert_close(body.log_prob(z), exact(WEIGHTS, loc, cov).log_prob(z))
    draws, log_q = body.rsample_and_log_prob(100)
    torch.testing.assert_close(log_q, exact(WEIGHTS, loc, cov).log_prob(draws))
    leaf = z.clone().requires_grad_()
    (score,) = torch.autograd.grad(exact(WEIGHTS, loc, cov).log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(body.score_at_draws(z), score)


def test_draws_have_the_moments():
    loc, cov = moments(2)
    z = MixtureBody.of(WEIGHTS, loc, cov).sample(40000)
    mean = WEIGHTS @ loc
    spread = loc - mean
    total = torch.einsum("k,kij->ij", WEIGHTS, cov + spread[:, :, None] * spread[:, None])
    torch.testing.assert_close(z.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(torch.cov(z.mT), total, atol=0.08, rtol=0)


@pytest.mark.parametrize("dim", [1, 2])
def test_densities_without_gradient_are_the_same(dim):
    body, z = mixture(dim), 3 * torch.randn(1000, dim, dtype=torch.float64)
    whole = body.log_prob(z)
    with torch.no_grad():
        torch.testing.assert_close(body.log_prob(z), whole.detach(), atol=1e-9, rtol=0)
        assert body.log_prob(z[:0]).shape == (0,)


def curved(z):
    first, last = z[:, 0], z[:, -1]
    return torch.sin(1.3 * first + 0.3) * torch.cos(0.7 * last) + 0.3 * first * last.square() + last.exp() / 9


@pytest.mark.parametrize("dim", [1, 2])
def test_gradient_of_an_expectation_by_quadrature(dim):
    body = mixture(dim)
    parameters = [p for p in body.parameters() if p.numel()]
    axis = torch.linspace(-9.0, 9.0, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    expectation = (body.log_prob(grid).exp() * curved(grid)).sum() * (axis[1] - axis[0]) ** dim
    want = torch.cat([g.flatten() for g in torch.autograd.grad(expectation, parameters)])
    batches = []
    for _ in range(30):
        z, _ = body.rsample_and_log_prob(4000)
        found = torch.autograd.grad(curved(z).mean(), parameters)
        batches.append(torch.cat([g.flatten() for g in found]))
    values = torch.stack(batches)
    error = values.std(0) / math.sqrt(len(values))
    assert len(want) == {1: 9, 2: 18}[dim] and bool((want.abs() > 5 * error).float().mean() > 0.7)
    assert bool(((values.mean(0) - want).abs() < 5 * error).all())


def test_implicit_derivative_of_single_draws():
    """The conditional cdf at a draw stays what it is when parameters and draw move together."""
    body = mixture(2)
    z, _ = body.rsample_and_log_prob(20)

    def cdf(z):
        parts = Normal(body.loc[:, 0], body.scale_tril[:, 0, 0])
        first = (body.weights * parts.cdf(z[:, :1])).sum(-1)
        share = (body.logits + parts.log_prob(z[:, :1])).softmax(-1)
        ratio = body.scale_tril[:, 1, 0] / body.scale_tril[:, 0, 0]
        mean = body.loc[:, 1] + ratio * (z[:, :1] - body.loc[:, 0])
        second = (share * Normal(mean, body.scale_tril[:, 1, 1]).cdf(z[:, 1:])).sum(-1)
        return torch.stack([first, second], -1)

    for row, entry in ((3, 0), (3, 1), (11, 1)):
        moved = torch.autograd.grad(cdf(z)[row, entry], list(body.parameters()), retain_graph=True)
        fixed = torch.autograd.grad(cdf(z.detach())[row, entry], list(body.parameters()))
        assert max(float(g.abs().max()) for g in fixed) > 1e-2
        assert max(float(g.abs().max()) for g in moved) < 1e-10


@pytest.mark.parametrize("gap", [10.0, 100.0, 1e4])
def test_far_apart_and_narrow_modes_leave_gradients_finite(gap):
    loc = torch.tensor([[0.0, 0.0], [gap, -gap], [2 * gap, gap]], dtype=torch.float64)
    cov = (
        torch.eye(2, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 1e4], dtype=torch.float64)[:, None, None]
    )
    body = MixtureBody.of(torch.tensor([0.5, 0.5, 0.0]), loc, cov)
    drawn, log_q_along, log_q_path = body.draw(2000, path=True)
    z, log_q = body.rsample_and_log_prob(2000)
    assert log_q_path is not None
    for value in (x.square().sum() for x in (drawn, log_q_along, log_q_path, z, log_q)):
        gradients = torch.autograd.grad(value, list(body.parameters()), retain_graph=True, allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    # the mean of a component still moves its own draws one to one
    near = (z[:, 0] - gap).abs() < 0.01
    (slope,) = torch.autograd.grad(z[near].sum(), [body.raw_loc])
    torch.testing.assert_close(slope[1] / 10, near.sum().double().expand(2), rtol=2e-2, atol=0)


def test_far_out_density_is_not_nan():
    z = torch.tensor([[1e3, -1e3], [1e30, 0.0], [1e200, 1.0]], dtype=torch.float64, requires_grad=True)
    log_q = mixture(2).log_prob(z)
    assert bool((log_q < -1e5).all()) and not bool(log_q.isnan().any())


def test_components_part_at_a_target_with_two_modes():
    target = exact(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[-1.5, 0.0], [1.5, 0.0]], dtype=torch.float64),
        0.25 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2),
    )
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    q = LinkedFamily(MixtureBody(2, 4), coordinates(prior), named_body("mixture", num_components=4))
    optimizer = torch.optim.Adam(q.trainable(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        reverse_kl(q, target.log_prob, 128).surrogate.backward()
        optimizer.step()
    with torch.no_grad():
        draws = q.draw(5000)
        assert float((draws.log_q - target.log_prob(draws.theta)).mean()) < 0.02
        assert abs(float((draws.theta[:, 0] > 0).double().mean()) - 0.5) < 0.1


def test_start_is_spread_and_of_the_priors_width():
    body = MixtureBody(3, 50)
    centred = body.loc - body.loc.mean(0)
    assert float(torch.pdist(body.loc.detach()).min()) > 0.05
    total = body.cov.mean(0) + centred.mT @ centred / 50
    torch.testing.assert_close(total.detach().diagonal(), torch.ones(3).double(), atol=0.35, rtol=0)
    torch.testing.assert_close(MixtureBody(2, 1).cov[0].detach(), torch.eye(2).double())


def test_named_with_a_number_of_components():
    build = named_body("mixture", num_components=5)
    body = build(2)
    assert isinstance(body, MixtureBody) and body.n_components == 5
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    assert name_of(LinkedFamily(body, coordinates(prior), build)) == "mixture"
    with pytest.raises(ValueError, match="`num_components`"):
        named_body("mixture", num_components=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights", torch.tensor([0.5, -0.5, 1.0])),
        ("weights", torch.zeros(3)),
        ("weights", torch.ones(2)),
        ("loc", torch.zeros(3)),
        ("loc", torch.full((3, 2), math.nan)),
        ("cov", torch.zeros(3, 2, 2)),
        ("cov", torch.eye(2)),
    ],
)
def test_of_checks_its_arguments(name, change):
    loc, cov = moments(2)
    with pytest.raises(ValueError, match=f"`{name}`: expected"):
        MixtureBody.of(**{"weights": WEIGHTS, "loc": loc, "cov": cov} | {name: change})


def test_of_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    mixture(2)
    assert torch.equal(torch.random.get_rng_state(), before)
