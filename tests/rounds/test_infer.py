"""`infer`: the right posterior where it is known, repeatable, and clear about what it cannot use."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import visbi
from visbi.estimators import TrainingOptions
from visbi.posterior import VIPosterior
from visbi.rounds import (
    Inference,
    Round,
    RoundProposal,
    infer,
    learning,
    likelihood_test,
    reason_to_stop,
    sequential,
)
from visbi.simulators import Simulations
from visbi.simulators.zoo import linear_gaussian

TASK = linear_gaussian.task()
TINY: dict[str, Any] = dict(
    simulations=(100, 80, 80),
    q="gaussian",
    ensemble=2,
    num_transforms=1,
    hidden_features=8,
    stop_early=False,
    options=TrainingOptions(max_epochs=2),
    train={"max_num_iters": 5, "init": "prior", "quality_control": False},
    show_progress_bar=False,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(simulator=TASK.simulator, x_o: Tensor = TASK.x_o, **changes) -> Inference:
    return infer(simulator, TASK.prior, x_o, **{**TINY, **changes})


def _seeded_draws(result: Inference) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return result.posterior.sample((50,))


@pytest.fixture(scope="module")
def fitted() -> Inference:
    return infer(
        TASK.simulator,
        TASK.prior,
        TASK.x_o,
        simulations=1000,
        rounds=2,
        ensemble=2,
        flow="maf",
        num_transforms=1,
        hidden_features=16,
        seed=0,
        show_progress_bar=False,
    )


def test_it_is_visbi_infer() -> None:
    assert visbi.infer is infer


def test_near_the_analytic_posterior(fitted: Inference) -> None:
    assert TASK.posterior is not None
    truth = TASK.posterior(TASK.x_o)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = fitted.posterior.sample((20_000,))
    sd = truth.covariance_matrix.diagonal().sqrt()  # type: ignore[attr-defined]
    assert ((draws.mean(0) - truth.mean) / sd).abs().max() < 0.3  # type: ignore[attr-defined]
    assert (draws.std(0) / sd - 1).abs().max() < 0.2


def test_what_it_returns(fitted: Inference) -> None:
    assert [len(runs) for runs in fitted.simulations] == [500, 500] and fitted.n_simulations == 1000
    assert len(fitted.rounds) == 2 and fitted.posterior is fitted.rounds[-1].posterior
    assert [done.n_used for done in fitted.rounds] == [500, 1000]  # all rounds' runs are used again
    assert fitted.errors is fitted.rounds[-1].errors and fitted.rounds[0].errors.moved is None
    assert fitted.posterior.report.status in ("ok", "corrected")


def test_it_says_which_error_is_the_larger(fitted: Inference) -> None:
    said = str(fitted)
    errors = fitted.errors
    assert errors.likelihood is not None and errors.q < 0.01 < errors.likelihood < 0.3
    assert f"error of q {errors.q:.3f}" in said
    assert f"error of the learned likelihood {errors.likelihood:.3f}" in said
    assert "spend next on: more simulations" in said and str(fitted.posterior.report) in said


def test_later_rounds_simulate_near_the_posterior(fitted: Inference) -> None:
    assert TASK.posterior is not None
    mean = TASK.posterior(TASK.x_o).mean  # type: ignore[attr-defined]
    spread = [(s.theta - mean).square().mean() for s in fitted.simulations]
    assert spread[1] < 0.7 * spread[0]


def test_the_networks_go_on_from_those_of_the_round_before() -> None:
    still = TrainingOptions(max_epochs=1, learning_rate=1e-12, weight_decay=0.0)
    result = tiny(seed=0, options=still)
    first, second = (done.likelihood.estimator.members for done in result.rounds[:2])
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before.standardise_x.scale, after.standardise_x.scale)
        for old, new in zip(before.flow.parameters(), after.flow.parameters(), strict=True):
            assert torch.allclose(old, new, atol=1e-6)


def starts(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Inference, list[Any]]:
    """A run, and the pair of q and `init` that each round's q was made of."""
    found: list[Any] = []

    class Recorded(VIPosterior):
        def __init__(self, potential: Any, prior: Any, *, q: Any) -> None:
            super().__init__(potential, prior, q=q)
            self.given = q

        def train(self, x: Any = None, **keywords: Any) -> Any:  # type: ignore[override]
            found.append((self.given, keywords.get("init")))
            return super().train(x, **keywords)

    monkeypatch.setattr(sequential, "VIPosterior", Recorded)
    return tiny(seed=0, **changes), found


