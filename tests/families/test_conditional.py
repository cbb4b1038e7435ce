"""Conditional families: density and draws agree, on the prior's support, for every name."""

import pytest
import torch
from torch import nn

from family_cases import PRIORS, real_prior, simplex_prior
from visbi.families import CONDITIONAL_NAMES, FAMILY_NAMES
from visbi.families.conditional import ConditionalFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.priors import coordinates


def conditional(name, prior, x_shape=(4,), embedding_net=None, **changes) -> ConditionalFamily:
    """A small family in float64, no layer of it the identity."""
    options = dict(num_transforms=2, hidden_features=8, z_score_theta="independent", z_score_x="none")
    config = ConditionalConfig(flow_type=name, **options | changes)
    q = ConditionalFamily(coordinates(prior, z_score=config.z_score_theta), x_shape, config, embedding_net)
    q = q.double()
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return q


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", CONDITIONAL_NAMES)
def test_draws_have_their_density(name, dim):
    x = torch.randn(5, 4).double()
    q = conditional(name, real_prior(dim))
    theta, log_q = q.draw(x, 3)
    assert theta.shape == (3, 5, dim) and log_q.shape == (3, 5)
    again = q.log_prob(theta.reshape(-1, dim), x.repeat(3, 1)).reshape(3, 5)
    torch.testing.assert_close(again, log_q, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONDITIONAL_NAMES)
def test_path_gradient_is_that_of_a_frozen_density(name):
    dim, x = 2, torch.randn(4, 4).double()
    q = conditional(name, real_prior(dim))
    theta, log_q = q.draw(x, 3, path=True)
    leaf = theta.detach().requires_grad_()
    (score,) = torch.autograd.grad(q.log_prob(leaf.reshape(-1, dim), x.repeat(3, 1)).sum(), leaf)
    parameters = [p for p in q.parameters() if p.requires_grad]
    got = torch.autograd.grad(log_q.sum(), parameters, allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad((score * theta).sum(), parameters, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("name", CONDITIONAL_NAMES)
def test_lives_on_the_support(name, kind):
    prior = PRIORS[kind](2)
    q = conditional(name, prior)
    theta, _ = q.draw(torch.randn(6, 4).double(), 50)
    assert bool(q.coords.contains(theta).all())
    outside = theta[0].detach() - (1000.0 if kind != "real" else torch.inf)
    assert (q.log_prob(outside, torch.zeros(1, 4).double()) == -torch.inf).all()


def test_integrates_to_one_for_each_x():
    prior = PRIORS["box"](1)
    q = conditional("nsf", prior)
    grid = torch.linspace(-0.9999, 0.9999, 4001).double()[:, None]
    for x in torch.randn(3, 1, 4).double():
        density = q.log_prob(grid, x).exp().detach()
        assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1, abs=1e-2)


def test_simplex():
    q = conditional("maf", simplex_prior(3))
    theta, log_q = q.draw(torch.randn(2, 4).double(), 5)
    torch.testing.assert_close(theta.sum(-1), torch.ones(5, 2).double())
    assert log_q.isfinite().all()


def test_starts_as_the_prior():
    prior = real_prior(3)
    config = ConditionalConfig(
        flow_type="gaussian",
        num_transforms=2,
        hidden_features=8,
        z_score_theta="structured",
        z_score_x="none",
    )
    q = ConditionalFamily(coordinates(prior, z_score="structured"), (4,), config)
    theta = prior.sample((20,))
    torch.testing.assert_close(q.log_prob(theta, torch.randn(20, 4)), prior.log_prob(theta))


def test_x_matters_and_one_row_is_paired_with_many():
    q = conditional("maf", real_prior(2))
    theta, x = torch.randn(5, 2).double(), torch.randn(5, 4).double()
    torch.testing.assert_close(q.log_prob(theta, x[:1]), q.log_prob(theta, x[:1].expand(5, 4)))
    torch.testing.assert_close(q.log_prob(theta[:1], x), q.log_prob(theta[:1].expand(5, 2), x))
    assert not torch.allclose(q.log_prob(theta, x[:1]), q.log_prob(theta, x[1:2]))
    with pytest.raises(ValueError, match="equally many rows"):
        q.log_prob(theta[:2], x)


@pytest.mark.parametrize("kind", ["none", "independent", "structured"])
def test_x_is_standardised(kind):
    x = torch.tensor([3.0, -5.0, 0.0, 100.0]) + torch.randn(200, 4) * torch.tensor([1.0, 10.0, 0.1, 1.0])
    x[:, 1] += 8 * x[:, 0]
    q = conditional("gaussian", real_prior(2), z_score_x=kind).fit_standardisation(x.double())
    z = q.standardise_x(x.double())
    if kind == "none":
        torch.testing.assert_close(z, x.double())
    else:
        torch.testing.assert_close(z.std(0), torch.ones(4).double(), rtol=1e-3, atol=1e-3)
    off_diagonal = (torch.cov(z.mT) - torch.cov(z.mT).diagonal().diag()).abs().max()
    assert (off_diagonal < 1e-3) == (kind == "structured")


def test_embedding_of_images():
    net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv2d(1, 2, 3), nn.ReLU())
    q = conditional("maf", real_prior(2), x_shape=(6, 6), embedding_net=net)
    theta, _ = q.draw(torch.randn(3, 6, 6).double(), 4)
    assert theta.shape == (4, 3, 2)
    net[1].weight.data.add_(1)
    x = torch.randn(1, 6, 6).double()
    before = q.log_prob(theta[0].detach(), x)
    net[1].weight.data.add_(1)
    assert not torch.allclose(before, q.log_prob(theta[0].detach(), x))


