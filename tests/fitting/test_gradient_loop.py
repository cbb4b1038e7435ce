"""The gradient loop on losses that are written down, so that every decision of it can be foretold."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR

from visbi.families import Family, family_from
from visbi.fitting import TrainOptions, fit_gradient
from visbi.fitting.gradient import make_optimizer
from visbi.objectives import Loss
from visbi.priors import BoxUniform, coordinates


class Toy(Family):
    """A point w in the place of a family: the loop asks for nothing but its tensors."""

    event_shape = torch.Size([2])

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))

    def draw(self, n, *, path=True):
        raise NotImplementedError

    log_prob = fresh = draw  # type: ignore[assignment]


def options(**keywords):
    return TrainOptions(**{"show_progress_bar": False, "learning_rate": 0.1, "gamma": 1.0, **keywords})


def run(toy, objective, **keywords):
    chosen = options(**keywords)
    return fit_gradient(toy, objective, *make_optimizer(toy, chosen), chosen)


def scripted(toy, values, gradient=1.0):
    """An objective that reports the next of `values`; its gradient in w is constant."""
    steps = iter(values)

    def objective():
        return Loss(gradient * toy.w.sum(), float(next(steps)))

    return objective


def noise(n, scale, seed=0):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(toy):
    loss = (toy.w - torch.tensor([1.0, 2.0])).square().sum()
    return Loss(loss, float(loss.detach()))


# minimising


def test_finds_the_minimum_and_traces_the_way():
    toy = Toy()
    trace = run(toy, lambda: quadratic(toy), max_num_iters=400, check_for_convergence=False)
    torch.testing.assert_close(toy.w.detach(), torch.tensor([1.0, 2.0]).double(), atol=1e-3, rtol=0)
    assert trace.num_iters == len(trace.loss) == 400
    assert trace.loss[0] == 20.0 and trace.loss[-1] < 1e-5
    assert trace.stop_reason == "reached max_num_iters = 400" and trace.skipped == trace.excluded == 0


def test_excluded_particles_add_up():
    toy = Toy()
    trace = run(toy, lambda: Loss(toy.w.sum(), 0.0, 3), max_num_iters=7)
    assert trace.excluded == 21


def test_clip_value_bounds_the_step():
    toy = Toy()
    before = toy.w.detach().clone()
    run(toy, scripted(toy, [0.0], 1e6), max_num_iters=1, clip_value=0.5, optimizer=SGD, learning_rate=1.0)
    assert float((toy.w.detach() - before).norm()) == pytest.approx(0.5)
    toy = Toy()
    run(toy, scripted(toy, [0.0], 0.01), max_num_iters=1, clip_value=0.5, optimizer=SGD, learning_rate=1.0)
    torch.testing.assert_close(toy.w.detach(), before - 0.01)


# stopping


def stop(values, **keywords):
    toy = Toy()
    return run(toy, scripted(toy, values), **{"max_num_iters": len(values), **keywords})


def test_a_loss_that_stays_ends_the_fit_after_four_windows():
    trace = stop(noise(1000, 0.1))
    assert trace.num_iters == 200
    assert trace.stop_reason == "no improvement over 3 windows of 50 steps"


def test_convergence_is_not_looked_for_unless_asked():
    assert stop(noise(1000, 0.1), check_for_convergence=False).num_iters == 1000


@pytest.mark.parametrize(("least", "steps"), [(0, 200), (200, 200), (201, 250), (330, 350), (1000, 1000)])
def test_min_num_iters(least, steps):
    assert stop(noise(1000, 0.1), min_num_iters=least).num_iters == steps


def falling(n, rate):
    return -rate * torch.arange(n, dtype=torch.float64)


def test_a_loss_that_falls_goes_on_until_it_does_not():
    values = falling(1200, 0.01).clamp_min(-5.0) + noise(1200, 0.01)
    assert stop(values).num_iters == 700  # the first window after the fall is the best; three more follow


@pytest.mark.parametrize(("scale", "steps"), [(0.001, 600), (3.0, 200)])
def test_a_gain_must_stand_out_from_the_noise(scale, steps):
    assert stop(falling(600, 1e-4) + noise(600, scale, seed=3)).num_iters == steps


@pytest.mark.parametrize(("errors", "steps"), [(0.9, 200), (1.1, 400)])
def test_noise_is_the_standard_error_of_the_difference_of_windows(errors, steps):
    wave = torch.tensor([1.0, -1.0]).double().repeat(25)
    error = math.sqrt(2) * float(wave.std()) / math.sqrt(50)
    # every fourth window is a new best, by so many standard errors
    gains = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).double() * errors * error
    assert stop((wave - gains[:, None]).flatten(), eps=0.0).num_iters == steps


@pytest.mark.parametrize(("eps", "steps"), [(0.0, 600), (1e-3, 600), (0.1, 200)])
def test_a_gain_must_exceed_eps(eps, steps):
    assert stop(falling(600, 1e-4), eps=eps).num_iters == steps  # .005 to .015 from window to window


@pytest.mark.parametrize("shift", [-1e4, 1e4, 1e6])
def test_a_shifted_loss_stops_at_the_same_step(shift):
    for values in (
        4.0 * torch.exp(-torch.arange(1500.0).double() / 200) + noise(1500, 0.01),
        falling(600, 1e-4) + noise(600, 0.001),
    ):
        assert stop(values + shift).num_iters == stop(values).num_iters


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_skipped_steps_do_not_pass_for_noise(shift):
    values = falling(600, 0.01) + noise(600, 0.01) + shift
    values[::25] = math.nan
    trace = stop(values)
    assert trace.num_iters == 600 and trace.skipped == 24
    assert stop(torch.where(values.isnan(), values, shift)).num_iters == 200


def test_an_early_best_window_is_remembered():
    values = torch.cat([falling(200, 0.1), torch.zeros(600).double()]) + noise(800, 0.01)
    assert stop(values).num_iters == 350


# what is not finite


def nan_value(toy, k):
    return Loss(toy.w.sum(), math.nan)


def nan_surrogate(toy, k):
    return Loss(toy.w.sum() * math.nan, 0.0)


def nan_gradient(toy, k):
    return Loss((toy.w - toy.w.detach()).sum().sqrt() + 0 * toy.w.sum(), 0.0)


def infinite(toy, k):
    return Loss(toy.w.sum() * math.inf, 0.0)


@pytest.mark.parametrize("bad", [nan_value, nan_surrogate, nan_gradient, infinite])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    toy = Toy()
    chosen = options(max_num_iters=3, gamma=0.5)
    optimizer, scheduler = make_optimizer(toy, chosen)
    fit_gradient(toy, lambda: quadratic(toy), optimizer, scheduler, chosen)
    before, rate = toy.w.detach().clone(), scheduler.get_last_lr()
    moments = {k: v.clone() for k, v in optimizer.state[toy.w].items()}
    trace = fit_gradient(toy, lambda: bad(toy, 0), optimizer, scheduler, chosen)
    assert trace.skipped == trace.num_iters == 3
    assert torch.equal(toy.w.detach(), before) and scheduler.get_last_lr() == rate
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state[toy.w].items())


def test_a_first_step_that_is_skipped_warns_of_nothing():
    toy = Toy()
    trace = stop([math.nan, *[0.0] * 9])
    assert trace.skipped == 1 and trace.num_iters == 10 and math.isnan(trace.loss[0])
    assert torch.equal(toy.w.detach(), Toy().w.detach())


def test_fifty_bad_steps_in_a_row_end_the_fit():
    values = [0.0] * 20 + [math.nan] * 200
    trace = stop(values, check_for_convergence=False)
    assert trace.num_iters == 70 and trace.skipped == 50
    assert trace.stop_reason == "no finite loss or gradient for 50 steps in a row"


def test_every_other_bad_step_does_not():
    trace = stop([math.nan, 0.0] * 100, check_for_convergence=False)
    assert trace.num_iters == 200 and trace.skipped == 100


# Ctrl-C


@pytest.mark.parametrize("at", [0, 1, 17])
def test_ctrl_c_keeps_what_there_is(at):
    toy, same = Toy(), Toy()

    def interrupted():
        if len(calls) == at:
            raise KeyboardInterrupt
        calls.append(1)
        return quadratic(toy)

    calls: list[int] = []
    trace = run(toy, interrupted, max_num_iters=100)
    assert trace.stop_reason == "interrupted" and trace.num_iters == at
    if at:
        run(same, lambda: quadratic(same), max_num_iters=at)
    assert torch.equal(toy.w, same.w)


def test_other_errors_are_raised():
    def broken():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(Toy(), broken)


# optimiser and schedule


@pytest.mark.parametrize(
    ("optimizer", "kind", "rate"),
    [
        (Adam, Adam, 0.1),
        (SGD, SGD, 0.1),
        (AdamW, AdamW, 0.1),
        (partial(SGD, momentum=0.9), SGD, 0.1),
        (partial(SGD, lr=0.7), SGD, 0.7),
        (lambda p, lr: AdamW(p, lr=2 * lr), AdamW, 0.2),
    ],
)
def test_optimizer(optimizer, kind, rate):
    toy = Toy()
    made, _ = make_optimizer(toy, options(optimizer=optimizer))
    assert type(made) is kind and made.param_groups[0]["lr"] == pytest.approx(rate)
    assert made.param_groups[0]["params"] == [toy.w]
    if "momentum" in getattr(optimizer, "keywords", {}):
        assert made.param_groups[0]["momentum"] == 0.9
    before = toy.w.detach().clone()
    made.zero_grad()
    quadratic(toy).surrogate.backward()
    made.step()
    assert not torch.equal(toy.w.detach(), before)


@pytest.mark.parametrize(
    ("scheduler", "after_ten"),
    [
        (ExponentialLR, 0.1 * 0.9**10),
        (partial(ExponentialLR, gamma=0.5), 0.1 * 0.5**10),
        (partial(StepLR, step_size=4), 0.1 * 0.9**2),
        (partial(StepLR, step_size=4, gamma=0.5), 0.1 * 0.5**2),
        (partial(CosineAnnealingLR, T_max=20), 0.05),
        (partial(ConstantLR, factor=0.25, total_iters=100), 0.025),
    ],
)
def test_scheduler(scheduler, after_ten):
    toy = Toy()
    chosen = options(scheduler=scheduler, gamma=0.9, max_num_iters=10)
    made = make_optimizer(toy, chosen)
    fit_gradient(toy, lambda: quadratic(toy), *made, chosen)
    assert made[1].get_last_lr() == [pytest.approx(after_ten)]


def test_a_scheduler_that_watches_the_loss_is_shown_it():
    toy = Toy()
    chosen = options(scheduler=partial(ReduceLROnPlateau, patience=4, factor=0.1), max_num_iters=12)
    made = make_optimizer(toy, chosen)
    fit_gradient(toy, scripted(toy, [5, 4, 3, *[3] * 9]), *made, chosen)
    assert made[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_later_fit_goes_on_with_the_same_optimizer():
    one, two = Toy(), Toy()
    run(one, lambda: quadratic(one), max_num_iters=20, gamma=0.9)
    chosen = options(max_num_iters=10, gamma=0.9)
    made = make_optimizer(two, chosen)
    for _ in range(2):
        fit_gradient(two, lambda: quadratic(two), *made, chosen)
    assert torch.equal(one.w, two.w)


def test_nothing_to_train_is_an_error():
    toy = Toy().requires_grad_(False)
    with pytest.raises(ValueError, match="`q`: expected trainable parameters"):
        make_optimizer(toy, options())


def test_retain_graph_for_what_is_built_only_once():
    def fit(retain_graph):
        loc = torch.zeros(2, requires_grad=True)
        log_scale = torch.zeros(2, requires_grad=True)
        q = Independent(Normal(loc, log_scale.exp()), 1)  # exp has one graph for all steps
        family = family_from(
            q, coordinates(BoxUniform(torch.zeros(2), torch.ones(2))), parameters=[loc, log_scale]
        )
        draw = lambda: family.draw(4).log_q.sum()  # noqa: E731
        chosen = options(max_num_iters=3, retain_graph=retain_graph)
        return fit_gradient(family, lambda: Loss(draw(), 0.0), *make_optimizer(family, chosen), chosen)

    assert fit(True).num_iters == 3
    with pytest.raises(RuntimeError, match="second time"):
        fit(False)


# the bar


def test_progress_bar(monkeypatch):
    class Bar:
        bars = []

        def __init__(self, steps, desc, leave):
            self.steps, self.closed, self.shown = steps, 0, []
            self.bars.append(self)

        def __iter__(self):
            return iter(self.steps)

        def set_postfix_str(self, text, refresh):
            self.shown.append(text)

        def close(self):
            self.closed += 1

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    toy = Toy()
    run(toy, scripted(toy, range(30)), max_num_iters=30)
    assert Bar.bars == []
    run(toy, scripted(toy, range(30)), max_num_iters=30, show_progress_bar=True)
    assert Bar.bars[0].closed == 1 and Bar.bars[0].shown == ["loss=4.500", "loss=14.500", "loss=24.500"]
    with pytest.raises(StopIteration):
        run(toy, scripted(toy, range(3)), max_num_iters=30, show_progress_bar=True)
    assert Bar.bars[1].closed == 1


# settling


def wandering(toy, pushes, losses):
    """An objective whose gradient pushes w to and fro, with losses given as a function of w."""
    steps = iter(pushes)

    def objective():
        push = next(steps, 0.0)
        return Loss(push * toy.w.sum(), losses(toy.w.detach()))

    return objective


def settled(losses, **keywords):
    """w[0] in the end, after 200 steps that lead from 3 to 4 and back in turns."""
    toy = Toy()
    objective = wandering(toy, [-1.0, 1.0] * 500, losses)
    chosen = {"optimizer": SGD, "learning_rate": 1.0, "clip_value": 1e9, "max_num_iters": 1000, **keywords}
    trace = run(toy, objective, **chosen)
    assert trace.num_iters == 200
    return float(toy.w.detach()[0])


def test_a_fit_that_stops_by_itself_ends_at_the_mean_of_the_last_window():
    assert settled(lambda w: 0.0) == pytest.approx(3.5)


def test_the_mean_is_taken_over_the_last_window_only():
    toy = Toy()
    pushes = [0.0] * 150 + [-1.0] + [0.0] * 49  # the only step opens the last window
    run(toy, wandering(toy, pushes, lambda w: 0.0), optimizer=SGD, learning_rate=1.0, max_num_iters=1000)
    assert float(toy.w.detach()[0]) == pytest.approx(4.0)


def test_a_mean_where_the_loss_is_higher_is_not_taken():
    assert settled(lambda w: float(w[0] == 3.5)) == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mean_where_the_loss_is_not_finite_is_not_taken(bad):
    assert settled(lambda w: bad if float(w[0]) == 3.5 else 0.0) == 3.0


def test_ctrl_c_while_the_mean_is_judged_keeps_the_last_weights():
    def interrupt(w):
        if float(w[0]) == 3.5:
            raise KeyboardInterrupt
        return 0.0

    assert settled(interrupt) == 3.0


def test_no_mean_beyond_max_num_iters_nor_without_convergence():
    assert settled(lambda w: 0.0, max_num_iters=200) == 3.0
    assert settled(lambda w: 0.0, max_num_iters=200, check_for_convergence=False) == 3.0
    assert settled(lambda w: 0.0, max_num_iters=210) == pytest.approx(3.5)
