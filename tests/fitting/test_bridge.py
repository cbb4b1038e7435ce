"""The bridge: bases of any kind, and what is fitted to the particles that have come over it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from visbi.certificate.verdict import certify
from visbi.families.coupling_stack import CouplingStack
from visbi.families.gaussians import Mixture
from visbi.fitting import flying
from visbi.fitting.bridge import ProposalBase, bridge
from visbi.fitting.climbing import ALONE, Answer, Group, Record
from visbi.fitting.explore import explore
from visbi.fitting.flow import FlowProposal, flow_body
from visbi.fitting.pool import Pool
from visbi.fitting.refine import Blend
from visbi.fitting.target import Target
from visbi.priors import coordinates

PLACE = torch.tensor([0.6, -0.4], dtype=torch.float64)


def log_p(theta: Tensor) -> Tensor:
    """N(PLACE, .2^2 I), with log-evidence 2."""
    return 2.0 - 0.5 * ((theta - PLACE) / 0.2).square().sum(-1) - math.log(2 * math.pi) - 2 * math.log(0.2)


def target() -> Target:
    return Target(log_p, coordinates(MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())))


def gaussian(scale: float = 0.5) -> Mixture:
    loc = torch.zeros(1, 1, 2).double()
    return Mixture.of(loc[..., 0], loc, scale**2 * torch.eye(2).double()[None, None])


def flow(scale: float = 0.5) -> FlowProposal:
    stack = CouplingStack([flow_body(2)])
    return FlowProposal.widened(stack.placed(torch.zeros(1, 2), scale * torch.eye(2)[None]))


BASES = {
    "mixture": gaussian,
    "flow": flow,
    "blend": lambda: Blend(flow(), gaussian(1.0), torch.tensor([0.3]).double()),
}


@pytest.mark.parametrize("kind", BASES)
def test_particles_come_over_from_any_kind_of_q(kind):
    base = ProposalBase(BASES[kind]())
    seen = explore(target(), 512, base=base)
    torch.testing.assert_close(seen.z[0].mean(0), PLACE, atol=0.06, rtol=0)
    torch.testing.assert_close(seen.z[0].std(0), torch.full((2,), 0.2).double(), atol=0.04, rtol=0)
    assert float(seen.log_evidence) == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("kind", BASES)
def test_scores_are_gradients(kind):
    q = BASES[kind]()
    z = q.sample(20)
    log_q, score = ProposalBase(q).log_prob_and_score(z)
    torch.testing.assert_close(log_q, q.log_prob(z))
    step = 1e-2  # layers are single precision
    for i in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[i]
        slope = (q.log_prob(z + shift) - q.log_prob(z - shift)) / (2 * step)
        torch.testing.assert_close(score[..., i], slope, atol=2e-2, rtol=2e-2)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(flying, "_STEPS", 60)


def group(q) -> Group:
    goal = target()
    now = Group(goal, [Record()], ALONE, Pool(goal))
    now.consider("the first", q, now.pool.draw(q, ALONE.trial))
    return now


def test_a_mixture_is_fitted_to_what_came_from_a_mixture():
    now = group(gaussian(0.1))
    assert bridge(now, spare=0.2)
    rung, answer = now.records[0].answer or ("", None)
    assert rung == "a bridged mixture" and answer is not None
    assert answer.report.status in ("ok", "corrected")
    assert answer.report.log_evidence == pytest.approx(2.0, abs=0.03)
    assert now.records[0].carried is not None


def test_a_flow_goes_on_with_what_came_from_it(short):
    now = group(Blend(flow(0.1), gaussian(1.0), torch.tensor([0.1]).double()))
    assert bridge(now, spare=0.2)
    rung, answer = now.records[0].answer or ("", None)
    assert rung == "a bridged flow" and answer is not None
    assert answer.report.log_evidence == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize("status", ["suspect", "failed"])
def test_it_starts_from_the_best_answer_and_not_from_a_failed_one(short, status):
    now = group(gaussian(0.1))
    q, unknown = flow(0.3), torch.zeros(100, dtype=torch.float64)
    report = replace(certify(unknown, unknown), status=status)
    now.records[0].answer = "a flow", Answer(q, q.sample(100)[0], unknown, unknown, report)
    assert bridge(now, spare=0.2)
    kind = "a bridged flow" if status == "suspect" else "a bridged mixture"
    assert (now.records[0].answer or ("",))[0] == kind
