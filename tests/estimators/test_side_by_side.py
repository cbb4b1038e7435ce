"""Networks side by side: what each computes and learns is what it would alone."""

import math

import pytest
import torch
from torch import nn

from visbi.core.random import seeded
from visbi.estimators import TrainingOptions, fit_likelihood
from visbi.estimators.members import for_likelihoods
from visbi.estimators.networks import ConditionalFlow, ResidualNetwork
from visbi.estimators.side_by_side import side_by_side
from visbi.estimators.training import Trainee, train, train_together


def flows(n, flow, features=3, width=16):
    with seeded(0):
        made = [
            ConditionalFlow(features, 2, flow=flow, num_transforms=2, hidden_features=width) for _ in range(n)
        ]
        for parameter in (p for each in made for p in each.parameters()):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("flow", ["maf", "nsf"])
@pytest.mark.parametrize("features", [1, 3])
def test_each_slice_goes_through_its_own_network(flow, features):
    networks = flows(3, flow, features)
    x, condition = torch.randn(3, 7, features), torch.randn(3, 7, 2)
    found = side_by_side(networks).log_prob(x, condition)
    for network, *slices, each in zip(networks, x, condition, found, strict=True):
        torch.testing.assert_close(each, network.log_prob(*slices))


def test_gradients_stay_with_their_network():
    networks = flows(2, "nsf")
    x, condition = torch.randn(2, 16, 3), torch.randn(2, 16, 2)
    together = side_by_side(networks)
    together.log_prob(x, condition).sum(1)[1].backward()
    networks[1].log_prob(x[1], condition[1]).sum().backward()
    names = [name for name, _ in networks[1].named_parameters()]
    assert names == [name for name, _ in together.named_parameters()]
    for both, alone in zip(together.parameters(), networks[1].parameters(), strict=True):
        assert both.grad is not None and bool((both.grad[0] == 0).all())
        torch.testing.assert_close(both.grad[1], alone.grad, rtol=1e-4, atol=1e-6)


def test_networks_are_copied():
    networks = [ResidualNetwork(2, 1, 4) for _ in range(2)]
    before = [p.clone() for p in networks[0].parameters()]
    together = side_by_side(networks)
    for parameter in together.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, networks[0].parameters(), strict=True))
    assert all(type(m) is not nn.Linear for m in together.modules())


@pytest.mark.parametrize("layer", [nn.LayerNorm(2), nn.Linear(2, 2, bias=False), nn.Bilinear(2, 2, 2)])
def test_layers_that_know_no_further_axis_are_refused(layer):
    with pytest.raises(TypeError, match=f"`networks`: expected .*{type(layer).__name__} at '1'"):
        side_by_side([nn.Sequential(nn.Linear(2, 2), layer)])


def test_company_changes_nothing():
    """To the last bit, where vector instructions divide rows of all sizes without a rest."""
    networks = flows(2, "nsf")
    x, condition = torch.randn(2, 16, 3), torch.randn(2, 16, 2)
    both = side_by_side(networks).log_prob(x, condition)
    alone = side_by_side(networks[1:]).log_prob(x[1:], condition[1:])
    assert torch.equal(both[1], alone[0])


OPTIONS = TrainingOptions(batch_size=45, patience=4, learning_rate=0.05, cool_after=2)


def lines(n, options=OPTIONS, nan_in=None):
    """Regressions on noisy lines of different slopes, and how they are trained together."""
    with seeded(5):
        networks = [nn.Sequential(nn.Linear(1, 1)) for _ in range(n)]
        x = torch.randn(n, 200, 1)
        y = torch.arange(1.0, n + 1)[:, None, None] * x + 0.5 * torch.randn(n, 200, 1)
    trainees = [
        Trainee(network, rows, options, seed=k)
        for k, (network, *rows) in enumerate(zip(networks, x, y, strict=True))
    ]
    asked: list[list[int]] = []

    def together(left):
        asked.append(list(left))
        line = side_by_side([networks[k] for k in left])
        broken = torch.tensor([[math.nan if k == nan_in else 1.0] for k in left])
        return line, lambda x, y: (line(x) - y).square().sum(2) * broken

    return networks, trainees, together, asked