@pytest.mark.parametrize("x_shape", [(4,), (2, 3), (1,)])
def test_observations(x_shape):
    q = conditional("gaussian", real_prior(2), x_shape=x_shape)
    assert q.observations(torch.zeros(x_shape)).shape == (1, *x_shape)
    assert q.observations(torch.zeros(5, *x_shape)).shape == (5, *x_shape)
    with pytest.raises(ValueError, match="`x`: expected shape"):
        q.observations(torch.zeros(5, *x_shape, 2))
    with pytest.raises(ValueError, match="`x`: expected shape"):
        q.observations(torch.zeros(0, *x_shape))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flow_type", "mdn"),
        ("num_transforms", 0),
        ("hidden_features", 0),
        ("z_score_theta", "x"),
        ("z_score_x", "x"),
    ],
)
def test_bad_options(name, value):
    good = dict(flow_type="maf", num_transforms=1, hidden_features=4, z_score_theta="none", z_score_x="none")
    with pytest.raises(ValueError, match=f"`{name}`|`z_score"):
        ConditionalConfig(**good | {name: value})


@pytest.mark.parametrize("name", sorted(set(FAMILY_NAMES) - set(CONDITIONAL_NAMES)))
def test_families_without_a_condition_say_which_have_one(name):
    with pytest.raises(
        ValueError, match=rf"`flow_type`: expected a family with an amortised.*'maf'.*got '{name}'"
    ):
        conditional(name, real_prior(2))


def test_at_observations_it_is_a_family_without_a_condition():
    q, x = conditional("maf", PRIORS["box"](2)), torch.randn(3, 4).double()
    family = q.at(x)
    draws = family.draw(5)
    assert draws.theta.shape == (15, 2) and draws.log_q.shape == (15,)  # 5 rounds over the 3
    torch.testing.assert_close(q.log_prob(draws.theta, x.repeat(5, 1)), draws.log_q)
    one = q.at(x[:1])
    theta, log_q = one.sample_and_log_prob(6)
    torch.testing.assert_close(one.log_prob(theta), log_q)
    assert one.log_prob(theta.reshape(2, 3, 2)).shape == (2, 3)
    assert bool(one.support.check(theta).all()) and not bool(one.support.check(theta + 100).any())
    with pytest.raises(ValueError, match="`q`: expected a family that can be rebuilt"):
        family.fresh()
