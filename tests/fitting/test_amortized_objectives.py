"""The objectives of amortised fits, and what the loop does with each."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from visbi.core.random import seeded
from visbi.families.conditional import ConditionalFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.fitting import amortized_loop, amortized_objectives
from visbi.fitting.amortized import fit_amortized
from visbi.fitting.amortized_config import AmortizedOptions
from visbi.fitting.amortized_loop import _Average
from visbi.fitting.amortized_objectives import Both, Elbo, Forward, Pairs
from visbi.potentials import CustomPotential
from visbi.priors import BoxUniform, coordinates

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
NOISE = 0.5
QUIET = dict(show_progress_bar=False, n_particles=4, max_num_iters=5)


@pytest.fixture(autouse=True)
def alone_and_seeded():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with seeded(0):
        yield
    torch.set_num_threads(before)


def log_joint(theta, x):
    return PRIOR.log_prob(theta) - 0.5 * ((theta - x) / NOISE).square().sum(-1)


POTENTIAL = CustomPotential(log_joint, PRIOR)


def family(name="gaussian", prior=PRIOR):
    config = ConditionalConfig(
        flow_type=name, num_transforms=2, hidden_features=16, z_score_theta="none", z_score_x="none"
    )
    return ConditionalFamily(coordinates(prior), (2,), config)


def simulated(n=400):
    theta = PRIOR.sample((n,))
    return Pairs(theta, theta + NOISE * torch.randn(n, 2))


def test_the_forward_loss_is_that_of_the_prior_before_training():
    pairs, q = simulated(), family()
    forward = Forward(q, pairs, pairs, AmortizedOptions(**QUIET))
    expected = -float(PRIOR.log_prob(pairs.theta).mean())
    assert forward.held_out() == pytest.approx(expected, abs=1e-5)
    losses = [part.loss().value for (part,) in forward.steps()]
    assert len(losses) == 400 // 64  # a pass; the short rest is left out
    assert sum(losses) / len(losses) == pytest.approx(expected, abs=0.2)


def gradient(q, parts):
    total = sum(part.share * part.loss().surrogate for part in parts)
    return torch.autograd.grad(total, q.regression.bias)[0]


def test_the_sum_is_the_sum():
    pairs, q = simulated(64), family()
    with torch.no_grad():
        q.regression.bias.fill_(0.5)
    options = AmortizedOptions(**QUIET | {"n_particles": 256})
    parts = [Forward(q, pairs, pairs, options), Elbo(q, POTENTIAL, pairs, pairs, options)]
    both = Both(q, POTENTIAL, pairs, pairs, options)
    assert both.held_out() == pytest.approx(sum(part.held_out() for part in parts))
    (together,), *alone = [list(objective.steps()) for objective in (both, *parts)]
    # all 64 are one batch, in whatever order
    separate = [gradient(q, one[0]) for one in alone]
    assert all(g.abs().max() > 0.3 for g in separate)
    torch.testing.assert_close(gradient(q, together), sum(separate), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("at_once", [1, 7, 40, 100])
def test_parts_bound_what_is_evaluated_at_once_and_add_up(at_once, monkeypatch):
    sizes = []

    def counted(theta, x):
        sizes.append(len(theta))
        return log_joint(theta, x)

    pairs, q = simulated(12), family()
    with torch.no_grad():
        q.regression.bias.normal_(std=0.3)
    options = AmortizedOptions(**QUIET | {"n_particles": 50, "validation_batch_size": 12})
    potential = CustomPotential(counted, PRIOR)
    both = Both(q, potential, pairs, pairs, options)
    whole = both.held_out(), gradient(q, next(both.steps()))
    monkeypatch.setattr(amortized_objectives, "_AT_ONCE", at_once)
    sizes.clear()
    held_out = both.held_out()
    assert max(sizes) <= max(at_once, 1) and sum(sizes) == 12 * 50
    parts = next(both.steps())
    assert sum(part.share for part in parts) == pytest.approx(2.0)
    assert held_out == pytest.approx(whole[0], abs=0.5)
    torch.testing.assert_close(gradient(q, parts), whole[1], atol=0.5, rtol=0.2)
    q.zero_grad()
    optimizer = torch.optim.SGD(q.parameters(), lr=0.0)
    with seeded(5):
        expected = gradient(q, parts)
    with seeded(5):
        taken = amortized_loop._step(parts, list(q.parameters()), optimizer, 1e9)
    assert taken.moved and taken.excluded == 0
    torch.testing.assert_close(q.regression.bias.grad, expected)


@pytest.mark.parametrize("name", ["gaussian", "coupling"])
def test_the_forward_fit_finds_the_posterior(name):
    options = AmortizedOptions(
        **QUIET | dict(objective="forward", max_num_iters=25, learning_rate=0.01, gamma=0.9)
    )
    fit = fit_amortized(family(name), POTENTIAL, simulated(2000), options)
    x = torch.tensor([[0.8, -0.4], [-1.0, 0.3]])
    theta = fit.at(x).sample(torch.Size([4000]))
    shrink = 1 / (1 + NOISE**2)
    assert (theta.mean(0) - shrink * x).abs().max() < 0.1
    assert (theta.std(0) - NOISE * math.sqrt(shrink)).abs().max() < 0.06
    assert fit.method == "amortised fKL" and fit.described.startswith("fitted by amortised fKL in ")
    assert fit.trace.excluded == 0 and fit.trace.before is None
    entropy = float(Independent(Normal(torch.zeros(2), NOISE * math.sqrt(shrink)), 1).entropy())
    assert min(fit.trace.validation_loss) == pytest.approx(entropy, abs=0.25)


def test_forward_looks_at_no_potential_and_holds_out_a_tenth():
    def never(theta, x):
        raise AssertionError

    seen = []
    q = family()
    log_prob = q.log_prob
    q.log_prob = lambda theta, x: seen.append(x) or log_prob(theta, x)
    options = AmortizedOptions(**QUIET | dict(objective="forward", batch_size=30, max_num_iters=1))
    fit_amortized(q, CustomPotential(never, PRIOR), simulated(100), options)
    assert [len(x) for x in seen] == [10, 30, 30, 30, 10]
    held_out, trained = seen[0], torch.cat(seen[1:4])
    assert torch.equal(seen[-1], held_out) and len(trained.unique(dim=0)) == 90
    assert not (held_out[:, None] == trained).all(-1).any()
    seen.clear()
    options = AmortizedOptions(**QUIET | dict(objective="forward", validation_batch_size=4, max_num_iters=1))
    fit_amortized(q, CustomPotential(never, PRIOR), simulated(100), options)
    assert [len(x) for x in seen] == [4, 64, 4]


def test_a_mixed_fit_has_two_stages():
    options = AmortizedOptions(
        **QUIET | dict(objective="mixed", max_num_iters=12, learning_rate=5e-3, stop_after_iters=12)
    )
    fit = fit_amortized(family(), POTENTIAL, simulated(), options)
    first, last = fit.trace.before, fit.trace
    assert first.num_iters == last.num_iters == 12 and first.before is None
    assert first.validation_loss[0] > min(first.validation_loss)
    assert last.validation_loss[0] > min(last.validation_loss)
    assert fit.method == "amortised fKL and rKL"


def test_ctrl_c_in_the_first_stage_ends_a_mixed_fit(monkeypatch):
    step, calls = amortized_loop._step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(amortized_loop, "_step", interrupted)
    fit = fit_amortized(family(), POTENTIAL, simulated(), AmortizedOptions(**QUIET, objective="mixed"))
    assert fit.trace.stop_reason == "interrupted" and fit.trace.before is None and len(calls) == 3
    assert not fit.conditional.training


def test_stopping_counts_passes():
    wild = dict(learning_rate=1.0, clip_value=1e6, max_num_iters=100, stop_after_iters=2)
    trace = fit_amortized(
        family(), POTENTIAL, simulated(), AmortizedOptions(**QUIET | wild, objective="forward")
    ).trace
    assert trace.num_iters == trace.best_iter + 2 < 100
    assert trace.stop_reason == "no lower held-out loss for stop_after_iters = 2 passes"


def test_the_average_follows_slowly_and_stands_in_for_a_moment():
    value = torch.zeros(3, requires_grad=True)
    average = _Average([value], 0.99)
    expected = torch.zeros(3)
    for t in range(1, 40):
        with torch.no_grad():
            value += 1.0
        average.update()
        keep = (1 + t) / (10 + t)
        expected = keep * expected + (1 - keep) * t
    with average.in_place():
        torch.testing.assert_close(value.detach(), expected)
    assert torch.equal(value.detach(), torch.full((3,), 39.0))
    none = _Average([value], 0.0)
    none.update()
    with none.in_place():
        assert torch.equal(value.detach(), torch.full((3,), 39.0))


def test_theta_outside_the_support_cannot_teach():
    from visbi import VIPosterior

    box = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = box.sample((50,))
    x = theta.clone()
    theta[3] = 1.5
    options = dict(flow_type="gaussian", max_num_iters=1, show_progress_bar=False)
    posterior = VIPosterior(lambda theta, x: -(theta - x).square().sum(-1), box)
    for objective in ("forward", "mixed"):
        with pytest.raises(
            ValueError, match="`theta`: expected rows within the prior's support; got 1 outside"
        ):
            posterior.train_amortized(theta, x, objective=objective, **options)
    posterior.train_amortized(theta, x, **options)  # the ELBO does not look


@pytest.mark.parametrize(("objective", "method"), [("forward", "IW"), ("mixed", "alpha")])
def test_a_divergence_that_is_not_used(objective, method):
    from visbi import VIPosterior

    posterior = VIPosterior(log_joint, PRIOR, vi_method=method)
    pairs = simulated(50)
    options = dict(flow_type="gaussian", max_num_iters=1, show_progress_bar=False, objective=objective)
    with pytest.warns(UserWarning, match=f"objective='{objective}' .*: vi_method = '{method}' is not used"):
        posterior.train_amortized(pairs.theta, pairs.x, **options)
    posterior.set_vi_method("fKL").train_amortized(pairs.theta, pairs.x, **options)  # that is what it does
