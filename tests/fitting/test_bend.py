"""Regression of bends on points of which the map is known, and what is proposed with them."""

import math

import pytest
import torch
from torch import Tensor

from visbi.families.gaussians import Mixture
from visbi.fitting.bend import BentProposal, bend_of


def even(z: Tensor) -> Tensor:
    return torch.full((len(z),), 1.0 / len(z)).double()


def banana(n: int, d: int = 4) -> Tensor:
    z = torch.randn(n, d).double()
    z[:, 2] = z[:, 0].square() + z[:, 0] * z[:, 1] + 0.1 * z[:, 2]
    return z


def chain(n: int, noise: float = 0.1) -> Tensor:
    z = torch.randn(n, 3).double()
    z[:, 1] = z[:, 0].square() + noise * z[:, 1]
    z[:, 2] = z[:, 1].square() + noise * z[:, 2]
    return z


def funnel(n: int, d: int = 6) -> Tensor:
    z = torch.randn(n, d).double()
    z[:, 1:] *= z[:, :1].exp()
    return z


def assert_standard(u: Tensor) -> None:
    torch.testing.assert_close(u.mean(0), torch.zeros(u.shape[1]).double(), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(u.T), torch.eye(u.shape[1]).double(), atol=0.12, rtol=0)
    kurtosis = u.pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full_like(kurtosis, 3.0), atol=0.7, rtol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("draw", "last"), [(banana, 2), (chain, 2), (funnel, None)])
def test_what_is_bent_becomes_standard_normal(draw, last: int | None, seed: int):
    torch.manual_seed(seed)
    z = draw(3000)
    bend, nats = bend_of(z, even(z))
    assert nats > 1.0
    if last is not None:
        assert bend.order[-1] == last
    assert_standard(bend.pull(draw(20_000))[0])


def test_order_of_a_chain():
    torch.manual_seed(0)
    z = chain(2000)[:, [2, 0, 1]]
    assert bend_of(z, even(z))[0].order.tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_mouth_of_a_funnel_alone_tells_what_comes_first(seed: int):
    """There the scales of all entries are told by each other, and the one that they follow by all of them."""
    torch.manual_seed(seed)
    z = funnel(6000, 10)
    z = z[z[:, 0] > 0.3][:1000]
    assert bend_of(z, even(z))[0].order[0] == 0


@pytest.mark.parametrize("d", [3, 10, 20])
def test_nothing_is_told_of_a_gaussian(d: int):
    torch.manual_seed(1)
    tril = torch.randn(d, d).double().tril() + 2 * torch.eye(d).double()
    z = torch.randn(1000, d).double() @ tril.T + 5.0
    bend, nats = bend_of(z, even(z))
    assert nats < 0.1
    u, _ = bend.pull(z)
    torch.testing.assert_close(u.std(0), torch.ones(d).double(), atol=0.1, rtol=0)


def test_coefficients():
    torch.manual_seed(0)
    z = banana(4000)
    bend, _ = bend_of(z, even(z))
    at = torch.zeros(3, 4).double()
    at[:, 0] = torch.tensor([-2.0, 0.0, 30.0])  # far beyond the points, too
    u, _ = bend.pull(at)
    u[:, -1] = 0.0  # of entry 2
    torch.testing.assert_close(bend.push(u)[0][:, 2], at[:, 0].square(), atol=0.2, rtol=0.01)


def test_weights_count():
    """Draws of something wider, weighted, tell the same."""
    torch.manual_seed(0)
    wide = 1.5 * torch.randn(20_000, 3).double()
    log_w = -0.5 * wide.square().sum(-1) + 0.5 * (wide / 1.5).square().sum(-1)
    wide[:, 1] = wide[:, 0].square() + 0.1 * wide[:, 1]
    bend, nats = bend_of(wide, torch.softmax(log_w, 0))
    assert nats == pytest.approx(math.log(math.sqrt(2.01) / 0.1), abs=0.2)
    z = torch.randn(5000, 3).double()
    z[:, 1] = z[:, 0].square() + 0.1 * z[:, 1]
    assert_standard(bend.pull(z)[0])


class TestProposal:
    def q(self) -> BentProposal:
        torch.manual_seed(0)
        z = banana(1000)
        noise = Mixture.of(
            torch.zeros(1, 2).double(),
            torch.randn(1, 2, 4).double(),
            torch.eye(4).double().expand(1, 2, 4, 4),
        )
        return BentProposal(noise, bend_of(z, even(z))[0])

    def test_draws_have_the_density_that_they_say(self):
        q = self.q()
        z, log_q = q.draw(300)
        assert z.shape == (1, 300, 4) and q.sample(5).shape == (1, 5, 4)
        torch.testing.assert_close(q.log_prob(z), log_q)

    def test_score(self):
        q = self.q()
        z = q.sample(20)
        log_q, score = q.log_prob_and_score(z)
        slope = torch.autograd.functional.jacobian(lambda z: q.log_prob(z).sum(), z)
        torch.testing.assert_close(score, slope)
        torch.testing.assert_close(log_q, q.log_prob(z))
        assert not (log_q.requires_grad or score.requires_grad)

    def test_of_fits(self):
        q = self.q()
        assert q.of_fits(torch.tensor([True])) is q
