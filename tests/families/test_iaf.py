"""Gated inverse autoregressive flow: its update, its start and what it learns."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from visbi.families import LinkedFamily, named_body
from visbi.families.gated import Gate
from visbi.families.iaf import InverseAutoregressiveBody
from visbi.objectives import reverse_kl
from visbi.priors import coordinates


def test_update_by_hand():
    x, m, a = torch.randn(3, 50, dtype=torch.float64)
    gate = Gate(m, a)
    share = torch.sigmoid(a + 2)
    y, ladj = gate.call_and_ladj(x)
    torch.testing.assert_close(y, x * share * (1 + math.exp(-2)) + (1 - share) * m)
    torch.testing.assert_close(ladj.exp(), share * (1 + math.exp(-2)))
    torch.testing.assert_close(gate.inv(y), x)
    identity = Gate(0 * m, 0 * a)
    torch.testing.assert_close(identity(x), x)


def test_a_gate_stretches_by_little_and_closes_without_harm():
    a = torch.tensor([-1e3, -100.0, 0.0, 1e3])
    gate = Gate(torch.ones(4), a)
    y, ladj = gate.call_and_ladj(torch.full((4,), 5.0))
    assert bool(ladj.isfinite().all()) and float(ladj.max()) < math.log(1.14)
    torch.testing.assert_close(y[:2], torch.ones(2))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_starts_near_the_standard_normal(dim):
    body = InverseAutoregressiveBody(dim, num_transforms=5, hidden_features=50)
    standard = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
    with torch.no_grad():
        z, log_q = body.rsample_and_log_prob(2000)
    assert float((log_q - standard.log_prob(z)).abs().mean()) < 0.02


def test_learns_a_banana():
    def log_p(theta):
        x, y = theta.unbind(-1)
        return Normal(0.0, 1.0).log_prob(x) + Normal(x.square() - 1, 0.5).log_prob(y)

    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    loss = {}
    for name in ("gaussian", "iaf"):
        q = LinkedFamily(named_body(name, num_transforms=3)(2), coordinates(prior), None)
        optimizer = torch.optim.Adam(q.trainable(), 5e-3)
        for _ in range(300):
            optimizer.zero_grad()
            reverse_kl(q, log_p, 128).surrogate.backward()
            optimizer.step()
        with torch.no_grad():
            draws = q.draw(4000)
            loss[name] = float((draws.log_q - log_p(draws.theta)).mean())
    assert loss["gaussian"] > 0.3
    assert -0.01 < loss["iaf"] < 0.1


def test_layers_and_width_are_as_asked():
    body = named_body("iaf", num_transforms=3, hidden_features=9)(4)
    assert isinstance(body, InverseAutoregressiveBody) and len(body.layers) == 3
    assert all(layer.hyper[0].out_features == 9 for layer in body.layers)
