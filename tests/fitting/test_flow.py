"""The flow that the ladder trains."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from mixture_cases import known
from visbi.certificate import effective_sample_size
from visbi.families.coupling_stack import CouplingStack
from visbi.fitting.flow import (
    FlowProposal,
    _cycle,
    flow_body,
    train_flow,
    train_flows,
    widened,
)
from visbi.fitting.mixture import defence
from visbi.fitting.refine import Blend
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
    before = effective_sample_size(log_weights(FlowProposal.of(body), banana)) / 4000
    elbos = [train_flow(body, target, round_=number, steps=110, batch=128) for number in range(2)]
    assert target.n_gradients == 2 * 110 * 128
    assert before < 0.3 and elbos == pytest.approx([4.0, 4.0], abs=0.05)
    for q in (FlowProposal.of(body), FlowProposal.of(widened(body))):
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
            body, target_of(log_p, 2), round_=0, steps=250, batch=128, points=points, forward_share=share
        )
        right.append(float((FlowProposal.of(body).sample(2000)[0, :, 0] > 0).double().mean()))
    assert right[0] < 0.02 and 0.2 < right[1] < 0.8


def test_regions_without_a_potential_do_not_break_training():
    def log_p(theta):
        return torch.where(theta[:, 0] > -1.0, -0.5 * theta.square().sum(-1), -math.inf)

    body, target = flow_body(2), target_of(log_p, 2)
    elbo = train_flow(body, target, round_=0, steps=60, batch=64)
    assert target.n_nonfinite > 0 and not math.isnan(elbo)
    assert all(bool(p.isfinite().all()) for p in body.parameters())
    z = FlowProposal.of(body).sample(1000)[0]
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
    q = FlowProposal.of(body)
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


def together(dim: int, fits: int) -> CouplingStack:
    return CouplingStack([flow_body(dim) for _ in range(fits)])


def by_fit(*each):
    """A potential for z (F N, d) that is another one for each fit."""

    def log_p(theta):
        parts = theta.reshape(len(each), -1, theta.shape[-1])
        return torch.cat([log_p(part) for log_p, part in zip(each, parts, strict=True)])

    return log_p


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_flows_trained_at_once_are_those_trained_alone(share):
    """Same start, same noise: a fit must not see its neighbours."""

    def gaussian(theta):
        return -0.5 * ((theta - 1.0) / 0.5).square().sum(-1)

    start = together(2, 2)
    noise = torch.randn(8, 2, 2, 32)
    points = torch.randn(2, 40, 2).double(), torch.full((2, 40), 1 / 40).double()
    chosen = torch.randint(40, (8, 2, 32))

    def run(flows, target, at, some):
        steps, picks = iter(noise[:, at]), iter(chosen[:, at])
        with (
            patch("visbi.families.coupling_stack.torch.randn", lambda *_, **__: next(steps)),
            patch("visbi.fitting.flow.torch.multinomial", lambda *_, **__: next(picks)),
        ):
            return train_flows(flows, target, round_=0, steps=8, batch=32, points=some, forward_share=share)

    both = start.only([0, 1])
    elbo = run(both, target_of(by_fit(banana, gaussian), 2), slice(None), points)
    for i, log_p in enumerate((banana, gaussian)):
        alone, at = start.only([i]), slice(i, i + 1)
        own = run(alone, target_of(log_p, 2), at, (points[0][at], points[1][at]))
        # float32 networks: products of two fits at once are summed in another order on some processors
        torch.testing.assert_close(elbo[i], own[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(both.layers[i], alone.layers[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(both.place[i], alone.place[0])


def test_a_fit_that_breaks_leaves_the_others_alone():
    def broken(theta):
        return theta.sum(-1) * 1e300 * theta.sum(-1)

    flows = together(2, 2)
    before = flows.only([0, 1])
    elbo = train_flows(flows, target_of(by_fit(banana, broken), 2), round_=0, steps=40, batch=64)
    assert elbo[0] > -5 and bool(flows.layers.isfinite().all() and flows.place.isfinite().all())
    assert float((flows.place[0] - before.place[0]).abs().max()) > 1e-3


def test_a_gradient_without_numbers_is_no_step():
    flows = together(2, 2)
    before = flows.only([0, 1])
    with torch.no_grad():
        flows.layers[1] = math.nan
    elbo = train_flows(flows, target_of(by_fit(banana, banana), 2), round_=0, steps=5, batch=64)
    assert float(elbo[1]) == -math.inf and elbo[0] > -100
    assert torch.equal(flows.place[1], before.place[1]) and not torch.equal(flows.place[0], before.place[0])


def test_a_share_of_forward_kl_for_each_fit():
    flows = together(2, 2)
    z = 3 + 0.1 * torch.randn(2, 200, 2, dtype=torch.float64)
    even = torch.full((2, 200), 1 / 200, dtype=torch.float64)
    target = target_of(lambda theta: -0.5 * theta.square().sum(-1), 2)
    shares = torch.tensor([0.0, 0.9], dtype=torch.float64)
    train_flows(flows, target, round_=0, steps=40, batch=64, points=(z, even), forward_share=shares)
    place = flows.push(torch.zeros(2, 1, 2))[0][:, 0].mean(-1)
    assert abs(float(place[0])) < 0.3 < 0.8 < float(place[1])


def test_a_round_is_a_cycle():
    rates = [_cycle(step, 200, 1.0) for step in range(200)]
    torch_rates = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(torch_rates, 1.0, total_steps=200, pct_start=0.2)
    for rate, momentum in rates:
        group = torch_rates.param_groups[0]
        assert rate == pytest.approx(group["lr"], rel=1e-6)
        assert momentum == pytest.approx(group["momentum"], rel=1e-6)
        torch_rates.step()
        if schedule.last_epoch < 199:
            schedule.step()
    for steps in (1, 2, 5):  # too short for a cycle, and no error
        assert all(0 < _cycle(step, steps, 1.0)[0] <= 1 for step in range(steps))


@pytest.mark.parametrize("wide", [False, True])
def test_score_of_a_proposal(wide):
    body = flow_body(3)
    train_flow(body, target_of(banana, 3), round_=0, steps=20, batch=64)
    body.double()
    q = FlowProposal.of(widened(body) if wide else body)
    z = q.sample(50).requires_grad_()
    inner = q.body
    (want,) = torch.autograd.grad(inner.log_prob(z[0]).sum(), z)
    log_q, score = q.log_prob_and_score(z.detach())
    torch.testing.assert_close(log_q, q.log_prob(z.detach()))
    torch.testing.assert_close(score, want)
    far = q.log_prob_and_score(torch.full((1, 1, 3), 1e250, dtype=torch.float64))
    assert float(far[0]) == -math.inf and bool((far[1] == 0).all())


def test_many_proposals_are_each_of_them():
    flows = together(2, 3)
    flows.layers += 0.05 * torch.randn_like(flows.layers)
    q = FlowProposal.widened(flows)
    z = q.sample(5000)
    assert z.shape == (3, 5000, 2)
    log_q, score = q.log_prob_and_score(z)
    torch.testing.assert_close(log_q, q.log_prob(z), rtol=1e-4, atol=1e-4)
    for i in range(3):
        own = q.of_fits(torch.arange(3) == i)
        log_one, score_one = own.log_prob_and_score(z[i : i + 1])
        torch.testing.assert_close(log_one[0], log_q[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score_one[0], score[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.body.log_prob(z[i]), log_q[i], rtol=1e-4, atol=1e-4)
    # drawn from what it says: the mean of 1 / q over draws inside a square is the square's area
    inside = (z.abs() < 1.5).all(-1)
    area = (torch.exp(-log_q) * inside).mean(1)
    torch.testing.assert_close(area, torch.full((3,), 9.0).double(), atol=0.5, rtol=0)
    flows.layers += 1.0  # not the proposal's
    torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-4, atol=1e-4)


def test_draws_know_their_density_however_far_out_they_are():
    """Layers that throw draws a million widths out: what leads back from there in float32 is off by far."""
    torch.manual_seed(0)
    body = flow_body(4)
    for parameter in body.layers.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    flow, exact = FlowProposal.of(widened(body)), FlowProposal.of(widened(copy.deepcopy(body).double()))
    rest = known([1.0], [[0.0] * 4], 0.5)
    third = torch.tensor([1 / 3]).double()
    for q, other in ((flow, exact), (Blend(flow, rest, third), Blend(exact, rest, third))):
        (z, log_q), (_, expected) = (seeded_draw(each) for each in (q, other))
        assert float(z.abs().max()) > 1e6
        torch.testing.assert_close(log_q, expected, atol=0.01, rtol=0)
        assert float((q.log_prob(z) - expected).abs().max()) > 1e3  # which is why


def seeded_draw(q):
    torch.manual_seed(1)
    return q.draw(4000)
