"""Regression of bends on points of which the map is known, and what is proposed with them."""

import math

import pytest
import torch
from torch import Tensor

from visbi.families.bent import Bend
from visbi.families.gaussians import Mixture
from visbi.fitting import bend as module
from visbi.fitting.bend import BentProposal, bend_of, bent_around


def even(z: Tensor) -> Tensor:
    return torch.full(z.shape[:-1], 1.0 / z.shape[-2]).double()


def one_bend(z: Tensor, weights: Tensor | None = None) -> tuple[Bend, float]:
    """Of points (N, d)."""
    bend, nats = bend_of(z[None], even(z[None]) if weights is None else weights[None])
    return bend.of_fits(0), float(nats)


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
    bend, nats = one_bend(z)
    assert nats > 1.0
    if last is not None:
        assert bend.order[-1] == last
    assert_standard(bend.pull(draw(20_000))[0])


def test_order_of_a_chain():
    torch.manual_seed(0)
    z = chain(2000)[:, [2, 0, 1]]
    assert one_bend(z)[0].order.tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_mouth_of_a_funnel_alone_tells_what_comes_first(seed: int):
    """There the scales of all entries are told by each other, and the one that they follow by all of them."""
    torch.manual_seed(seed)
    z = funnel(6000, 10)
    z = z[z[:, 0] > 0.3][:1000]
    assert one_bend(z)[0].order[0] == 0


@pytest.mark.parametrize("d", [3, 10, 20])
def test_nothing_is_told_of_a_gaussian(d: int):
    torch.manual_seed(1)
    tril = torch.randn(d, d).double().tril() + 2 * torch.eye(d).double()
    z = torch.randn(1000, d).double() @ tril.T + 5.0
    bend, nats = one_bend(z)
    assert nats < 0.1
    u, _ = bend.pull(z)
    torch.testing.assert_close(u.std(0), torch.ones(d).double(), atol=0.1, rtol=0)


def test_coefficients():
    torch.manual_seed(0)
    z = banana(4000)
    bend, _ = one_bend(z)
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
    bend, nats = one_bend(wide, torch.softmax(log_w, 0))
    assert nats == pytest.approx(math.log(math.sqrt(2.01) / 0.1), abs=0.2)
    z = torch.randn(5000, 3).double()
    z[:, 1] = z[:, 0].square() + 0.1 * z[:, 1]
    assert_standard(bend.pull(z)[0])


class TestSideBySide:
    def points(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return torch.stack([banana(800), funnel(800, 4), torch.randn(800, 4).double()]), torch.ones(
            3, 800
        ) / 800

    def assert_each_as_alone(self, z: Tensor, weights: Tensor) -> None:
        bend, nats = bend_of(z, weights)
        for i in range(len(z)):
            alone, told = bend_of(z[i : i + 1, weights[i] > 0], weights[i : i + 1, weights[i] > 0])
            torch.testing.assert_close(nats[i : i + 1], told, atol=1e-3, rtol=1e-3)
            for name, value in alone.tensors.items():
                torch.testing.assert_close(bend.tensors[name][i : i + 1], value, atol=1e-3, rtol=1e-3)

    def test_each_is_what_it_would_be_alone(self):
        z, weights = self.points()
        self.assert_each_as_alone(z, weights.double())

    def test_in_several_turns(self, monkeypatch):
        monkeypatch.setattr(module, "_AT_ONCE", 1)
        self.test_points_without_weight_do_not_count()

    def test_points_without_weight_do_not_count(self):
        z, weights = self.points()
        z[0, 600:] = 1000.0
        weights[0, 600:] = 0.0
        self.assert_each_as_alone(z, (weights / weights.sum(1, keepdim=True)).double())

    def test_mixtures_where_they_are_asked_for(self):
        z, weights = self.points()
        q, nats = bent_around(z, weights.double(), mixed=torch.tensor([True, False, False]))
        count = q.noise.log_weights.isfinite().sum(1)
        assert count[0] > 3 and count[1] == count[2] == 3
        assert nats[0] > 1 and nats[1] > 0.5 and nats[2] < 0.1

    def test_better(self):
        z, weights = self.points()
        q = bent_around(z, weights.double())[0]
        other = bent_around(z.flip(0), weights.double(), mixed=torch.tensor([False, True, False]))[0]
        where = torch.tensor([False, True, True])
        chosen = q.better(other, where)
        expected = torch.where(where[:, None], other.log_prob(z), q.log_prob(z))
        torch.testing.assert_close(chosen.log_prob(z), expected)
        fewer = chosen.of_fits(where)
        torch.testing.assert_close(fewer.log_prob(z[where]), expected[where])


class TestProposal:
    def q(self) -> BentProposal:
        torch.manual_seed(0)
        z = banana(1000)
        noise = Mixture.of(
            torch.zeros(1, 2).double(),
            torch.randn(1, 2, 4).double(),
            torch.eye(4).double().expand(1, 2, 4, 4),
        )
        return BentProposal(noise, bend_of(z[None], even(z[None]))[0])

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
