"""Bodies put somewhere: the Gaussian takes the place itself, the others move into it."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from family_cases import box_prior, gradients, real_prior, rough_family
from visbi.families import FAMILY_NAMES, LinkedFamily, named_body, named_family
from visbi.families.affine import AffineBody
from visbi.families.gaussian import GaussianBody
from visbi.priors import coordinates

LOC = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
TRIL = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.3, 0.0], [-0.1, 0.4, 1.5]], dtype=torch.float64)


def z_of(family, n):
    with torch.no_grad():
        return family.coords.to_z(family.draw(n).theta)[0]


@pytest.mark.parametrize("name", ["maf", "nsf", "nice", "gaussian"])
def test_placed_flows_start_as_that_gaussian(name):
    coords = coordinates(real_prior(3), z_score="structured")
    family = named_family(name, coords).double().placed(LOC, TRIL)
    with torch.no_grad():
        z, log_q, _ = family.body.draw(4000, path=False)
    exact = MultivariateNormal(LOC, scale_tril=TRIL)
    assert abs(float((log_q - exact.log_prob(z)).mean())) < 0.02
    torch.testing.assert_close(z.mean(0), LOC, atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(z.mT), TRIL @ TRIL.mT, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("name", [n for n in FAMILY_NAMES if n != "unaf"])
def test_placed_families_keep_the_protocol(name):
    family = rough_family(name, box_prior(3)).placed(LOC, TRIL)
    draws = family.draw(16)
    assert draws.log_q_path is not None
    with torch.no_grad():
        torch.testing.assert_close(family.log_prob(draws.theta), draws.log_q, rtol=1e-4, atol=1e-4)
    total, path, score = (
        gradients(part.sum(), family) for part in (draws.log_q, draws.log_q_path, draws.log_q_score)
    )
    assert any(bool((g != 0).any()) for g in path)
    for t, p, s in zip(total, path, score, strict=True):
        torch.testing.assert_close(t, p + s)
    again = family.placed(LOC + 1.0, 2.0 * TRIL)
    assert not isinstance(getattr(again.body, "inner", None), AffineBody)  # placed anew, not on top
    fresh = family.fresh()
    assert not isinstance(fresh.body, AffineBody) and isinstance(fresh, LinkedFamily)


def test_a_place_far_away_and_narrow_is_exact():
    family = named_family("maf", coordinates(real_prior(3))).placed(1e3 + LOC, 1e-5 * TRIL)
    with torch.no_grad():
        draws = family.draw(100)
        torch.testing.assert_close(family.log_prob(draws.theta), draws.log_q, rtol=1e-4, atol=1e-3)


def test_affine_body_by_hand():
    inner = named_body("gaussian")(3)
    body = AffineBody(inner, LOC, TRIL)
    z = torch.randn(10, 3, dtype=torch.float64)
    exact = MultivariateNormal(LOC, scale_tril=TRIL)
    torch.testing.assert_close(body.log_prob(z), exact.log_prob(z))
    drawn, log_q = body.rsample_and_log_prob(10)
    torch.testing.assert_close(log_q, exact.log_prob(drawn))
    torch.testing.assert_close(body.score_at_draws(z), -(z - LOC) @ torch.cholesky_inverse(TRIL))
    assert [name for name, _ in body.named_parameters()] == [
        f"inner.{n}" for n, _ in inner.named_parameters()
    ]


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_gaussian_body_is_the_multivariate_normal(dim):
    body = GaussianBody(dim)
    root = torch.randn(dim, dim, dtype=torch.float64).tril(-1) + torch.rand(dim, dtype=torch.float64).diag()
    loc = torch.randn(dim, dtype=torch.float64)
    body.set_(loc, root)
    exact = MultivariateNormal(loc, scale_tril=root)
    torch.testing.assert_close(body.scale_tril.detach(), root)
    torch.testing.assert_close(body.loc.detach(), loc)
    z, log_q = body.rsample_and_log_prob(50)
    torch.testing.assert_close(log_q, exact.log_prob(z))
    torch.testing.assert_close(body.log_prob(z + 1), exact.log_prob(z + 1))
    assert log_q.dtype == torch.float64


def test_gaussian_uses_every_entry_of_its_triangle():
    body = GaussianBody(4)
    z, log_q = body.rsample_and_log_prob(32)
    for value in (z.square().sum(), body.log_prob(z.detach()).sum()):
        (gradient,) = torch.autograd.grad(value, body.raw_below, retain_graph=True)
        assert gradient.shape == (6,) and bool((gradient != 0).all())
    assert float(log_q.detach().mean()) == pytest.approx(-2 * math.log(2 * math.pi) - 2, abs=1.0)


def test_diagonal_gaussian_takes_the_place_nearest_in_reverse_kl():
    def kl(scale):
        q = MultivariateNormal(LOC, scale_tril=scale.diag())
        return torch.distributions.kl_divergence(q, MultivariateNormal(LOC, scale_tril=TRIL))

    body = GaussianBody(3, diagonal=True).placed(LOC, TRIL)
    scale = body.scale_tril.detach().diagonal()
    torch.testing.assert_close(body.scale_tril.detach(), scale.diag())
    for step in 0.05 * torch.eye(3, dtype=torch.float64):
        assert kl(scale) < kl(scale + step) and kl(scale) < kl(scale - step)
    assert "raw_below" not in dict(body.named_parameters())
