"""Every keyword of `VIPosterior` does what is documented, on the first call and on a later one.

A test says with `@shows(method, keyword, ...)` whose effect it shows; a keyword that no test shows is a
failure of `test_every_keyword_is_shown`. For amortised fits: `test_contract_amortized`.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from auto_cases import QUIET, auto, found, two_modes
from auto_cases import trained as automatic
from posterior_cases import GOOD, OTHER, X, alone_and_seeded, box, fitted, log_p, made, real, weights
from shown import Shown
from visbi import FitError, VIPosterior
from visbi.fitting import TrainOptions

__all__ = ["alone_and_seeded"]

shows = Shown()
LATER = pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
METHODS = (
    "__init__",
    "set_q",
    "set_vi_method",
    "set_default_x",
    "train",
    "sample",
    "weighted_sample",
    "log_prob",
    "potential",
    "map",
    "evaluate",
    "to",
    "sibling",
)


def keywords_of(method: str) -> set[str]:
    parameters = inspect.signature(getattr(VIPosterior, method)).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}
    return names | {f.name for f in dataclasses.fields(TrainOptions)} if method == "train" else names


@pytest.mark.parametrize("method", METHODS)
def test_every_keyword_is_shown(method: str) -> None:
    assert shows.of(method) == keywords_of(method)


class Seen:
    """`log_p`, and how many thetas every call brought."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, theta: Tensor, x_o: Tensor) -> Tensor:
        self.sizes.append(len(theta))
        return log_p(theta, x_o)


def ready(later: bool, potential: Any = log_p, **options: Any) -> VIPosterior:
    """A posterior that has not been fitted, or one that has."""
    posterior = made(potential, **options)
    return fitted(posterior, seed=7) if later else posterior


def step(posterior: VIPosterior, **options: Any) -> Tensor:
    """How far one call of `train` moves the weights of a copy; by one plain, seeded step unless told."""
    posterior = copy.deepcopy(posterior)
    before = weights(posterior)
    plain = dict(max_num_iters=1, optimizer=SGD, clip_value=1e9, learning_rate=1e-3, seed=3)
    return weights(fitted(posterior, **{**plain, **options})) - before


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-3 * a.norm())


def own(loc: float, scale: float, dim: int = 2) -> td.Distribution:
    centre, width = torch.full((dim,), loc), torch.full((dim,), scale)
    return td.Independent(td.Normal(centre.requires_grad_(), width.requires_grad_()), 1)


