"""The rung of flows: who answers, several fits at once, splines where there are several modes."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from visbi.certificate.rows import effective_sample_size
from visbi.families.coupling_stack import CouplingStack
from visbi.families.gaussians import Mixture
from visbi.fitting import flying, verdicts
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.explore import explore
from visbi.fitting.flow import FlowProposal, flow_body, show_points, train_flows
from visbi.fitting.flying import fly, polished
from visbi.fitting.pool import Pool, thinned
from visbi.fitting.target import Target
from visbi.priors import coordinates


def target_of(log_p, dim: int = 2) -> Target:
    prior = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
    return Target(log_p, coordinates(prior))


def banana(theta: Tensor) -> Tensor:
    """Its log-evidence is 4."""
    bent = (theta[:, 1] - theta[:, 0].square() + 1) / 0.3
    inside = theta[:, 0].square() + bent.square() + theta[:, 2:].square().sum(-1)
    return 4.0 - 0.5 * inside - 0.5 * theta.shape[1] * math.log(2 * math.pi) - math.log(0.3)


def rings(theta: Tensor) -> Tensor:
    """Two rings, two to one; the log-evidence is log 3 + log of a ring's area, nearly."""
    away = torch.stack([(theta - shift).norm(dim=-1) - 0.8 for shift in (1.3, -1.3)])
    return torch.logsumexp(-0.5 * (away / 0.05).square() + torch.tensor([[0.0], [math.log(2.0)]]), 0)


def group(log_p, dim: int = 2, modes: int = 1, **record) -> Group:
    """One fit that knows draws of a wide Gaussian."""
    target = target_of(log_p, dim)
    pool = Pool(target)
    loc = torch.zeros(1, 1, dim).double()
    pool.draw(Mixture.of(loc[..., 0], loc, 2.0 * torch.eye(dim).double()[None, None]), ALONE.trial)
    return Group(target, [Record(count_modes=lambda: modes, **record)], ALONE, pool)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(flying, "_STEPS", 120)


def test_a_banana_is_answered(short):
    now = group(banana)
    assert list(fly(now, spare=0.2)) == []
    record = now.records[0]
    assert record.flown and record.answer is not None
    rung, answer = record.answer
    assert rung == "a flow" and answer.report.status in ("ok", "corrected")
    assert answer.report.log_evidence == pytest.approx(4.0, abs=0.05)
    assert not isinstance(answer.q, Mixture) and answer.q.of_fits(torch.tensor([True])).sample(3).shape == (
        1,
        3,
        2,
    )


def test_a_flow_is_tried_once():
    now = group(banana, flown=True)
    assert list(fly(now, spare=0.2)) == [now] and now.target.n_gradients == 0
    blind = group(banana)
    blind.gradient = False
    assert list(fly(blind, spare=0.2)) == [blind] and not blind.records[0].flown


def test_what_no_flow_fits_goes_on_with_a_word(short, monkeypatch):
    monkeypatch.setattr(flying, "_ROUNDS", 1)
    monkeypatch.setattr(flying, "_STEPS", 2)
    monkeypatch.setattr(verdicts, "_MANY", math.inf)
    now = group(rings, modes=2)
    (left,) = fly(now, spare=1.1)  # nothing has that much to spare
    assert left.records == now.records and left.records[0].best is not None
    assert any("flow" in line for line in left.records[0].story)


def ripples(theta: Tensor) -> Tensor:
    return (2 * torch.cos(30 * theta) - 2 * theta.square()).sum(-1)


@pytest.mark.parametrize(("log_p", "steps", "rounds"), [(ripples, 100, 2), (banana, 40, 5)])
def test_a_flow_that_comes_no_nearer_is_trained_no_further(log_p, steps, rounds, monkeypatch):
    """Ripples of two nats stay, however long it is trained; a bend does not, however slow it goes."""
    trained = []

    def round_(flows, target, *, round_, **options):
        trained.append(round_)
        return train_flows(flows, target, round_=round_, **{**options, "steps": steps})

    monkeypatch.setattr(flying, "train_flows", round_)
    torch.manual_seed(0)
    flying._trained(group(log_p, 12))  # in more than ten dimensions no points take the place of a round
    assert len(trained) == rounds