def test_auto_starts_from_the_q_of_the_round_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its own exploration, which it always does."""
    result, found = starts(monkeypatch, q="auto", train={"quality_control": False})
    assert [q for q, _ in found] == ["auto"] * 3 and found[0][1] is None
    for (_, init), done in zip(found[1:], result.rounds[:-1], strict=True):
        assert init.q is done.posterior.q


def test_a_named_q_starts_from_the_weights_of_the_round_before() -> None:
    """Steps too small to move q leave it where the first round's exploration of its likelihood had put it."""
    still = {"max_num_iters": 1, "learning_rate": 1e-12, "quality_control": False}
    warm, anew = (
        tiny(seed=0, train={**still, **more}).rounds for more in ({}, {"retrain_from_scratch": True})
    )
    theta = warm[0].simulations.theta[:50]
    densities = [[done.posterior.log_prob(theta) for done in rounds] for rounds in (warm, anew)]
    assert all(done.errors.q_status != "failed" for done in (*warm, *anew))
    assert all(torch.allclose(density, densities[0][0], atol=1e-5) for density in densities[0])
    assert not torch.allclose(densities[1][1], densities[1][0], atol=0.01)  # asked to, it looks around anew


def test_a_named_q_that_failed_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is explored anew, as in the first round."""
    stuck = {"max_num_iters": 1, "init": "prior", "quality_control": False}
    far = dict(x_o=torch.full((2,), 30.0), simulations=(99, 80))
    result, found = starts(monkeypatch, train=stuck, **far)
    assert result.rounds[0].errors.q_status == "failed" and [q for q, _ in found] == ["gaussian"] * 2
    result, found = starts(monkeypatch, simulations=(100, 80))
    assert result.rounds[0].errors.q_status != "failed"
    assert found[1][0].q is result.rounds[0].posterior.q


def test_a_flow_s_first_weights_belong_to_the_seed() -> None:
    """Those of a Gaussian are zeros; a flow's are random, and torch's global generator is not theirs."""
    before = torch.random.get_rng_state()
    one = tiny(q="maf", simulations=(100, 80), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = tiny(q="maf", simulations=(100, 80), seed=3)
    assert torch.equal(_seeded_draws(one), _seeded_draws(again)) and one.errors == again.errors


def test_seed_repeats_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(_seeded_draws(first), _seeded_draws(again))
    assert first.posterior.report == again.posterior.report and first.errors == again.errors
    assert not torch.equal(_seeded_draws(first), _seeded_draws(other))


def test_workers_train_too_and_change_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = learning.fit_likelihood, []

    def spy(*arguments: Any, workers: int, **keywords: Any) -> Any:
        seen.append(workers)
        return original(*arguments, workers=workers, **keywords)

    monkeypatch.setattr(learning, "fit_likelihood", spy)
    alone, shared = (tiny(simulations=(100, 80), seed=3, workers=workers) for workers in (1, 2))
    assert seen == [1, 1, 2, 2]
    runs = [result.simulations[0] for result in (alone, shared)]
    assert torch.equal(runs[0].theta, runs[1].theta) and torch.equal(runs[0].x, runs[1].x)
    for a, b in zip(*(result.rounds[0].likelihood.traces for result in (alone, shared)), strict=True):
        assert a.validation[:3] == pytest.approx(b.validation[:3], rel=1e-4)
    one, same = (tiny(simulations=(100, 80), seed=3, ensemble=1, workers=workers) for workers in (1, 2))
    assert torch.equal(_seeded_draws(one), _seeded_draws(same)) and one.errors == same.errors


def test_without_a_seed_torch_s_generator_decides() -> None:
    results = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(tiny(simulations=(100,)).simulations[0].theta)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_on_round_sees_every_round_in_order_and_changes_nothing() -> None:
    seen: list[Round] = []

    def look(done: Round) -> None:
        seen.append(done)
        done.posterior.sample((30_000,), correct=True)  # its pool of draws grows

    result = tiny(on_round=look, seed=0)
    assert tuple(seen) == result.rounds and len(seen) == 3
    undisturbed = tiny(seed=0)
    assert torch.equal(result.simulations[2].theta, undisturbed.simulations[2].theta)


def test_one_number_of_simulations_is_split_over_the_rounds() -> None:
    result = tiny(simulations=302, rounds=3, seed=0)
    assert [len(runs) for runs in result.simulations] == [100, 100, 102]


def test_stops_when_another_round_would_not_show() -> None:
    """A plain model is learnt well, but q is hardly fitted: its error hides what rounds move."""
    well = dict(simulations=(1000, 300, 300), flow="maf", hidden_features=16, options=None)
    told = tiny(**well, stop_early=True, seed=1)
    errors = told.errors
    assert len(told.rounds) == 2 and "less than its own error" in told.stop_reason
    assert errors.moved is not None and errors.moved < errors.own and not errors.contradicted
    assert errors.likelihood_p is not None and errors.likelihood_finding in str(told)


def test_stop_early_can_be_turned_off() -> None:
    """Networks that cannot learn move nothing, and 90 runs are too few to contradict them."""
    still = TrainingOptions(max_epochs=1, learning_rate=1e-12, weight_decay=0.0)
    barely = dict(simulations=(300, 90, 90), options=still, seed=0)
    told, spent = (tiny(**barely, stop_early=early) for early in (True, False))
    assert len(told.rounds) == 2 and "less than its own error" in told.stop_reason
    assert len(spent.rounds) == 3 and spent.stop_reason == "all simulations are spent"


def test_one_network_has_no_spread_and_never_stops() -> None:
    result = tiny(ensemble=1, stop_early=True, seed=0)
    assert len(result.rounds) == 3 and result.errors.likelihood is None
    assert "not known" in str(result)


def test_the_runs_of_a_round_test_the_likelihood_of_the_one_before(fitted: Inference) -> None:
    first, second = (done.errors for done in fitted.rounds)
    assert first.likelihood_p is None and first.likelihood_finding == ""
    assert second.likelihood_p is not None and second.likelihood_finding in str(fitted)


def test_networks_that_agree_on_what_is_wrong_do_not_settle_it() -> None:
    """Trained by steps too small to learn, networks know nothing of theta, and rounds change little."""
    still = TrainingOptions(max_epochs=1, learning_rate=1e-12, weight_decay=0.0)
    options = dict(simulations=(300,) * 3, options=still, seed=0)
    result = tiny(**options, stop_early=True)
    for done in result.rounds[1:]:
        assert done.errors.likelihood_p is not None and done.errors.likelihood_p < 0.05
        assert done.errors.contradicted and done.errors.spend_on == "more simulations"
    assert len(result.rounds) == 3 and result.stop_reason == "all simulations are spent"
    untested = [replace(done.errors, likelihood_p=None) for done in result.rounds]
    assert any(reason_to_stop(untested[: i + 1]) for i in range(2))  # what the spread alone would have said


def test_few_runs_test_nothing() -> None:
    result = tiny(simulations=(100, 99, 100), seed=0)
    known = [done.errors.likelihood_p is not None for done in result.rounds]
    assert known == [False, False, True]


def of_two_rounds(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Inference, Simulations]:
    """A run of two rounds, and the runs of the second that tested the likelihood of the first."""
    seen = []

    def spy(estimator, runs, theta_o, *, seed):
        seen.append(runs)
        return likelihood_test(estimator, runs, theta_o, n_null=20, seed=seed)

    monkeypatch.setattr(sequential, "likelihood_test", spy)
    result = tiny(seed=0, **options)
    (runs,) = seen
    return result, runs


def test_of_many_runs_some_test(monkeypatch: pytest.MonkeyPatch) -> None:
    result, runs = of_two_rounds(monkeypatch, simulations=(100, 2100))
    assert torch.equal(runs.x, result.simulations[1].x[::3])
    assert torch.equal(runs.theta, result.simulations[1].theta[::3])


def test_runs_that_are_not_usable_test_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihood has not learnt from their like, and would be called wrong."""
    result, runs = of_two_rounds(monkeypatch, simulations=(400, 300), usable=lambda x: x[:, 0] < 0.5)
    keep = result.simulations[1].x[:, 0] < 0.5
    assert 100 <= int(keep.sum()) < 300
    assert torch.equal(runs.x, result.simulations[1].x[keep])
    assert torch.equal(runs.theta, result.simulations[1].theta[keep])