def bars(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the progress bars shown from now on."""
    shown: list[int] = []
    import tqdm.auto

    original = tqdm.auto.tqdm

    def spy(steps: Any, **options: Any) -> Any:
        shown.append(len(steps))
        return original(steps, **{**options, "disable": True})

    monkeypatch.setattr("tqdm.auto.tqdm", spy)
    return shown


# train: the observation, sizes, bounds


@shows("train", "x")
@LATER
def test_x(later: bool) -> None:
    posterior = ready(later, prior=real()).train(OTHER, **GOOD)
    assert (posterior.sample((2000,)).mean(0) - OTHER[0]).abs().max() < 0.1
    assert torch.equal(posterior.default_x, OTHER)


@shows("train", "n_particles")
@LATER
def test_n_particles(later: bool) -> None:
    potential = Seen()
    posterior = ready(later, potential)
    potential.sizes.clear()
    fitted(posterior, n_particles=17)
    assert potential.sizes == [2, 17, 17, 17]  # two to see whether the potential's shape is right


@shows("train", "learning_rate")
@LATER
def test_learning_rate(later: bool) -> None:
    posterior = ready(later)
    torch.testing.assert_close(
        2 * step(posterior), step(posterior, learning_rate=2e-3), rtol=1e-6, atol=1e-12
    )


@shows("train", "gamma")
@LATER
def test_gamma(later: bool) -> None:
    posterior = ready(later)
    one = step(posterior)
    torch.testing.assert_close(step(posterior, max_num_iters=5, gamma=1e-9), one, rtol=1e-4, atol=1e-9)
    assert differ(step(posterior, max_num_iters=5, gamma=1.0), one)


@shows("train", "max_num_iters")
@LATER
def test_max_num_iters(later: bool) -> None:
    posterior = fitted(ready(later), max_num_iters=7)
    assert posterior.trace.num_iters == 7
    assert posterior.trace.stop_reason == "reached max_num_iters = 7"


@shows("train", "min_num_iters", "check_for_convergence")
@LATER
def test_min_num_iters_and_check_for_convergence(later: bool) -> None:
    def steps(**options: Any) -> tuple[int, str]:
        flat = real()  # its own posterior: there is nothing to gain
        posterior = ready(later, lambda theta, x_o: flat.log_prob(theta), prior=flat)
        trace = fitted(posterior, **{"max_num_iters": 320, "n_particles": 4, **options}).trace
        return trace.num_iters, trace.stop_reason

    assert steps() == (200, "no improvement over 3 windows of 50 steps")
    assert steps(min_num_iters=260) == (300, "no improvement over 3 windows of 50 steps")
    assert steps(check_for_convergence=False) == (320, "reached max_num_iters = 320")


@shows("train", "eps")
@LATER
def test_eps(later: bool) -> None:
    def steps(eps: float) -> int:
        options = dict(max_num_iters=210, n_particles=64, learning_rate=1e-3, eps=eps)
        return fitted(ready(later), **options).trace.num_iters

    assert steps(0.0) == 210  # it still gains
    assert steps(1e6) == 200  # but not so much


@shows("train", "clip_value")
@LATER
def test_clip_value(later: bool) -> None:
    posterior = ready(later)
    assert float(step(posterior, learning_rate=1.0, clip_value=1e-3).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert float(step(posterior, learning_rate=1.0).norm()) > 1e-2


# train: where it starts

STILL: dict[str, Any] = dict(max_num_iters=1, learning_rate=1e-12)


def mean_of(posterior: VIPosterior) -> Tensor:
    return posterior.sample((2000,)).mean(0)


@shows("train", "warm_up_rounds")
@LATER
def test_warm_up_rounds(later: bool) -> None:
    def off(rounds: int) -> float:
        posterior = made(prior=real(), q=own(3.0, 0.5))
        if later:
            fitted(posterior, **STILL)
            posterior.set_q(own(3.0, 0.5))
        return float(mean_of(fitted(posterior, **STILL, warm_up_rounds=rounds)).abs().max())

    assert off(0) > 2.5 and off(600) < 0.5


def test_warm_up_belongs_to_a_first_fit() -> None:
    posterior = fitted(made(prior=real(), q=own(3.0, 0.5)), **STILL)
    assert mean_of(fitted(posterior, **STILL, warm_up_rounds=300)).min() > 2.5  # it goes on
    again = fitted(posterior, **STILL, warm_up_rounds=600, retrain_from_scratch=True)
    assert mean_of(again).abs().max() < 0.5


@shows("train", "retrain_from_scratch")
@LATER
@pytest.mark.parametrize("kind", ["name", "distribution", "callable"])
def test_retrain_from_scratch(kind: str, later: bool) -> None:
    qs = {
        "name": "gaussian",
        "distribution": own(0.0, 1.0),
        "callable": lambda shape, link, device: own(0.0, 1.0),
    }
    posterior = fitted(made(prior=real(), q=qs[kind]), **{**GOOD, "learning_rate": 0.05})
    if not later:  # a first call after a start lent by another posterior
        posterior = made(prior=real(), q=posterior)
    kept, fresh = (
        fitted(copy.deepcopy(posterior), **STILL, retrain_from_scratch=scratch) for scratch in (False, True)
    )
    assert (mean_of(kept) - X[0]).abs().max() < 0.15
    assert mean_of(fresh).abs().max() < 0.15


@shows("train", "init")
@LATER
@pytest.mark.parametrize("init", ["match", "explore", "draws"])
def test_init(init: str, later: bool) -> None:
    start: Any = X + 0.5 * torch.randn(400, 2) if init == "draws" else init
    posterior = ready(later, prior=real())
    theta = fitted(posterior, **STILL, init=start, retrain_from_scratch=later).sample((4000,))
    assert (theta.mean(0) - X[0]).abs().max() < 0.15 and (theta.std(0) - 0.5).abs().max() < 0.15
    theta = fitted(posterior, **STILL, init="prior", retrain_from_scratch=True).sample((4000,))
    assert theta.mean(0).abs().max() < 0.15


@shows("train", "reset_optimizer")
def test_reset_optimizer() -> None:
    def taken(posterior: VIPosterior) -> int:
        return int(next(iter(posterior._state.optimizer.state.values()))["step"])

    assert taken(fitted(reset_optimizer=True)) == 3  # nothing yet to reset
    assert torch.equal(weights(fitted(reset_optimizer=True, seed=1)), weights(fitted(seed=1)))
    kept, fresh = fitted(), fitted()
    assert taken(fitted(kept)) == 6
    assert taken(fitted(fresh, reset_optimizer=True)) == 3


# train: what it shows and says


@shows("train", "show_progress_bar")
@LATER
def test_show_progress_bar(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, shown = ready(later), bars(monkeypatch)
    fitted(posterior)
    assert shown == []
    fitted(posterior, show_progress_bar=True)
    assert shown == [3]


@shows("train", "quality_control", "quality_control_metric")
@LATER
@pytest.mark.parametrize(
    ("metric", "name"), [("psis", "k-hat"), ("prop", "prop r"), ("prop_prior", "prop_prior r")]
)
def test_quality_control(metric: str, name: str, later: bool) -> None:
    posterior = ready(later)
    fitted(posterior, quality_control_metric=metric)  # silent: warnings are errors here
    with pytest.warns(UserWarning, match=rf"^Quality of q: {name}"):
        fitted(posterior, quality_control=True, quality_control_metric=metric)


# train: keywords beyond the signature


@shows("train", "retain_graph")
@LATER
def test_retain_graph(later: bool) -> None:
    def fit(retain_graph: bool) -> VIPosterior:
        loc, log_scale = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        q = td.Independent(td.Normal(loc, log_scale.exp()), 1)  # exp has one graph for all steps
        posterior = made(q=q, parameters=[loc, log_scale])
        options = dict(stick_the_landing=False)
        if later:
            fitted(posterior, retain_graph=True, **options)
        return fitted(posterior, retain_graph=retain_graph, **options)

    assert fit(True).trace.num_iters == 3
    with pytest.raises(RuntimeError, match="second time"):
        fit(False)


@shows("train", "optimizer")
@LATER
def test_optimizer(later: bool) -> None:
    posterior = ready(later)
    assert type(fitted(copy.deepcopy(posterior), optimizer=SGD)._state.optimizer) is SGD
    assert type(fitted(copy.deepcopy(posterior))._state.optimizer) is Adam
    heavy = partial(SGD, momentum=0.9)
    assert not differ(step(posterior, optimizer=heavy), step(posterior))  # no momentum in the first step
    assert differ(step(posterior, optimizer=heavy, max_num_iters=3), step(posterior, max_num_iters=3))


@shows("train", "scheduler")
@LATER
def test_scheduler(later: bool) -> None:
    posterior = ready(later)
    drop = partial(StepLR, step_size=1, gamma=1e-9)
    torch.testing.assert_close(
        step(posterior, max_num_iters=5, scheduler=drop), step(posterior), rtol=1e-4, atol=1e-9
    )


@shows("train", "alpha")
@LATER
def test_alpha(later: bool) -> None:
    posterior = ready(later, vi_method="alpha")
    assert differ(step(posterior, alpha=0.1), step(posterior, alpha=0.9))
    assert not differ(step(posterior), step(posterior, alpha=0.5))
    posterior.set_vi_method("rKL")
    assert torch.equal(step(posterior, alpha=0.1), step(posterior, alpha=0.9))


@shows("train", "K")
@LATER
def test_k(later: bool) -> None:
    potential = Seen()
    posterior = ready(later, potential, vi_method="IW")
    potential.sizes.clear()
    fitted(posterior, n_particles=5, K=3, max_num_iters=2)
    assert potential.sizes == [2, 15, 15]
    fitted(posterior, n_particles=5, max_num_iters=1)
    assert potential.sizes[3:] == [2, 40]


@shows("train", "stick_the_landing", "dreg")
@LATER
@pytest.mark.parametrize("method", ["rKL", "IW", "alpha"])
def test_estimators(method: str, later: bool) -> None:
    posterior = ready(later, vi_method=method)
    total = step(posterior, stick_the_landing=False, dreg=False)
    sticking = step(posterior, stick_the_landing=True, dreg=False)
    doubly = step(posterior, dreg=True)
    assert differ(total, sticking) and differ(total, doubly)
    assert differ(sticking, doubly) is (method != "rKL")  # with single draws the two are one
    assert torch.equal(step(posterior), doubly)  # the default
    assert torch.equal(step(posterior, stick_the_landing=True), sticking)  # what is asked for counts
    assert torch.equal(step(posterior, stick_the_landing=False), total)


@shows("train", "weight_transform")
@LATER
def test_weight_transform(later: bool) -> None:
    posterior, seen = ready(later, vi_method="fKL"), []

    def flat(w: Tensor) -> Tensor:
        seen.append(w)
        return torch.ones_like(w)

    assert differ(step(posterior), step(posterior, weight_transform=flat))
    assert len(seen) == 1 and float(seen[0].mean()) == pytest.approx(1.0)


@shows("train", "seed")
@LATER
def test_seed(later: bool) -> None:
    posterior = ready(later)
    state = torch.random.get_rng_state()
    assert torch.equal(step(posterior, seed=1), step(posterior, seed=1))
    assert differ(step(posterior, seed=1), step(posterior, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    step(posterior, seed=None)
    assert not torch.equal(torch.random.get_rng_state(), state)


# train: budgets, starts, and what q="auto" makes of them


def automatic_and(later: bool, potential: Any = log_p) -> VIPosterior:
    """One with q="auto" that has not been fitted, or one that has."""
    return automatic(auto(potential), OTHER, seed=7) if later else auto(potential)


def spent(posterior: VIPosterior, potential: Seen, **options: Any) -> int:
    """Evaluations of the potential in one call of `train`, but for the two that look at its shape."""
    potential.sizes.clear()
    posterior.train(X, **{**QUIET, "seed": 1, **options})
    return sum(potential.sizes) - 2


@shows("train", "max_potential_evals", "max_seconds")
@LATER
def test_budgets_of_a_named_q(later: bool) -> None:
    potential = Seen()
    posterior = ready(later, potential)
    plain = dict(n_particles=32, max_num_iters=50, warm_up_rounds=0)
    assert spent(posterior, potential, **plain) == 50 * 32
    assert not posterior.trace.cut_short
    for limit, evals in (({"max_potential_evals": 100}, 96), ({"max_seconds": 1e-9}, 0)):
        assert spent(posterior, potential, **plain, **limit) == evals
        assert posterior.trace.cut_short and posterior.trace.num_iters == evals // 32
        assert next(iter(limit)) in posterior.trace.stop_reason
        assert posterior.report.status in ("suspect", "failed")


@shows("train", "max_potential_evals", "max_seconds")
@LATER
@pytest.mark.parametrize(
    "limit",
    [*({"max_potential_evals": n} for n in (5000, 20_000, 40_000, 60_000)), {"max_seconds": 1e-9}],
    ids=str,
)
def test_budgets_of_an_automatic_fit(limit: dict[str, float], later: bool) -> None:
    potential = Seen()
    posterior = automatic_and(later, lambda theta, x_o: potential(theta, x_o) + two_modes(theta, x_o))
    assert spent(posterior, potential, **limit, allow_failed=True) <= limit.get("max_potential_evals", 0)
    report = posterior.report
    assert report.status in ("suspect", "failed") and next(iter(limit)) in report.stop_reason
    assert report.n_values + report.n_gradients == sum(potential.sizes) - 2
    assert posterior.trace.cut_short and posterior.sample((3,), correct=False).shape == (3, 2)


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("calls", [1, 3, 20, 35])
def test_ctrl_c_in_an_automatic_fit_keeps_the_best_so_far(calls: int, later: bool) -> None:
    left = [10**9]

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return two_modes(theta, x_o)

    posterior = automatic_and(later, potential)
    left[0] = calls + 1  # one looks at the shape
    automatic(posterior, allow_failed=True)
    assert left[0] == -1  # it has come, and the potential was let alone
    left[0] = 10**9
    assert posterior.report.status in ("suspect", "failed")
    assert posterior.report.stop_reason == "interrupted" and not posterior.trace.cut_short
    assert torch.equal(posterior.default_x, X) and posterior.sample((3,), correct=False).shape == (3, 2)


@shows("train", "allow_failed")
@LATER
def test_allow_failed(later: bool) -> None:
    posterior = automatic_and(later)
    with pytest.raises(FitError, match="allow_failed=True") as caught:
        automatic(posterior, max_potential_evals=10)
    assert caught.value.posterior is posterior and caught.value.report is posterior.report
    assert posterior.report.status == "failed" and "failed: " in str(caught.value)
    assert automatic(posterior, max_potential_evals=10, allow_failed=True) is posterior
    with pytest.warns(UserWarning, match="^Quality of q"):
        posterior.train(X, show_progress_bar=False, max_potential_evals=10, allow_failed=True)
    named = made(lambda theta, x_o: log_p(theta, x_o) / 1e-6)
    assert fitted(named, allow_failed=False).report.status == "failed"  # which never raises


@shows("train", "init")
@LATER
def test_a_posterior_as_init(later: bool) -> None:
    lender = fitted(made(prior=real()), max_num_iters=300, learning_rate=0.02)
    posterior = ready(later, prior=real())
    state = torch.get_rng_state()
    options = dict(STILL, init=lender, retrain_from_scratch=later)
    theta = fitted(posterior, **options, seed=2).sample((4000,))
    torch.set_rng_state(state)
    assert (theta.mean(0) - X[0]).abs().max() < 0.15 and (theta.std(0) - 0.5).abs().max() < 0.15
    first = weights(posterior)
    assert torch.equal(weights(fitted(copy.deepcopy(posterior), **options, seed=2)), first) is later
    with pytest.raises(ValueError, match=r"train\(\)"):
        fitted(posterior, init=made())
    with pytest.raises(ValueError, match="`init`: expected draws of shape"):
        fitted(made(prior=real(3)), torch.zeros(1, 3), init=lender)


@shows("train", "init")
@LATER
def test_init_of_an_automatic_fit(later: bool) -> None:
    """Draws, or a posterior that gives some, are one more start: they are evaluated beside the usual ones."""
    posterior = automatic_and(later)
    plain = automatic(copy.deepcopy(posterior), retrain_from_scratch=True).report
    draws = X + 0.5 * torch.randn(500, 2)
    for start in (draws, automatic(auto())):
        state = torch.get_rng_state()
        report = automatic(posterior, init=start, retrain_from_scratch=True).report
        assert torch.equal(torch.get_rng_state(), state)
        assert report.status == "ok" and report.n_values >= plain.n_values + 4096
        assert (posterior.sample((2000,)).mean(0) - X[0]).abs().max() < 0.05
    for wrong in (draws[:, :1], automatic(auto(prior=box(1)), torch.zeros(1, 1))):
        with pytest.raises(ValueError, match="`init`: expected draws of shape"):
            automatic(posterior, init=wrong)


def test_init_leads_an_automatic_fit_to_a_needle() -> None:
    """A mode with all the mass that neither the prior's draws nor their scores lead to; draws near it do."""
    peak = torch.tensor([2.0, -2.0])

    def needle(theta: Tensor, x_o: Tensor) -> Tensor:
        squared = (theta - peak).square().sum(-1)
        return torch.where(squared < 1e-4, 30 - 0.5 * squared / 1e-6, -0.5 * theta.square().sum(-1))

    posterior = automatic(auto(needle), init=peak + 0.001 * torch.randn(500, 2))
    assert (posterior.sample((500,)) - peak).norm(dim=-1).max() < 0.01


IDLE: dict[str, Any] = dict(
    n_particles=64,
    learning_rate=0.1,
    gamma=0.5,
    max_num_iters=7,
    min_num_iters=3,
    clip_value=1.0,
    warm_up_rounds=3,
    reset_optimizer=True,
    check_for_convergence=False,
    eps=0.1,
    retain_graph=True,
    optimizer=SGD,
    scheduler=StepLR,
    alpha=0.9,
    K=3,
    stick_the_landing=True,
    dreg=True,
    weight_transform=torch.sqrt,
    init="match",
)


@pytest.fixture(scope="module")
def an_automatic_one() -> VIPosterior:
    return automatic(auto())


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_use_to_auto_is_said_aloud(name: str, an_automatic_one: VIPosterior) -> None:
    with pytest.warns(UserWarning, match=f"^`{name}`: of no use to q='auto'"):
        automatic(
            copy.deepcopy(an_automatic_one), **{name: IDLE[name]}, max_potential_evals=100, allow_failed=True
        )


def test_every_option_is_of_use_to_auto_or_said_aloud() -> None:
    from visbi.fitting.auto import CONCERNS_AUTO

    assert {f.name for f in dataclasses.fields(TrainOptions)} == {*IDLE, *CONCERNS_AUTO}
    with pytest.warns(UserWarning, match="^`vi_method`, `alpha`, `K`: of no use"):
        automatic(auto(vi_method="IW"), alpha=0.9, K=3)


@shows("train", "seed", "retrain_from_scratch")
@LATER
def test_seed_of_an_automatic_fit(later: bool) -> None:
    def fit(seed: int | None) -> VIPosterior:
        posterior = automatic(automatic_and(later, two_modes), seed=seed, retrain_from_scratch=True)
        torch.manual_seed(11)
        return posterior

    state = torch.get_rng_state()
    (a, theta), (b, same), (c, other) = ((p, p.sample((200,))) for p in map(fit, (1, 1, 2)))
    assert a.report == b.report and a.report != c.report and a.report.seed == 1
    assert torch.equal(theta, same) and not torch.equal(theta, other)
    assert all(map(torch.equal, a.weighted_sample(500), b.weighted_sample(500)))
    torch.set_rng_state(state)
    automatic(auto(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = automatic(auto(), seed=None).report  # from the global generator, and told
    assert not torch.equal(torch.get_rng_state(), state)
    assert drawn.seed is not None and automatic(auto(), seed=drawn.seed).report == drawn
    torch.set_rng_state(state)
    assert automatic(auto(), seed=None).report == drawn


@shows("train", "show_progress_bar", "quality_control", "quality_control_metric", "x")
@LATER
def test_what_an_automatic_fit_shows_and_says(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Bar:
        def __init__(self, steps: None, **_: Any) -> None:
            said.append("made")

        def set_description_str(self, text: str) -> None:
            said.append(text)

        def close(self) -> None:
            said.append("closed")

    posterior = automatic_and(later)
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    automatic(posterior)
    assert said == []
    automatic(posterior, show_progress_bar=True)
    assert (said[0], said[-1]) == ("made", "closed") and "Fitting: look" in said
    for metric, score in (("psis", "k-hat"), ("prop", "prop r"), ("prop_prior", "prop_prior r")):
        options = dict(quality_control=True, quality_control_metric=metric, max_potential_evals=60_000)
        automatic(auto(), quality_control=True, quality_control_metric=metric)  # silent
        poor = auto(lambda theta, x_o: 40 * (3 * theta).sin().sum(-1))
        with pytest.warns(UserWarning, match=rf"^Quality of q: {score}"):
            automatic(poor, **{**options, "max_potential_evals": 10_000}, allow_failed=True)


# __init__ and the setters


@shows("__init__", "potential_fn", "prior")
def test_potential_and_prior() -> None:
    posterior = made(lambda theta, x_o: 3.0 * theta[:, 0] - x_o[0, 0], box(2, 0.5))
    theta = torch.tensor([[0.1, 0.2]])
    assert float(posterior.potential(theta, X)) == pytest.approx(0.0, abs=1e-6)
    assert fitted(posterior).sample((500,)).abs().max() <= 0.5
    assert float(posterior.log_prob(torch.tensor([[0.6, 0.0]]))) == -torch.inf


def test_where_a_prior_comes_from() -> None:
    lender = made(prior=box(2, 0.5))
    from_q = VIPosterior(log_p, q=lender)
    from_potential = VIPosterior(lender.potential_fn, q="gaussian")
    given = VIPosterior(lender.potential_fn, box(2, 0.25), q="gaussian")
    assert from_q.prior is lender.prior and from_potential.prior is lender.prior
    assert fitted(given).sample((500,)).abs().max() <= 0.25


def build(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
    assert event_shape == (2,) and device == "cpu"
    assert link_transform(torch.zeros(1, 2)).shape == (1, 2)
    return own(0.25, 0.5)


QS: dict[str, Callable[[], Any]] = {
    "name": lambda: "gaussian_diag",
    "distribution": lambda: own(0.25, 0.5),
    "callable": lambda: build,
    "posterior": lambda: fitted(made(), max_num_iters=30, learning_rate=0.05),
}


@shows("__init__", "q")
@shows("set_q", "q")
@LATER
@pytest.mark.parametrize("kind", QS)
def test_q(kind: str, later: bool) -> None:
    q = QS[kind]()
    posterior = made(q=q)
    if later:
        posterior = fitted(made(q="maf", num_transforms=1, hidden_features=4))
        assert posterior.set_q(q) is None
        with pytest.raises(ValueError, match="train"):
            posterior.sample()  # the fit went with the old q
    if kind == "name":
        assert posterior.q.body.raw_below is None
    elif kind == "posterior":
        assert torch.equal(weights(posterior), weights(q))
        before = weights(q)
        fitted(posterior)
        assert torch.equal(weights(q), before)  # lent, not shared
    else:
        assert torch.equal(weights(posterior), torch.tensor([0.25, 0.25, 0.5, 0.5]))
    before = weights(posterior)
    assert not torch.equal(weights(fitted(posterior)), before)


class Scaled(nn.Module):
    """A distribution that hides its module."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))


class Hidden:
    """A distribution that shows no parameters."""

    event_shape, batch_shape, has_rsample = torch.Size([2]), torch.Size(), True

    def __init__(self, module: Scaled) -> None:
        self._closure = lambda: td.Independent(td.Normal(module.loc, torch.ones(2)), 1)

    def rsample(self, shape: Any = ()) -> Tensor:
        return self._closure().rsample(shape)

    sample = rsample

    def log_prob(self, theta: Tensor) -> Tensor:
        return self._closure().log_prob(theta)


@shows("__init__", "parameters", "modules")
@shows("set_q", "parameters", "modules")
@LATER
@pytest.mark.parametrize("name", ["parameters", "modules"])
@pytest.mark.parametrize("called", [False, True], ids=["object", "callable"])
def test_parameters_and_modules(name: str, called: bool, later: bool) -> None:
    module = Scaled()
    hidden: Any = (lambda *_, **__: Hidden(module)) if called else Hidden(module)
    given: dict[str, Any] = {name: [module.loc] if name == "parameters" else [module]}
    with pytest.raises(ValueError, match="trainable parameters"):
        made(prior=real(), q=hidden)
    if later:
        posterior = fitted(made(prior=real()))
        posterior.set_q(hidden, **given)
    else:
        posterior = made(prior=real(), q=hidden, **given)
    assert [id(t) for t in posterior.q.trainable()] == [id(module.loc)]
    fitted(posterior, learning_rate=0.1)
    assert module.loc.abs().max() > 0.1
    fitted(posterior, **STILL, retrain_from_scratch=True)
    assert module.loc.abs().max() < 1e-6  # back at its snapshot


def test_parameters_leave_the_others_alone() -> None:
    q = own(0.0, 1.0)
    fitted(made(q=q, parameters=[q.base_dist.loc]))
    assert q.base_dist.loc.abs().min() > 0 and bool((q.base_dist.scale == 1).all())


@shows("__init__", "theta_transform")
def test_theta_transform() -> None:
    logit = td.transforms.SigmoidTransform().inv
    unit = td.transforms.ComposeTransform(
        [td.transforms.AffineTransform(0.5, 1 / 6), logit, td.transforms.AffineTransform(0.0, 2.0)]
    )
    posterior = made(theta_transform=unit, z_score_theta="none")
    theta = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(posterior.theta_transform(theta), unit(theta))
    torch.testing.assert_close(posterior.link_transform(unit(theta)), theta)
    assert not torch.allclose(made(z_score_theta="none").theta_transform(theta), unit(theta))
    # q starts as the image of a normal, half of which lies within its quartiles: sigmoid(.6745 / 2) = .5835
    theta = fitted(posterior, **STILL).sample((4000,)) / 6 + 0.5
    assert float(((theta - 0.5).abs() < 0.0835).double().mean()) == pytest.approx(0.5, abs=0.03)


@shows("__init__", "vi_method")
@shows("set_vi_method", "method")
@LATER
def test_vi_method(later: bool) -> None:
    moved = []
    for method in ("rKL", "fKL", "IW", "alpha"):
        posterior = ready(True) if later else made(vi_method=method)
        assert not later or posterior.set_vi_method(method) is posterior
        assert posterior.vi_method == method
        one = step(posterior)
        assert all(differ(one, other) for other in moved)
        moved.append(one)


def test_vi_method_beside_a_posterior_as_q() -> None:
    lender = made(vi_method="IW")
    assert made(q=lender).vi_method == "IW"
    assert made(q=lender, vi_method="fKL").vi_method == "fKL"


@shows("__init__", "device")
@shows("to", "device")
@LATER
def test_device(later: bool) -> None:
    posterior = ready(later, potential=Seen())
    assert posterior.to("meta") is posterior
    assert posterior.prior.sample().device.type == posterior.q.sample().device.type == "meta"
    assert all(t.device.type == "meta" for t in posterior.q.trainable())
    if later:
        assert posterior.default_x.device.type == "meta"
    direct = made(device="meta")
    assert direct.prior.sample().device.type == direct.q.sample().device.type == "meta"
    assert made().q.sample().device.type == "cpu"


@shows("__init__", "x_shape")
def test_x_shape() -> None:
    with pytest.warns(DeprecationWarning, match="x_shape"):
        posterior = made(x_shape=torch.Size([5]))
    assert torch.equal(step(posterior), step(made()))


@shows("__init__", "num_transforms", "hidden_features")
@LATER
def test_sizes_of_flows(later: bool) -> None:
    def count(**options: Any) -> int:
        posterior = made(**options) if later else made(**options, q="maf")
        if later:
            posterior.set_q("maf")
        return sum(t.numel() for t in fitted(posterior).q.trainable())

    small = count(num_transforms=1, hidden_features=4)
    assert count(num_transforms=2, hidden_features=4) > 1.5 * small
    assert count(num_transforms=1, hidden_features=8) > 1.5 * small


@shows("__init__", "z_score_theta")
def test_z_score_theta() -> None:
    cov = torch.tensor([[4.0, 3.0], [3.0, 9.0]])
    prior = td.MultivariateNormal(torch.tensor([10.0, -5.0]), cov)
    spread = {}
    for level in ("none", "independent", "structured"):
        posterior = made(prior=prior, z_score_theta=level)
        spread[level] = torch.cov(posterior.theta_transform(prior.sample((20_000,))).mT)
    torch.testing.assert_close(spread["none"], cov, atol=0.3, rtol=0)
    torch.testing.assert_close(spread["independent"], torch.tensor([[1, 0.5], [0.5, 1]]), atol=0.05, rtol=0)
    torch.testing.assert_close(spread["structured"], torch.eye(2), atol=0.05, rtol=0)


@shows("__init__", "z_score_x")
def test_z_score_x() -> None:
    """A q of one observation sees no x; the choice is checked and kept for fits that do."""
    assert made(z_score_x="structured").z_score_x == "structured"
    with pytest.raises(ValueError, match="`z_score_x`"):
        made(z_score_x="whitened")


@shows("set_default_x", "x")
@LATER
def test_set_default_x(later: bool) -> None:
    posterior = ready(later)
    theta = torch.zeros(1, 2)
    assert posterior.set_default_x(OTHER[0]) is posterior
    assert torch.equal(posterior.default_x, OTHER)
    assert torch.equal(posterior.potential(theta), log_p(theta, OTHER))
    first = posterior.map(init_method="prior", num_iter=200)
    posterior.set_default_x(X)
    assert (posterior.map(init_method="prior", num_iter=200) - first).abs().min() > 0.5
    assert (fitted(posterior, None).default_x == X).all()


# using a fit


@shows("sample", "sample_shape", "x", "show_progress_bars")
@LATER
def test_sample(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, shown = fitted(ready(later)), bars(monkeypatch)
    torch.manual_seed(1)
    first = posterior.sample((3, 2))
    torch.manual_seed(1)
    assert torch.equal(posterior.sample(sample_shape=(3, 2), x=X, show_progress_bars=False), first)
    assert first.shape == (3, 2, 2) and posterior.sample().shape == (2,) and shown == []
    with pytest.raises(ValueError, match="`x`"):
        posterior.sample((3,), x=OTHER)


@shows("sample", "correct")
@LATER
@pytest.mark.parametrize("q", ["auto", "named"])
def test_correct(q: str, later: bool) -> None:
    """q is half as wide as the posterior and 0.3, 0.5 off; its weights mend that as far as they can."""
    if q == "auto":
        posterior = found("mixture", automatic_and(later), allow_failed=True)
    else:
        posterior = fitted(ready(later, prior=real(), q=own(0.0, 0.45)), **STILL, retrain_from_scratch=later)

    def off(**options: Any) -> float:
        return float((posterior.sample((20_000,), **options).mean(0) - X[0]).abs().max())

    assert off(correct=False) > 0.25 and off(correct=True) < 0.1
    default = off()
    assert default < 0.1 if q == "auto" else default > 0.25
    assert off(correct=None) == pytest.approx(default, abs=0.05)


@shows("weighted_sample", "n", "x")
@LATER
@pytest.mark.parametrize("q", ["auto", "named"])
def test_weighted_sample(q: str, later: bool) -> None:
    potential = Seen()
    if q == "auto":
        posterior = automatic(automatic_and(later, potential))
    else:
        posterior = fitted(ready(later, potential, prior=real()), max_num_iters=300, learning_rate=0.02)
    for n in (25, 1000, 40_000):
        theta, log_w = posterior.weighted_sample(n)
        assert theta.shape == (n, 2) and log_w.shape == (n,)
        assert float(log_w.exp().sum()) == pytest.approx(1.0)
    mean = log_w.exp() @ theta.double()
    assert (mean - X[0]).abs().max() < 0.02
    assert (log_w.exp() @ (theta.double() - mean).square() - 0.25).abs().max() < 0.01
    potential.sizes.clear()
    assert torch.equal(posterior.weighted_sample(n=1000, x=X)[0], theta[:1000])  # it has them
    assert potential.sizes == []
    assert posterior.weighted_sample()[0].shape == (10_000, 2)
    with pytest.raises(ValueError, match="`x`"):
        posterior.weighted_sample(x=OTHER)
    for wrong in (0, 24, 2.5):
        with pytest.raises(ValueError, match="`n`: expected"):
            posterior.weighted_sample(wrong)


@shows("log_prob", "normalized")
@LATER
@pytest.mark.parametrize("q", ["auto", "named"])
def test_normalized(q: str, later: bool) -> None:
    if q == "auto":
        posterior = automatic(automatic_and(later))
    else:
        posterior = fitted(ready(later), max_num_iters=300, learning_rate=0.02)
    theta = torch.tensor([[0.3, -0.5], [2.0, 2.0], [9.0, 0.0]])  # in the middle, in the tail, outside
    plain = posterior.log_prob(theta)
    assert torch.equal(posterior.log_prob(theta, normalized="q"), plain)
    exact = td.Normal(X, 0.5).log_prob(theta).sum(-1)  # the box cuts hardly anything
    exact[2] = -torch.inf
    density = posterior.log_prob(theta, normalized="potential")
    torch.testing.assert_close(density, exact, atol=0.02, rtol=0)
    assert (plain - exact)[1].abs() > 0.02 and density.dtype == plain.dtype
    leaf = theta.clone().requires_grad_()
    tracked = posterior.log_prob(leaf, X, track_gradients=True, normalized="potential")
    (gradient,) = torch.autograd.grad(tracked[:2].sum(), leaf)
    torch.testing.assert_close(gradient[:2], (X - theta[:2]) / 0.25)
    with pytest.raises(ValueError, match="`normalized`: expected one of 'q', 'potential'"):
        posterior.log_prob(theta, normalized="p")


@shows("log_prob", "theta", "x", "track_gradients")
@shows("potential", "theta", "x", "track_gradients")
@LATER
@pytest.mark.parametrize("method", ["log_prob", "potential"])
def test_densities(method: str, later: bool) -> None:
    density = getattr(fitted(ready(later)), method)
    theta = torch.tensor([[0.1, 0.2], [-0.3, 0.4]]).requires_grad_()
    plain = density(theta)
    assert plain.shape == (2,) and not plain.requires_grad and not density(theta, X).requires_grad
    assert plain[0] != plain[1]
    tracked = density(theta, x=X, track_gradients=True)
    assert torch.equal(tracked.detach(), plain)
    tracked.sum().backward()
    assert bool((theta.grad != 0).all())
    with torch.no_grad():
        assert density(theta, track_gradients=True).requires_grad
    if method == "potential":
        assert torch.equal(density(theta, OTHER), log_p(theta.detach(), OTHER))
    else:
        with pytest.raises(ValueError, match="`x`"):
            density(theta, OTHER)


@shows("map", "num_iter", "num_to_optimize", "num_init_samples")
@LATER
def test_sizes_of_map(later: bool) -> None:
    potential = Seen()
    posterior = fitted(made(potential))
    if later:
        posterior.map(num_iter=1)
    potential.sizes.clear()
    posterior.map(num_iter=4, num_to_optimize=5, num_init_samples=33, force_update=True)
    assert potential.sizes[:5] == [33, 5, 5, 5, 5]
    assert sum(size == 5 for size in potential.sizes) == 5  # four steps and where they led


@shows("map", "learning_rate", "init_method")
@LATER
def test_learning_rate_and_start_of_map(later: bool) -> None:
    posterior = fitted(made(prior=real()))
    if later:
        posterior.map(num_iter=1)

    def found(**options: Any) -> Tensor:
        return posterior.map(num_iter=1, save_best_every=1, force_update=True, **options)

    start = torch.tensor([[1.5, 1.5]])
    assert (found(init_method=start, learning_rate=1e-7) - start).abs().max() < 1e-5
    moved = (found(init_method=start, learning_rate=1e-2) - start).abs()
    torch.testing.assert_close(moved, torch.full((1, 2), 0.02), rtol=1e-3, atol=0)  # Adam's first step, sd 2
    where = dict(learning_rate=1e-9, num_init_samples=1, num_to_optimize=1)
    posterior.set_q(own(1.5, 1e-3))
    fitted(posterior, **STILL)
    for init in ("proposal", "posterior"):
        assert (found(init_method=init, **where) - start).abs().max() < 0.01
    assert (found(init_method="prior", **where) - start).abs().max() > 0.01


@shows("map", "save_best_every", "show_progress_bars", "x", "force_update")
@LATER
def test_other_options_of_map(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = [10**9]

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        budget[0] -= 1
        if budget[0] < 0:
            raise KeyboardInterrupt
        return log_p(theta, x_o)

    posterior = fitted(made(potential))
    if later:
        posterior.map(num_iter=1)

    def after(calls: int, every: int) -> float:
        budget[0] = calls
        best = posterior.map(init_method=OTHER, save_best_every=every, force_update=True)
        budget[0] = 10**9
        return float(log_p(best, X))

    assert after(30, 1) > after(30, 20) > after(30, 1000)
    shown = bars(monkeypatch)
    kept = posterior.map(num_iter=3, show_progress_bars=True)
    assert shown == []  # it had one
    assert posterior.map(num_iter=3, show_progress_bars=True, force_update=True) is not kept
    assert shown == [3]
    assert (posterior.map(OTHER, num_iter=200) - OTHER).abs().max() < 0.02


@shows("evaluate", "quality_control_metric", "N")
@LATER
def test_evaluate(later: bool, capsys: pytest.CaptureFixture[str]) -> None:
    potential = Seen()
    posterior = fitted(ready(later, potential))
    if later:
        posterior.evaluate(N=50)
    capsys.readouterr()
    for metric, start in (("psis", "k-hat "), ("prop", "prop r^2 "), ("prop_prior", "prop_prior r^2 ")):
        potential.sizes.clear()
        report = posterior.evaluate(quality_control_metric=metric, N=300)
        assert report.n_draws == 300 and set(potential.sizes) == {300}
        out = capsys.readouterr().out
        assert out.startswith(start) and out.count("\n") == 1
        assert (report.proportionality is None) is (metric == "psis")


# siblings


@shows("sibling", "fit")
@LATER
def test_a_sibling_shares_what_is_not_fitted(later: bool) -> None:
    posterior = ready(later)
    before = weights(posterior)
    other = posterior.sibling()
    assert other.prior is posterior.prior and other.potential_fn is posterior.potential_fn
    assert other.coordinates is posterior.coordinates and torch.equal(weights(other), before)
    with pytest.raises(ValueError, match=r"call train\(\)"):
        other.sample()
    fitted(other, OTHER)
    assert torch.equal(weights(posterior), before) and not torch.equal(weights(other), before)
    report = other.report  # made on first use
    same = posterior.sibling(other.fit)
    assert same.q is other.q and torch.equal(same.default_x, OTHER) and same.report == report
    assert (posterior.default_x is None) is not later
