"""Gradients by a mixture's weights, along which draws do not move, against quadrature."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from visbi.families import LinkedFamily
from visbi.families.base import Draws
from visbi.families.mixture import MixtureBody
from visbi.objectives import importance_weighted, renyi, reverse_kl
from visbi.objectives.particles import Particles, choice_term
from visbi.priors import coordinates

# modes so far apart that no draw comes to lie between them
LOC = torch.tensor([[-6.0], [6.0]], dtype=torch.float64)
PRIOR = MultivariateNormal(torch.zeros(1).double(), torch.eye(1).double())


def family(weight=0.3, loc=LOC):
    weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
    body = MixtureBody.of(weights, loc, torch.tensor([0.5, 1.0]).reshape(2, 1, 1))
    return LinkedFamily(body, coordinates(PRIOR), None)


def log_p(theta):
    parts = torch.stack([Normal(-6.0, 1.0).log_prob(theta[:, 0]), Normal(6.3, 0.8).log_prob(theta[:, 0])])
    return torch.logsumexp(parts + torch.tensor([0.6, 0.4]).log()[:, None], 0)


def bound(log_w, order):
    """Minus the bound of the draws in the last axis."""
    if order == 0:
        return -log_w.mean(-1)
    return -(torch.logsumexp(order * log_w, -1) - math.log(log_w.shape[-1])) / order


def by_quadrature(q, order, n):
    z = torch.cat([centre + torch.linspace(-6.0, 6.0, 241, dtype=torch.float64) for centre in (-6.0, 6.0)])
    step = float(z[1] - z[0])
    log_q = q.log_prob(z[:, None])
    log_w = log_p(z[:, None]) - log_q
    density = log_q.exp() * step
    if n == 1 or order == 0:
        value = (density * bound(log_w[:, None], order)).sum()
    else:
        pairs = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w[None]), -1)
        value = (density[:, None] * density * bound(pairs, order)).sum()
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, [p for p in q.trainable() if p.numel()])]
    )


CASES = {
    "reverse KL": (0.0, 200, lambda q: reverse_kl(q, log_p, 200)),
    "reverse KL of two": (0.0, 2, lambda q: reverse_kl(q, log_p, 2)),
    "importance weighted": (1.0, 2, lambda q: importance_weighted(q, log_p, 100, K=2)),
    "one draw a group": (1.0, 1, lambda q: importance_weighted(q, log_p, 200, K=1)),
    "Renyi": (0.5, 2, lambda q: renyi(q, log_p, 2, alpha=0.5)),
    "Renyi above one": (-0.5, 2, lambda q: renyi(q, log_p, 2, alpha=1.5)),
    "Renyi at one": (0.0, 200, lambda q: renyi(q, log_p, 200, alpha=1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_by_quadrature(case):
    order, n, loss = CASES[case]
    q = family()
    parameters = [p for p in q.trainable() if p.numel()]
    want = by_quadrature(q, order, n)
    found = []
    for _ in range(1500 if case in ("Renyi", "Renyi above one", "reverse KL of two") else 120):
        gradient = torch.autograd.grad(loss(q).surrogate, parameters)
        found.append(torch.cat([g.flatten() for g in gradient]))
    values = torch.stack(found)
    error = values.std(0) / math.sqrt(len(values))
    assert bool((want[:2].abs() > 10 * error[:2]).all())  # of the logits
    assert bool(((values.mean(0) - want).abs() < 5 * error + 1e-9).all())


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_when_q_is_exact(case):
    q = family()
    exact = family()

    def itself(theta):
        return exact.log_prob(theta) + 7.0

    losses = {
        "reverse KL": lambda: reverse_kl(q, itself, 8),
        "reverse KL of two": lambda: reverse_kl(q, itself, 2),
        "importance weighted": lambda: importance_weighted(q, itself, 4, K=2),
        "one draw a group": lambda: importance_weighted(q, itself, 4, K=1),
    }
    loss = losses.get(case, lambda: renyi(q, itself, 8, alpha=1 - CASES[case][0]))
    for gradient in torch.autograd.grad(loss().surrogate, q.trainable(), allow_unused=True):
        assert gradient is None or not gradient.numel() or float(gradient.abs().max()) < 1e-9


def test_weights_of_modes_far_apart_are_learnt():
    q = family(0.9)
    optimizer = torch.optim.Adam(q.trainable(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        reverse_kl(q, log_p, 64).surrogate.backward()
        optimizer.step()
    assert float(q.body.weights[0].detach()) == pytest.approx(0.6, abs=0.02)


def test_potentials_that_are_not_finite():
    q = family()

    def nowhere(theta):
        return torch.full((len(theta),), -torch.inf)

    def half(theta):
        return torch.where(theta[:, 0] > 0, log_p(theta), torch.nan)

    for potential in (nowhere, half):
        for loss in (
            reverse_kl(q, potential, 6),
            importance_weighted(q, potential, 4, K=3),
            importance_weighted(q, potential, 4, K=1),
            renyi(q, potential, 6),
            renyi(q, potential, 6, alpha=2.0),
            reverse_kl(q, potential, 1),
        ):
            for gradient in torch.autograd.grad(loss.surrogate, q.trainable(), allow_unused=True):
                assert gradient is None or bool(gradient.isfinite().all())


@pytest.mark.parametrize("order", [0.5, 1.0, -1.0])
def test_one_draw_with_all_the_weight(order):
    q = family()
    draws = q.draw(3)
    certain = Particles(draws, torch.tensor([1e6, 0.0, -1e6]).double(), torch.ones(3, dtype=torch.bool))
    term = choice_term(certain, order=order)
    assert bool(torch.autograd.grad(term, q.trainable()[0])[0].isfinite().all())


@pytest.mark.parametrize("order", [0.5, 1.0, -1.0])
def test_draws_that_do_not_count(order):
    choice = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    values = torch.tensor([0.3, -0.4, 0.9, 0.1, 0.2, -0.6], dtype=torch.float64)

    def gradient(keep, group):
        n = len(keep)
        draws = Draws(torch.zeros(n, 1), torch.zeros(n).double(), torch.zeros(n).double(), choice[:n])
        counted = torch.tensor(keep)
        particles = Particles(draws, torch.where(counted, values[:n], 0.0), counted)
        return torch.autograd.grad(choice_term(particles, order=order, group=group), choice)[0]

    whole = gradient([True, True], None)
    assert bool((whole[:2] != 0).all())
    # one of three left out is a group of two; a group of one teaches nothing; one of none is no group
    torch.testing.assert_close(gradient([True, True, False], 3), whole)
    torch.testing.assert_close(gradient([True, True, False, False, True, False], 3), whole / 2)
    torch.testing.assert_close(gradient([True, True, False, False, False, False], 3), whole)
    assert bool((gradient([False, True, False], 3) == 0).all())


def test_an_order_next_to_one_is_the_reverse_kl():
    q = family()
    found = []
    for alpha in (1.0, 1.0 - 1e-14):
        torch.manual_seed(1)
        surrogate = renyi(q, log_p, 16, alpha=alpha).surrogate
        found.append(torch.autograd.grad(surrogate, q.trainable()[0])[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_place_keeps_the_choice():
    q = family(loc=0.1 * LOC)
    loc, tril = torch.tensor([2.0]).double(), torch.tensor([[3.0]]).double()
    placed = q.placed(loc, tril)
    draws = placed.draw(7)
    assert draws.log_q_choice is not None
    got = torch.autograd.grad(draws.log_q_choice.sum(), [q.body.raw_logits])[0]
    want = torch.autograd.grad(q.body.log_prob((draws.theta.detach() - 2) / 3).sum(), [q.body.raw_logits])[0]
    torch.testing.assert_close(got, want)
    assert placed.draw(7, path=False).log_q_choice is None
