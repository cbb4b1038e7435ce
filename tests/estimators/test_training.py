import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from visbi.core.random import seeded
from visbi.estimators import TrainingOptions, TrainingTrace, training
from visbi.estimators.training import train


def problem(n=400):
    """A small regression that overfits, and its loss per row."""
    with seeded(1):
        x = torch.randn(n, 3)
        y = torch.sin(2 * x[:, :1]) + 0.3 * torch.randn(n, 1)
        net = nn.Sequential(nn.Linear(3, 40), nn.SiLU(), nn.Dropout(0.1), nn.Linear(40, 1))
    return net, lambda x, y: (net(x) - y).square().sum(1), [x, y]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FAST = dict(batch_size=50, learning_rate=1e-2)


def test_stops_without_improvement_and_keeps_the_best_weights():
    net, loss, data = problem()
    state = train(net, loss, data, TrainingOptions(**FAST, patience=5, weight_decay=0.0), seed=0)
    trace = state.trace
    assert trace.stop_reason == "no improvement"
    assert trace.best_epoch == len(trace.validation) - 1 - 5 < len(trace.validation) - 1
    assert trace.best_loss == min(trace.validation) < trace.validation[-1]
    # what the module holds has the best held-out loss, not the last
    with seeded(state.seed):
        held_out = torch.randperm(400)[:40]
    with torch.no_grad():
        now = loss(*(tensor[held_out] for tensor in data)).mean()
    assert float(now) == pytest.approx(trace.best_loss, rel=1e-5)
    assert not net.training
    assert same(net.state_dict(), state.best)


@pytest.mark.parametrize("averaging", [0.0, 0.99])
def test_resumed_training_equals_uninterrupted_training(averaging):
    def options(epochs):
        return TrainingOptions(**FAST, max_epochs=epochs, averaging=averaging, cool_after=1)

    net, loss, data = problem()
    whole = train(net, loss, data, options(8), seed=3)
    parts_net, parts_loss, _ = problem()
    half = train(parts_net, parts_loss, data, options(3), seed=3)
    assert len(half.trace.validation) == 3
    parts = train(parts_net, parts_loss, data, options(8), resume=half)
    assert parts.trace == whole.trace
    for name in ("last", "average", "best"):
        assert same(getattr(parts, name), getattr(whole, name))
    assert same(net.state_dict(), parts_net.state_dict())


def test_a_state_is_not_changed_by_going_on_from_it():
    net, loss, data = problem()
    half = train(net, loss, data, TrainingOptions(**FAST, max_epochs=2), seed=3)
    before = {name: value.clone() for name, value in half.last.items()}
    moments = half.optimizer["state"][0]["exp_avg"].clone()
    train(net, loss, data, TrainingOptions(**FAST, max_epochs=4), resume=half)
    assert same(before, half.last)
    assert torch.equal(moments, half.optimizer["state"][0]["exp_avg"])


