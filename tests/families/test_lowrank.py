"""Low-rank Gaussians against the dense ones they are."""

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence

from visbi.families import LinkedFamily
from visbi.families.lowrank import LowRankBody, default_rank
from visbi.objectives import reverse_kl
from visbi.priors import coordinates


def rough(dim, rank=None):
    body = LowRankBody(dim, rank)
    with torch.no_grad():
        for p in body.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return body


def dense(body):
    return MultivariateNormal(body.loc.detach(), body.cov.detach())


@pytest.mark.parametrize(("dim", "rank"), [(1, None), (2, 1), (3, 3), (10, None), (50, 4)])
def test_is_the_gaussian_with_its_covariance(dim, rank):
    body = rough(dim, rank)
    exact = dense(body)
    z = body.loc.detach() + 2 * torch.randn(30, dim, dtype=torch.float64)
    torch.testing.assert_close(body.log_prob(z), exact.log_prob(z))
    diag, factor = (2 * body.log_diag).exp(), body.log_diag.exp()[:, None] * body.factor
    peer = LowRankMultivariateNormal(body.loc, factor, diag)
    torch.testing.assert_close(body.log_prob(z), peer.log_prob(z))
    torch.testing.assert_close(body.score_at_draws(z), -(z - exact.loc) @ exact.precision_matrix)
    draws, log_q, _ = body.draw(30, path=True)
    torch.testing.assert_close(log_q, exact.log_prob(draws))


def test_draws_have_the_moments():
    body = rough(5, 2)
    z, _ = body.rsample_and_log_prob(40000)
    torch.testing.assert_close(z.mean(0), body.loc, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(z.mT), body.cov, atol=0.1, rtol=0)


def test_reaches_a_target_of_its_rank():
    dim, rank = 20, 2
    factor = torch.randn(dim, rank, dtype=torch.float64)
    scale = 0.3 + torch.rand(dim, dtype=torch.float64)
    scaled = scale[:, None] * factor
    target = MultivariateNormal(torch.randn(dim).double(), scaled @ scaled.mT + scale.square().diag())
    q = LinkedFamily(
        LowRankBody(dim, rank), coordinates(MultivariateNormal(torch.zeros(dim), torch.eye(dim))), None
    )
    optimizer = torch.optim.Adam(q.trainable(), 5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    before = float(kl_divergence(dense(q.body), target))
    for _ in range(700):
        optimizer.zero_grad()
        reverse_kl(q, target.log_prob, 32).surrogate.backward()
        optimizer.step()
        scheduler.step()
    assert before > 10
    assert float(kl_divergence(dense(q.body), target)) < 1e-3


@pytest.mark.parametrize("dim", [2, 50, 400])
def test_starts_near_the_standard_normal(dim):
    standard = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
    body = LowRankBody(dim)
    assert 0 < float(kl_divergence(dense(body), standard)) < 0.02
    z, _, log_q_path = body.draw(64, path=True)
    assert log_q_path is not None
    for value in (z.square().sum(), (log_q_path - 2 * z.square().sum(-1)).sum()):
        (gradient,) = torch.autograd.grad(value, [body.raw_factor], retain_graph=True)
        assert bool((gradient != 0).all())  # zero factors would have none


def test_never_makes_a_square_matrix():
    body = LowRankBody(300, 3)
    with torch.profiler.profile(record_shapes=True) as record:
        body.draw(7, path=True)
    largest = max(
        torch.Size(shape).numel() for event in record.events() for shape in event.input_shapes or () if shape
    )
    assert 7 * 300 <= largest < 300 * 300 / 10


def test_rank():
    assert LowRankBody(50).factor.shape == (50, default_rank(50)) == (50, 8)
    assert LowRankBody(2, 9).factor.shape == (2, 2)
    with pytest.raises(ValueError, match="`rank`: expected a whole number"):
        LowRankBody(5, 0)
