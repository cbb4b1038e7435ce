"""The flow that the ladder trains."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from visbi.certificate import effective_sample_size
from visbi.fitting.flow import FlowProposal, flow_body, train_flow, widened
from visbi.fitting.mixture import defence
from visbi.fitting.target import Target
from visbi.priors import coordinates


def target_of(log_p, dim: int) -> Target:
    return Target(log_p, coordinates(MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())))


def banana(theta: Tensor) -> Tensor:
    """N(z_0; 0, 1) N(z_1; z_0^2 - 1, .3^2), standard normal beside; its log-evidence is 4."""
    bent = (theta[:, 1] - theta[:, 0].square() + 1) / 0.3
    inside = theta[:, 0].square() + bent.square() + theta[:, 2:].square().sum(-1)
    return 4.0 - 0.5 * inside - 0.5 * theta.shape[1] * math.log(2 * math.pi) - math.log(0.3)


def log_weights(q, log_p, n: int = 4000) -> Tensor:
    z = q.sample(n)
    return log_p(z[0]) - q.log_prob(z)[0]


@pytest.mark.parametrize("dim", [2, 3])
def test_a_banana(dim):
    body, target = flow_body(dim), target_of(banana, dim)
    before = effective_sample_size(log_weights(FlowProposal(body), banana)) / 4000
    elbos = [train_flow(body, target, round_=number, steps=110, batch=128) for number in range(2)]
    assert target.n_gradients == 2 * 110 * 128
    assert before < 0.3 and elbos[0] < elbos[1] < 4.02 and elbos[1] == pytest.approx(4.0, abs=0.1)
    for q in (FlowProposal(body), FlowProposal(widened(body))):
        log_w = log_weights(q, banana)
        assert effective_sample_size(log_w) / 4000 > 0.75
        assert float(log_w.logsumexp(0)) - math.log(4000) == pytest.approx(4.0, abs=0.05)


def test_forward_kl_keeps_a_mode_that_reverse_kl_would_leave():
    """Two modes far apart; the flow starts on one of them and is shown both."""
    places = torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)

    def log_p(theta):
        return torch.logsumexp(-0.5 * ((theta[:, None] - places) / 0.5).square().sum(-1), 1)

    z = places.repeat(500, 1) + 0.5 * torch.randn(1000, 2, dtype=torch.float64)
    points = z, torch.full((1000,), 1e-3, dtype=torch.float64)
    right = []
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        body = flow_body(2)
        body.placed(places[0], 0.5 * torch.eye(2, dtype=torch.float64))
        train_flow(
            body, target_of(log_p, 2), round_=0, steps=100, batch=128, points=points, forward_share=share
        )
        right.append(float((FlowProposal(body).sample(2000)[0, :, 0] > 0).double().mean()))
    assert right[0] < 0.02 and 0.2 < right[1] < 0.8


def test_regions_without_a_potential_do_not_break_training():
    def log_p(theta):
        return torch.where(theta[:, 0] > -1.0, -0.5 * theta.square().sum(-1), -math.inf)

    body, target = flow_body(2), target_of(log_p, 2)
    elbo = train_flow(body, target, round_=0, steps=60, batch=64)
    assert target.n_nonfinite > 0 and not math.isnan(elbo)
    assert all(bool(p.isfinite().all()) for p in body.parameters())
    z = FlowProposal(body).sample(1000)[0]
    assert bool(z.isfinite().all())


def test_a_potential_that_is_nowhere_finite_changes_nothing_to_nan():
    body, target = flow_body(2), target_of(lambda theta: theta.sum(-1) * math.nan, 2)
    train_flow(body, target, round_=0, steps=10, batch=16)
    assert all(bool(p.isfinite().all()) for p in body.parameters())


def test_later_rounds_take_smaller_steps():
    moved = []
    for number in (0, 3, 9):
        torch.manual_seed(0)
        body = flow_body(2)
        before = [p.clone() for p in body.parameters()]
        train_flow(body, target_of(banana, 2), round_=number, steps=3, batch=32)
        moved.append(
            sum(float((p - q).detach().norm()) for p, q in zip(body.parameters(), before, strict=True))
        )
    assert moved[0] > 2 * moved[1] > 0 and moved[2] == moved[1]


def test_the_proposal_is_the_body_in_float64():
    body = flow_body(3)
    z = torch.randn(1, 10, 3, dtype=torch.float64)
    q = FlowProposal(body)
    assert q.sample(7).shape == (1, 7, 3) and q.sample(7).dtype == torch.float64
    found = q.log_prob(z)
    assert found.shape == (1, 10) and found.dtype == torch.float64 and not found.requires_grad
    torch.testing.assert_close(found[0], body.log_prob(z[0]).detach().double(), atol=1e-5, rtol=1e-5)
    assert not q.sample(3).requires_grad


def test_widened_as_a_mixture_is_defended():
    inner = flow_body(2)
    inner.placed(torch.tensor([1.0, -1.0]).double(), torch.tensor([[0.5, 0.0], [0.2, 0.4]]).double())
    train_flow(inner, target_of(banana, 2), round_=0, steps=30, batch=64)
    body = widened(inner)
    assert body.scales.tolist() == [1.0, *(factor for factor, _ in defence(2))]
    assert body.shares.tolist() == pytest.approx([0.9, *(share for _, share in defence(2))])
    axes = [
        torch.linspace(-25, 25, 501, dtype=torch.float64),
        torch.linspace(-60, 90, 751, dtype=torch.float64),
    ]
    with torch.no_grad():
        mass = body.log_prob(torch.cartesian_prod(*axes)).exp().sum() * 0.1 * 0.2
    assert float(mass) == pytest.approx(1.0, abs=5e-3)


def test_width_of_the_networks():
    sizes = [sum(p.numel() for p in flow_body(dim).parameters()) for dim in (20, 21)]
    assert sizes[1] > 2 * sizes[0]