def test_seeds():
    def trained(seed):
        net, loss, data = problem()
        return train(net, loss, data, TrainingOptions(**FAST, max_epochs=3), seed=seed)

    before = torch.random.get_rng_state()
    first, again, other = trained(0), trained(0), trained(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.trace == again.trace and same(first.last, again.last)
    assert first.trace != other.trace
    torch.manual_seed(5)
    by_global = trained(None)
    torch.manual_seed(5)
    assert trained(None).trace == by_global.trace


def test_weights_of_zero_leave_rows_out():
    with seeded(0):
        x = torch.rand(300, 1)
    y = torch.where(torch.arange(300)[:, None] < 150, 2 * x, -5 * x)
    line = nn.Linear(1, 1, bias=False)
    options = TrainingOptions(batch_size=60, learning_rate=0.05, max_epochs=60, weight_decay=0.0)
    weights = (torch.arange(300) < 150).float()
    state = train(line, lambda x, y: (line(x) - y).square().sum(1), [x, y], options, weights=weights, seed=0)
    assert float(line.weight.detach()) == pytest.approx(2.0, abs=0.01)
    assert state.trace.best_loss < 1e-3


def test_weights_count_up_to_a_factor():
    traces = []
    for scale in (1.0, 4.0):
        net, loss, data = problem()
        weights = scale * (1 + torch.arange(400) % 2)
        traces.append(
            train(net, loss, data, TrainingOptions(**FAST, max_epochs=2), weights=weights, seed=0).trace
        )
    assert traces[0].validation == pytest.approx(traces[1].validation, rel=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    net, loss, data = problem()
    calls = iter(range(10**6))

    def sometimes_nan(x, y):
        # 8 steps and one validation make an epoch of 9 calls
        return loss(x, y) * (math.nan if next(calls) % 9 == 2 else 1.0)

    state = train(net, sometimes_nan, data, TrainingOptions(batch_size=45, max_epochs=3), seed=0)
    assert state.trace.skipped_steps == 3
    assert state.steps == 21
    assert all(torch.isfinite(value).all() for value in state.last.values())


def test_loss_that_is_never_finite_is_an_error():
    net, loss, data = problem()
    with pytest.raises(RuntimeError, match=r"NaN or Inf in 8 of the 8 steps.*outliers"):
        train(net, lambda x, y: loss(x, y) * math.inf, data, TrainingOptions(batch_size=45), seed=0)


def test_held_out_loss_that_is_never_finite_is_an_error():
    net, loss, data = problem()

    def nan_in_evaluation(x, y):
        return loss(x, y) if net.training else loss(x, y) * math.nan

    with pytest.raises(RuntimeError, match="held-out"):
        train(net, nan_in_evaluation, data, TrainingOptions(max_epochs=2), seed=0)


def test_ctrl_c_keeps_the_best_so_far():
    net, loss, data = problem()
    calls = iter(range(10**6))

    def interrupted(x, y):
        if next(calls) == 9 * 2 + 4:
            raise KeyboardInterrupt
        return loss(x, y)

    before = torch.random.get_rng_state()
    state = train(net, interrupted, data, TrainingOptions(batch_size=45), seed=0)
    assert state.trace.stop_reason == "interrupted"
    assert len(state.trace.validation) == 2
    assert same(net.state_dict(), state.best)
    assert torch.equal(before, torch.random.get_rng_state())
    resumed = train(net, loss, data, TrainingOptions(batch_size=45, max_epochs=4), resume=state)
    assert len(resumed.trace.validation) == 4


def test_ctrl_c_before_anything_is_known_is_ctrl_c():
    net, _, data = problem()

    def at_once(x, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(net, at_once, data, TrainingOptions(), seed=0)


def test_averaged_weights_are_what_is_validated():
    net, loss, data = problem()
    state = train(net, loss, data, TrainingOptions(**FAST, max_epochs=1), seed=0)
    assert not same(state.average, state.last)
    assert same(state.average, state.best)
    net, loss, data = problem()
    state = train(net, loss, data, TrainingOptions(**FAST, max_epochs=1, averaging=0.0), seed=0)
    assert same(state.average, state.last)


def test_frozen_parameters_stay():
    net, loss, data = problem()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    train(net, loss, data, TrainingOptions(**FAST, max_epochs=2), seed=0)
    assert torch.equal(before, net[0].weight)


def test_progress_bar_only_if_asked_for(capsys):
    net, loss, data = problem()
    train(net, loss, data, TrainingOptions(**FAST, max_epochs=2), seed=0)
    assert capsys.readouterr().err == ""
    train(
        net,
        loss,
        data,
        TrainingOptions(**FAST, max_epochs=2),
        seed=0,
        show_progress_bar=True,
        description="Net",
    )
    error = capsys.readouterr().err
    assert "Net" in error and "held_out" in error


def test_resume_asks_for_the_same_rows():
    net, loss, data = problem()
    state = train(net, loss, data, TrainingOptions(max_epochs=1), seed=0)
    with pytest.raises(
        ValueError, match="`resume`: expected a state of training on 399 rows; got one on 400"
    ):
        train(net, loss, [tensor[:-1] for tensor in data], TrainingOptions(), resume=state)


def test_one_row_cannot_be_split():
    net, loss, data = problem(1)
    with pytest.raises(ValueError, match="held out"):
        train(net, loss, data, TrainingOptions(), seed=0)


def test_validation_in_pieces_equals_validation_at_once(monkeypatch):
    net, loss, data = problem()
    whole = train(net, loss, data, TrainingOptions(**FAST, max_epochs=1), seed=0)
    monkeypatch.setattr(training, "_VALIDATION_ROWS", 7)
    net, loss, data = problem()
    pieces = train(net, loss, data, TrainingOptions(**FAST, max_epochs=1), seed=0)
    assert pieces.trace.validation == pytest.approx(whole.trace.validation, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("schedule", "cosine"),
        ("cooling", 0.0),
        ("cooling", 1.1),
        ("cool_after", 0),
        ("batch_size", 0),
        ("max_epochs", 1.5),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("patience", 0),
        ("worth", -1e-3),
        ("clip_value", -1.0),
        ("weight_decay", -0.1),
        ("averaging", 1.0),
    ],
)
def test_options_validate_themselves(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        TrainingOptions(**{name: value})


@pytest.mark.parametrize(
    ("losses", "coolings"),
    [
        ((), 0),
        ((3.0, 2.0, 1.0), 0),
        ((1.0, 2.0), 0),
        ((1.0, 2.0, 2.0), 1),
        ((1.0, 2.0, 0.5, 1.0), 0),
        ((9.0,) * 5, 2),
    ],
)
def test_the_rate_falls_after_epochs_without_a_better_loss(losses, coolings):
    found = training._waiting(TrainingTrace(validation=losses), TrainingOptions(cool_after=2))
    assert found[1] == coolings


def test_the_optimiser_takes_the_rate_that_is_left():
    net, loss, data = problem()
    options = TrainingOptions(**FAST, max_epochs=40, patience=12, cool_after=2, cooling=0.5)
    state = train(net, loss, data, options, seed=0)
    earlier = TrainingTrace(validation=state.trace.validation[:-1])  # what was known before the last epoch
    coolings = training._waiting(earlier, options)[1]
    assert coolings >= 3
    assert state.optimizer["param_groups"][0]["lr"] == pytest.approx(1e-2 * 0.5**coolings)


@pytest.mark.parametrize("epochs", [1, 7, 40])
def test_a_linear_schedule_rises_and_falls_to_zero(epochs):
    options = TrainingOptions(schedule="linear", max_epochs=epochs)
    shares = [
        training._share_of_rate(TrainingTrace(validation=(9.0,) * done), options) for done in range(epochs)
    ]
    assert all(0 < share <= 1 for share in shares)
    top = shares.index(max(shares))
    assert top in (int(0.1 * epochs), math.ceil(0.1 * epochs)) or epochs == 1
    falling = [a - b for a, b in zip(shares[top + 1 :], shares[top + 2 :], strict=False)]
    assert falling == pytest.approx([1 / (0.9 * epochs)] * len(falling))
    assert epochs == 1 or shares[-1] == pytest.approx(0.5 / epochs / 0.9)


def test_with_a_linear_schedule_all_epochs_are_made_and_the_best_weights_kept():
    net, loss, data = problem()
    options = TrainingOptions(**FAST, schedule="linear", max_epochs=30, patience=30)
    state = train(net, loss, data, options, seed=0)
    assert len(state.trace.validation) == 30 and state.trace.stop_reason == "max_epochs"
    assert same(net.state_dict(), state.best)
    with seeded(state.seed):
        held_out = torch.randperm(400)[:40]
    with torch.no_grad():
        now = loss(*(tensor[held_out] for tensor in data)).mean()
    assert float(now) == pytest.approx(min(state.trace.validation), rel=1e-5)
    assert state.optimizer["param_groups"][0]["lr"] == pytest.approx(1e-2 * 0.5 / 30 / 0.9)


@pytest.mark.parametrize(
    ("worth", "since", "coolings"), [(0.0, 0, 0), (0.05, 0, 0), (0.15, 1, 0), (0.25, 0, 3), (0.95, 9, 4)]
)
def test_a_loss_that_hardly_falls_is_no_better(worth, since, coolings):
    trace = TrainingTrace(validation=tuple(1 - 0.1 * k for k in range(10)))
    options = TrainingOptions(cool_after=2, worth=worth)
    assert training._waiting(trace, options) == (since, coolings)


def test_the_best_weights_are_kept_whatever_is_worth_it():
    net, loss, data = problem()
    options = TrainingOptions(**FAST, max_epochs=200, patience=3, worth=0.2)
    trace = train(net, loss, data, options, seed=0).trace
    assert trace.stop_reason == "no improvement" and len(trace.validation) < 200
    assert trace.best_loss == min(trace.validation)
    plain = train(problem()[0], problem()[1], data, replace(options, worth=0.0), seed=0).trace
    assert len(plain.validation) > len(trace.validation)
