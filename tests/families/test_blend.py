"""Several bodies as one, against the sum of their densities."""

import math

import pytest
import torch

from visbi.families import LinkedFamily, named_body
from visbi.families.blend import BlendBody
from visbi.families.gaussian import GaussianBody
from visbi.priors import BoxUniform, coordinates


def placed(centre: float, sd: float, dim: int = 2) -> GaussianBody:
    body = GaussianBody(dim)
    body.placed(torch.full((dim,), centre).double(), sd * torch.eye(dim, dtype=torch.float64))
    return body


def blend(shares: list[float] | None = None, dim: int = 2) -> BlendBody:
    return BlendBody([placed(-5.0, 0.5, dim), placed(5.0, 1.0, dim)], torch.tensor(shares or [0.8, 0.2]))


def test_log_prob_is_that_of_the_sum():
    body, z = blend([4.0, 1.0]), 6 * torch.randn(50, 2, dtype=torch.float64)
    each = [inner.log_prob(z).exp() for inner in body.bodies]
    torch.testing.assert_close(body.log_prob(z).exp(), 0.8 * each[0] + 0.2 * each[1])
    assert body.dim == 2 and body.dtype == torch.float64
    torch.testing.assert_close(body.shares, torch.tensor([0.8, 0.2]).double())


def test_integrates_to_one():
    body = BlendBody([placed(-1.0, 0.5), named_body("nsf")(2)], torch.tensor([0.3, 0.7]))
    axis = torch.linspace(-9, 9, 181, dtype=torch.float64)
    with torch.no_grad():
        mass = body.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.1**2
    assert float(mass) == pytest.approx(1.0, abs=1e-3)


def test_draws():
    z, log_q = blend().rsample_and_log_prob(10_000)
    torch.testing.assert_close(log_q, blend().log_prob(z))
    left = z[:, 0] < 0
    assert float(left.double().mean()) == pytest.approx(0.8, abs=0.02)
    torch.testing.assert_close(z[left].mean(0), torch.full((2,), -5.0).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(z[~left].std(0), torch.ones(2).double(), atol=0.07, rtol=0)
    assert float(left[:1000].double().mean()) == pytest.approx(0.8, abs=0.05)  # in random order


class Rounded(GaussianBody):
    """One whose inverse loses draws: their density, asked for afterwards, is next to nothing."""

    def log_prob(self, z):
        return super().log_prob(z) - 1e6


def test_a_draw_has_the_density_it_was_made_with():
    rounded = Rounded(2)
    rounded.placed(torch.full((2,), 9.0).double(), torch.eye(2, dtype=torch.float64))
    body = BlendBody([rounded, placed(-9.0, 1.0)], torch.tensor([0.5, 0.5]))
    _, log_q = body.rsample_and_log_prob(2000)
    assert float(log_q.min()) > -20
    assert float(log_q.mean()) == pytest.approx(math.log(0.5) - math.log(2 * math.pi) - 1, abs=0.1)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_draws(n):
    z, log_q = blend().rsample_and_log_prob(n)
    assert z.shape == (n, 2) and log_q.shape == (n,) and z.dtype == torch.float64


def test_bodies_of_another_dtype():
    inner = named_body("nsf")(2)
    assert inner.dtype == torch.float32
    body = BlendBody([inner, placed(0.0, 1.0)], torch.tensor([0.5, 0.5]))
    z, log_q = body.rsample_and_log_prob(20)
    assert z.dtype == log_q.dtype == torch.float64
    # a draw's own density is that of its noise, the other one goes through the inverse in float32
    torch.testing.assert_close(body.log_prob(z), log_q, atol=1e-5, rtol=1e-5)


def test_linked_to_a_bounded_support():
    prior = BoxUniform(-torch.ones(1).double(), torch.ones(1).double())
    family = LinkedFamily(
        BlendBody([placed(-1.0, 0.5, 1), placed(1.0, 0.5, 1)], torch.ones(2)),
        coordinates(prior),
        GaussianBody,
    )
    theta = torch.linspace(-1, 1, 20_003, dtype=torch.float64)[1:-1, None]
    with torch.no_grad():
        mass = family.log_prob(theta).exp().sum() * float(theta[1] - theta[0])
    assert float(mass) == pytest.approx(1.0, abs=1e-3)


def test_as_many_shares_as_bodies():
    with pytest.raises(ValueError, match=r"bodies.*shares"):
        BlendBody([placed(0.0, 1.0)], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("shares", [[0.5, 0.0], [1.5, -0.5], [0.5, float("nan")]])
def test_shares_that_are_not_positive(shares):
    with pytest.raises(ValueError, match=r"^`shares`: expected positive numbers; got"):
        blend(shares)


def test_bodies_of_unlike_dimensions():
    with pytest.raises(ValueError, match=r"^`bodies`: expected bodies of one dimension; got 2 and 3"):
        BlendBody([placed(0.0, 1.0, 2), placed(0.0, 1.0, 3)], torch.ones(2))
    with pytest.raises(ValueError, match=r"^`bodies`: expected at least one; got none"):
        BlendBody([], torch.ones(0))