def test_the_test_changes_no_other_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    with_test = tiny(simulations=(100, 120, 100), seed=0)
    monkeypatch.setattr(sequential, "FEWEST_RUNS", 10_000)
    without = tiny(simulations=(100, 120, 100), seed=0)
    assert with_test.errors.likelihood_p is not None and without.errors.likelihood_p is None
    assert torch.equal(_seeded_draws(with_test), _seeded_draws(without))
    for a, b in zip(with_test.simulations, without.simulations, strict=True):
        assert torch.equal(a.theta, b.theta) and torch.equal(a.x, b.x)


def test_flow_by_the_length_of_x() -> None:
    def long(theta: Tensor) -> Tensor:
        return torch.cat([theta + torch.randn_like(theta) for _ in range(10)], -1)

    short_x = tiny(simulations=(100,), seed=0).rounds[0].likelihood.estimator.members[0]
    long_x = tiny(long, torch.zeros(20), simulations=(100,), seed=0).rounds[0].likelihood.estimator.members[0]
    assert (short_x.config.flow, long_x.config.flow) == ("nsf", "maf")
    named = tiny(simulations=(100,), flow="maf", seed=0).rounds[0].likelihood.estimator.members[0]
    assert named.config.flow == "maf"


def test_the_prior_s_share_reaches_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    class Recorded(RoundProposal):
        def __init__(self, posterior, *, prior_share: float) -> None:
            shares.append(prior_share)
            super().__init__(posterior, prior_share=prior_share)

    monkeypatch.setattr(sequential, "RoundProposal", Recorded)
    tiny(simulations=(100, 60), prior_share=0.3, seed=0)
    assert shares == [0.3]