def test_points_take_the_place_of_the_first_round(monkeypatch):
    """A banana that a mixture's weighted draws show is nearly learnt before the potential is asked."""
    now = group(banana, 4)
    cov = torch.diag(torch.tensor([1.0, 1.5, 1.0, 1.0]).double().square())[None, None]
    now.pool.draw(Mixture.of(torch.zeros(1, 1).double(), torch.zeros(1, 1, 4).double(), cov), 16_384)
    rounds, spent = [], []

    def round_(flows, target, *, round_, **options):
        rounds.append(round_)
        spent.append(target.n_gradients)
        return train_flows(flows, target, round_=round_, **options)

    monkeypatch.setattr(flying, "train_flows", round_)
    torch.manual_seed(0)
    _, trial = flying._trained(now)
    assert rounds[0] == 1 and spent[0] == 0
    assert float(trial.share) > 0.8 and float(trial.log_z) == pytest.approx(4.0, abs=0.1)


def test_likelihood_of_points_brings_a_flow_to_them():
    torch.manual_seed(0)
    now = group(banana, 2)
    points = now.pool.points(8192)
    flows, plain = (flying._start(now, spline=False) for _ in range(2))
    show_points(flows, points, steps=150, batch=192)
    gain = (points[1] * (flows.log_prob(points[0]) - plain.log_prob(points[0]))).sum()
    assert float(gain) > 0.2 and now.target.n_gradients == 0


def test_several_modes_get_splines_and_points():
    for modes, spline in ((1, False), (2, True)):
        flows = flying._start(group(rings, modes=modes), spline=spline)
        assert flows.one(0).layers.spline is spline


@pytest.mark.slow
def test_splines_beat_affine_layers_on_two_rings():
    """By the likelihood of points that were held out, in nats; .6 when this was written."""
    found = []
    for spline in (False, True):
        torch.manual_seed(0)
        now = group(rings, modes=2)
        z, weights = thinned(*explore(now.target, 1024).weighted(), 8192)
        shown = torch.arange(z.shape[1]) % 4 > 0
        points = z[:, shown], weights[:, shown] / weights[:, shown].sum()
        flows = flying._start(now, spline=spline)
        for number in range(3):
            train_flows(
                flows, now.target, round_=number, steps=120, batch=256, points=points, forward_share=1.0
            )
        held = weights[:, ~shown] / weights[:, ~shown].sum()
        found.append(float((held * flows.log_prob(z[:, ~shown])).sum()))
    assert found[1] > found[0] + 0.3


def test_one_more_round_with_points(short):
    """The flow sits on one of two modes; points of both bring the other one, and the first flow stays."""
    places = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)

    def log_p(theta):
        return torch.logsumexp(-0.5 * ((theta[:, None] - places) / 0.5).square().sum(-1), 1)

    now = group(log_p)
    loc, tril = places[:1], 0.5 * torch.eye(2, dtype=torch.float64)[None]
    q = FlowProposal.widened(CouplingStack([flow_body(2)]).placed(loc, tril))
    before = q.log_prob(places[None])
    z = places.repeat(500, 1)[None] + 0.5 * torch.randn(1, 1000, 2, dtype=torch.float64)
    better, trial = polished(now, q, (z, torch.full((1, 1000), 1e-3, dtype=torch.float64)))
    assert float(better.log_prob(places[None])[0, 1]) > float(before[0, 1]) + 5
    assert torch.equal(q.log_prob(places[None]), before)
    assert trial.z.shape == (1, ALONE.trial, 2)
    assert float(effective_sample_size(trial.log_w)) == pytest.approx(
        float(trial.share) * ALONE.trial, rel=1e-6
    )
