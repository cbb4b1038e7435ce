"""Flows with wider noise, against closed forms and quadrature."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.families.coupling import CouplingBody
from visbi.families.widened import WidenedBody


def rough(dim: int, amount: float = 0.1) -> CouplingBody:
    """A flow that is nowhere near the identity."""
    body = CouplingBody(dim, num_transforms=4, hidden_features=8)
    with torch.no_grad():
        for p in body.layers.parameters():
            p.add_(amount * torch.randn_like(p))
    root = torch.eye(dim, dtype=torch.float64) + 0.5 * torch.ones(dim, dim).double().tril(-1)
    body.placed(torch.full((dim,), 0.5).double(), root)
    return body


def normals(z: torch.Tensor, scales: tuple[float, ...], shares: tuple[float, ...]) -> torch.Tensor:
    eye = torch.eye(z.shape[1], dtype=torch.float64)
    return sum(
        share * MultivariateNormal(torch.zeros(len(eye)).double(), scale**2 * eye).log_prob(z).exp()
        for scale, share in zip(scales, shares, strict=True)
    ).log()


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_that_is_the_identity_leaves_the_noise(dim):
    body = WidenedBody(CouplingBody(dim), scales=(1.0, 3.0), shares=(0.9, 0.1))
    z = 3 * torch.randn(200, dim, dtype=torch.float64)
    torch.testing.assert_close(
        body.log_prob(z).detach(), normals(z, (1.0, 3.0), (0.9, 0.1)), atol=1e-4, rtol=1e-4
    )


def test_density_integrates_to_one_in_the_plane():
    body = WidenedBody(rough(2), scales=(1.0, 2.0, 4.0), shares=(0.7, 0.2, 0.1))
    axis = torch.linspace(-40, 40, 401, dtype=torch.float64)
    with torch.no_grad():
        mass = body.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.2**2
    assert float(mass) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_draws_agree_with_the_density(dim):
    body = WidenedBody(rough(dim), scales=(1.0, 2.0), shares=(0.8, 0.2))
    with torch.no_grad():
        z, log_q = body.rsample_and_log_prob(500)
        again = body.log_prob(z)
    assert z.shape == (500, dim) and z.dtype == log_q.dtype == torch.float64
    torch.testing.assert_close(again, log_q, atol=2e-3, rtol=1e-4)


def test_draws_by_importance_make_a_known_integral():
    """Mean of N(z; 0, I) / q(z) over draws of q is one."""
    body = WidenedBody(rough(2), scales=(1.0, 2.5), shares=(0.7, 0.3))
    with torch.no_grad():
        z, log_q = body.rsample_and_log_prob(20_000)
    ratio = (normals(z, (1.0,), (1.0,)) - log_q).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * float(ratio.std()) / 20_000**0.5)
    assert float(ratio.std()) < 5


def test_one_scale_of_one_is_the_flow_itself():
    inner = rough(3)
    body = WidenedBody(inner, scales=(1.0,), shares=(1.0,))
    z = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(body.log_prob(z), inner.log_prob(z).double(), atol=1e-4, rtol=1e-4)


def test_it_never_falls_below_its_share_of_the_flow():
    inner = rough(2)
    body = WidenedBody(inner, scales=(1.0, 5.0), shares=(0.9, 0.1))
    z = 5 * torch.randn(500, 2, dtype=torch.float64)
    with torch.no_grad():
        assert float((body.log_prob(z) - inner.log_prob(z)).min()) > math.log(0.9) - 1e-3


def test_shares_are_normalised_and_the_flow_is_shared():
    inner = rough(2)
    body = WidenedBody(inner, scales=(1.0, 2.0), shares=(3.0, 1.0))
    torch.testing.assert_close(body.shares, torch.tensor([0.75, 0.25]).double())
    z = torch.zeros(1, 2, dtype=torch.float64)
    with torch.no_grad():
        before = float(body.log_prob(z))
        for p in inner.layers.parameters():
            p.add_(0.05)
        assert float(body.log_prob(z)) != before


def test_noise_of_each_scale_by_its_share():
    body = WidenedBody(CouplingBody(1), scales=(0.01, 100.0), shares=(0.75, 0.25))
    with torch.no_grad():
        z, _ = body.rsample_and_log_prob(4000)
    assert float((z.abs() > 0.1).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert [len(body.rsample_and_log_prob(n)[0]) for n in (0, 1)] == [0, 1]


def test_no_nan_wherever_it_is_asked():
    body = WidenedBody(rough(2, 0.5), scales=(1.0, 2.0), shares=(0.9, 0.1))
    z = torch.tensor([[1e30, 0.0], [math.nan, 0.0], [math.inf, 1.0], [0.0, 0.0]]).double()
    with torch.no_grad():
        found = body.log_prob(z)
    assert not bool(found.isnan().any()) and bool(found[-1].isfinite()) and found[1] == -math.inf


@pytest.mark.parametrize(
    ("scales", "shares"), [((1.0, 2.0), (1.0,)), ((1.0, 0.0), (0.5, 0.5)), ((1.0,), (-1.0,)), ((), ())]
)
def test_scales_and_shares(scales, shares):
    with pytest.raises(ValueError, match=r"^`scales` and `shares`: expected as many positive numbers"):
        WidenedBody(CouplingBody(2), scales=scales, shares=shares)