def test_failed_runs_are_counted_and_left_out() -> None:
    def fails(theta: Tensor) -> Tensor:
        x = TASK.simulator(theta)
        x[theta[:, 0] > 1.0] = torch.nan
        return x

    result = tiny(fails, simulations=(200, 80), seed=0)
    assert result.n_simulations == 280 and result.simulations[0].n_failed > 0
    assert result.rounds[1].n_used == 280 - sum(runs.n_failed for runs in result.simulations)


def test_usable_leaves_runs_out() -> None:
    kept = tiny(simulations=(400,), usable=lambda x: x[:, 0] < 0, seed=0).rounds[0].n_used
    assert 100 < kept < 300


def test_x_o_may_have_a_leading_one() -> None:
    flat, row = tiny(seed=0), tiny(x_o=TASK.x_o[None], seed=0)
    assert torch.equal(_seeded_draws(flat), _seeded_draws(row))


def test_warns_of_a_doubtful_q() -> None:
    far = dict(x_o=torch.full((2,), 30.0), simulations=(99,), seed=0)  # too few to call x_o foreign
    train = {"max_num_iters": 1, "init": "prior"}  # q stays at the prior, far from what x_o asks for
    with pytest.warns(UserWarning, match="Quality of q"):
        result = tiny(**far, train=train)
    assert result.posterior.report.status in ("suspect", "failed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(**far, train={**train, "quality_control": False})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x_o=torch.tensor([0.0, torch.nan])), "`x_o`: expected finite numbers"),
        (dict(x_o=torch.zeros(3)), r"`x_o`: expected the shape of one x, \(2,\); got \(3,\)"),
        (dict(x_o=torch.zeros(2, 2)), "`x_o`: expected the shape of one x"),
        (dict(simulations=()), "`simulations`: expected a number, or one for each round"),
        (dict(simulations=(100, 0)), "`simulations`: expected a whole number >= 1"),
        (dict(simulations=2, rounds=3), "`simulations`: expected at least one for each of 3 rounds; got 2"),
        (dict(simulations=100, rounds=0), "`rounds`: expected a whole number >= 1"),
        (dict(simulations=(49, 100)), "`simulations`: expected at least 50 in the first round.*; got 49"),
        (dict(simulations=torch.tensor([49, 100])), "`simulations`: expected at least 50 in the first round"),
        (dict(simulations=160, rounds=4), "`simulations`: expected at least 50 in the first round.*; got 40"),
        (dict(simulations=[100.5]), "`simulations`: expected a whole number >= 1"),
        (dict(simulations=np.zeros((2, 2))), "`simulations`: expected a whole number >= 1"),
        (dict(prior_share=1.1), r"`prior_share`: expected a number in \[0, 1\]"),
        (dict(ensemble=0), "`ensemble`: expected a whole number >= 1"),
        (dict(flow="spline"), "`flow`: expected one of 'auto', 'maf', 'nsf'"),
        (
            dict(usable=lambda x: torch.zeros(len(x), dtype=torch.bool)),
            "`usable`: expected to keep at least 50",
        ),
        (dict(usable=lambda x: x > 0), "`usable`: expected to return a bool tensor"),
        (dict(usable=lambda x: [True] * len(x)), "`usable`: .*; got list"),
        (dict(q="no such family"), "no such family"),
        (dict(seed=-1), "`seed`"),
    ],
)
def test_refuses(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_refuses_before_it_simulates() -> None:
    def never(theta: Tensor) -> Tensor:
        raise AssertionError

    for changes in (
        dict(q="no such family"),
        dict(flow="spline"),
        dict(prior_share=-1.0),
        dict(simulations=(49, 100)),
        dict(workers=0),
        dict(store=__file__),
    ):
        with pytest.raises(ValueError, match="expected"):
            tiny(never, **changes)
    for name, value in (
        ("usable", 3),
        ("on_round", "print"),
        ("options", {"max_epochs": 2}),
        ("train", ["seed"]),
        ("store", 3),
    ):
        with pytest.raises(TypeError, match=f"`{name}`: expected"):
            tiny(never, **{name: value})


def test_the_first_runs_say_that_x_o_or_x_is_of_the_wrong_kind() -> None:
    calls: list[int] = []

    def spy(theta: Tensor) -> Tensor:
        calls.append(len(theta))
        return TASK.simulator(theta)

    def counts(theta: Tensor) -> Tensor:
        return torch.poisson(spy(theta).exp())

    wrong = [
        (spy, torch.zeros(3), "`x_o`: expected the shape of one x"),
        (counts, torch.ones(2), "`x`: expected columns with a density"),
    ]
    for simulator, x_o, message in wrong:
        calls.clear()
        with pytest.raises(ValueError, match=message):
            tiny(simulator, x_o, simulations=(1000, 1000), seed=0)
        assert calls.count(256) == 1  # the chunks of a round


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_simulations_in_any_sequence(kind: Any) -> None:
    assert [len(runs) for runs in tiny(simulations=kind([100, 80]), seed=0).simulations] == [100, 80]


def test_x_o_may_be_a_number_where_the_simulator_returns_one() -> None:
    def number(theta: Tensor) -> float:
        return float(theta.sum() + torch.randn(()))

    alone, row = (tiny(number, x_o, simulations=(60,), seed=0) for x_o in (torch.tensor(1.0), torch.ones(1)))
    assert torch.equal(_seeded_draws(alone), _seeded_draws(row))


def test_unknown_keyword_of_train() -> None:
    with pytest.raises(TypeError, match="max_num_iter"):
        tiny(simulations=(100,), train={"max_num_iter": 5})


def test_result_is_frozen(fitted: Inference) -> None:
    with pytest.raises(AttributeError):
        fitted.posterior = None  # type: ignore[misc, assignment]
    assert replace(fitted, simulations=fitted.simulations[:1]).n_simulations == 500
