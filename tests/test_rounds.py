"""`infer`: the right posterior where it is known, repeatable, and clear about what it cannot use."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from visbi.estimators import TrainingOptions
from visbi.rounds import Inference, Round, infer
from visbi.simulators.zoo import linear_gaussian

TASK = linear_gaussian.task()
TINY = dict(
    simulations=(200, 150, 150),
    q="gaussian",
    options=TrainingOptions(max_epochs=2),
    train={"max_num_iters": 5},
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
        simulations=(1000, 1000, 1000),
        q="gaussian",
        options=TrainingOptions(max_epochs=60),
        train={"max_num_iters": 200},
        num_transforms=2,
        hidden_features=32,
        seed=0,
        show_progress_bar=False,
    )


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
    assert fitted.n_simulations == 3000 and len(fitted.rounds) == 2
    assert fitted.posterior is fitted.rounds[-1].posterior
    for done in fitted.rounds:
        assert 500 < done.n_used <= 3000
        assert done.beyond_fence < 0.05


def test_later_rounds_simulate_near_the_posterior(fitted: Inference) -> None:
    assert TASK.posterior is not None
    mean = TASK.posterior(TASK.x_o).mean  # type: ignore[attr-defined]
    spread = [
        (s.theta - mean).square().mean() for s in (fitted.prior_simulations, fitted.rounds[-1].simulations)
    ]
    assert spread[1] < 0.7 * spread[0]


def test_seed_repeats_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(_seeded_draws(first), _seeded_draws(again))
    assert first.posterior.report == again.posterior.report
    assert not torch.equal(_seeded_draws(first), _seeded_draws(other))


def test_without_a_seed_torch_s_generator_decides() -> None:
    results = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(tiny(simulations=(200, 150)).prior_simulations.theta)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_on_round_sees_every_round_in_order() -> None:
    seen: list[Round] = []
    result = tiny(on_round=seen.append, seed=0)
    assert tuple(seen) == result.rounds and len(seen) == 2


def test_failed_runs_are_counted_and_left_out() -> None:
    def fails(theta: Tensor) -> Tensor:
        x = TASK.simulator(theta)
        x[theta[:, 0] > 1.0] = torch.nan
        return x

    result = tiny(fails, simulations=(200, 150), seed=0)
    assert result.n_simulations == 350 and result.prior_simulations.n_failed > 0
    assert result.rounds[0].n_used <= 350 - result.prior_simulations.n_failed


def test_usable_leaves_runs_out() -> None:
    kept = tiny(simulations=(400, 300), usable=lambda x: x[:, 0] < 0, seed=0).rounds[0].n_used
    assert kept < tiny(simulations=(400, 300), seed=0).rounds[0].n_used


def test_x_o_may_have_a_leading_one() -> None:
    flat, row = tiny(seed=0), tiny(x_o=TASK.x_o[None], seed=0)
    assert torch.equal(_seeded_draws(flat), _seeded_draws(row))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x_o=torch.tensor([0.0, torch.nan])), "`x_o`: expected finite numbers"),
        (dict(x_o=torch.zeros(3)), r"`x_o`: expected the shape of one x, \(2,\); got \(3,\)"),
        (dict(x_o=torch.zeros(2, 2)), "`x_o`: expected the shape of one x"),
        (dict(simulations=(100,)), "`simulations`: expected a number for the prior and one for each round"),
        (dict(simulations=(100, 0)), "`simulations`: expected a whole number >= 1"),
        (dict(simulations=(30, 15)), "`simulations`: expected at least 50 successful runs"),
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


def test_unknown_keyword_of_train() -> None:
    with pytest.raises(TypeError, match="max_num_iter"):
        tiny(simulations=(200, 150), train={"max_num_iter": 5})


def test_result_is_frozen(fitted: Inference) -> None:
    with pytest.raises(AttributeError):
        fitted.posterior = None  # type: ignore[misc, assignment]
    assert replace(fitted, rounds=()).n_simulations == 1000