def test_each_is_trained_as_it_would_be_alone_and_leaves_when_it_is_done():
    networks, trainees, together, asked = lines(3)
    train_together(trainees, together)
    states = [trainee.state() for trainee in trainees]
    ends = [len(state.trace.validation) for state in states]
    assert len(set(ends)) == 3  # each at its own time
    order = sorted(range(3), key=ends.__getitem__)
    assert asked == [[0, 1, 2], sorted(order[1:]), order[2:]]
    again, others, _, _ = lines(3)
    for k, (network, alone, other) in enumerate(zip(networks, again, others, strict=True)):
        rows = [torch.cat([a, b]) for a, b in zip(other.held_out, other.rows, strict=True)][1:]
        with seeded(k):  # back to the order before the split
            back = torch.randperm(200).argsort()
        state = train(
            alone,
            lambda x, y, net=alone: (net(x) - y).square().sum(1),
            [t[back] for t in rows],
            OPTIONS,
            seed=k,
        )
        assert state.trace.validation == pytest.approx(states[k].trace.validation, rel=1e-4)
        assert state.trace.stop_reason == states[k].trace.stop_reason == "no improvement"
        assert (state.steps, state.next_seed) == (states[k].steps, states[k].next_seed)
        torch.testing.assert_close(network[0].weight, alone[0].weight, rtol=1e-3, atol=1e-4)
        assert not network.training


def test_a_network_that_breaks_is_named_and_does_not_break_others():
    _, trainees, together, _ = lines(2, nan_in=1)
    with pytest.raises(RuntimeError, match="NaN or Inf in 4 of the 4 steps"):
        train_together(trainees, together)
    assert trainees[0].steps == 4 and bool(torch.isfinite(trainees[0].weights).all())
    assert trainees[1].steps == 0 and bool(torch.isfinite(trainees[1].weights).all())


def test_ctrl_c_keeps_what_each_has():
    networks, trainees, together, _ = lines(2)
    calls = iter(range(10**6))

    def interrupted(left):
        module, loss = together(left)

        def or_not(*batch):
            if next(calls) == 3 * 5 + 2:  # four steps and one validation make an epoch
                raise KeyboardInterrupt
            return loss(*batch)

        return module, or_not

    train_together(trainees, interrupted)
    for network, trainee in zip(networks, trainees, strict=True):
        state = trainee.state()
        assert state.trace.stop_reason == "interrupted" and len(state.trace.validation) == 3
        assert all(torch.equal(network.state_dict()[name], best) for name, best in state.best.items())


def test_weights_are_cut_one_by_one():
    _, trainees, together, _ = lines(2, TrainingOptions(batch_size=180, max_epochs=1, clip_value=1e-3))
    before = [trainee.weights.detach().clone() for trainee in trainees]
    train_together(trainees, together)
    for trainee, weights in zip(trainees, before, strict=True):
        (state,) = trainee.optimizer.state.values()
        assert float(state["exp_avg"].norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # .1 of the gradient
        assert not torch.equal(trainee.weights, weights)


def test_parameters_of_two_precisions_are_an_error():
    mixed = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    with pytest.raises(ValueError, match=r"`module`: expected parameters of one dtype.*float32.*float64"):
        train(mixed, lambda x: x, [torch.zeros(20, 1)], TrainingOptions())


def test_an_ensemble_is_trained_side_by_side_unless_its_embedding_is_the_users():
    theta, x = torch.randn(200, 2), torch.randn(200, 2)

    def fitted(net):
        options = TrainingOptions(max_epochs=1)
        return fit_likelihood(
            theta, x, theta_embedding_net=net, options=options, hidden_features=8, show_progress_bar=False
        )

    plain, users = (fitted(net).estimator.members[0] for net in (None, nn.Linear(2, 3)))
    assert for_likelihoods(plain).in_one_pass
    assert not for_likelihoods(users).in_one_pass
