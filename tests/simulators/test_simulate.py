"""Running simulators: seeds, workers, failures, errors at the door."""

import random

import joblib
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from visbi.priors import BoxUniform
from visbi.simulators import Simulations, simulate

PRIOR = BoxUniform(torch.zeros(2), torch.ones(2))


def quiet(simulator, n=50, proposal=PRIOR, **options):
    return simulate(simulator, proposal, n, show_progress_bar=False, **options)


def torch_batched(theta):
    return theta[:, :1] + torch.randn(len(theta), 3)


def torch_single(theta):
    return theta[0] + torch.randn(3)


def numpy_single(theta):
    return theta.copy() + np.random.normal(size=2) + random.random()


def with_rng(theta, rng):
    return rng.normal(theta, 1.0)


def with_seed(theta, seed):
    return np.random.default_rng(seed).normal(theta.copy(), 1.0)


SIMULATORS = [torch_batched, torch_single, numpy_single, with_rng, with_seed]


def same(a: Simulations, b: Simulations) -> bool:
    tensors = ("theta", "x", "failed_theta")
    return all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors) and a.failures == b.failures


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_seed_repeats_and_other_seed_differs(simulator):
    first = quiet(simulator, seed=1)
    assert first.theta.shape == (50, 2) and first.x.shape[0] == 50 and first.seed == 1
    assert same(first, quiet(simulator, seed=1))
    assert not same(first, quiet(simulator, seed=2))


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_noise_is_fresh_in_every_run(simulator):
    theta = torch.full((40, 2), 0.5)
    x = quiet(simulator, 40, theta, seed=0).x
    assert len(torch.unique(x, dim=0)) == 40


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
@pytest.mark.parametrize("simulator", [torch_batched, numpy_single])
def test_workers_and_backends_change_nothing(backend, simulator):
    alone = quiet(simulator, seed=3, batch_size=9)
    with joblib.parallel_config(backend=backend):
        assert same(alone, quiet(simulator, seed=3, batch_size=9, workers=2))
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert same(alone, quiet(simulator, seed=3, batch_size=9, workers=None))


def test_lambda_in_workers():
    scale = 2.0
    x = quiet(lambda theta: theta * scale, 10, seed=0, workers=2, batch_size=3)
    assert torch.equal(x.x, x.theta * 2)


@pytest.mark.parametrize("simulator", [torch_single, numpy_single, with_rng, with_seed])
def test_grouping_of_single_runs_changes_nothing(simulator):
    one, many = (quiet(simulator, seed=3, batched=False, batch_size=size) for size in (1, 17))
    assert same(one, many)


@pytest.mark.parametrize("seed", [5, torch.tensor(5)])
def test_generators_are_restored(seed):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    quiet(numpy_single, seed=seed)
    quiet(torch_single, seed=seed)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_without_seed_torch_decides():
    torch.manual_seed(0)
    first, second = quiet(numpy_single), quiet(numpy_single)
    torch.manual_seed(0)
    again = quiet(numpy_single)
    assert same(first, again) and first.seed == again.seed
    assert not same(first, second)
    assert same(first, quiet(numpy_single, seed=first.seed))


def fails_above_half(theta):
    if theta[0] > 0.5:
        raise ArithmeticError(f"theta {theta[0]:.3f} is too much")
    return theta * (torch.nan if theta[1] > 0.5 else 1.0)


def test_failures_are_kept_apart():
    result = quiet(fails_above_half, 100, seed=0)
    assert bool((result.theta <= 0.5).all()) and torch.equal(result.x, result.theta)
    assert len(result) + result.n_failed == 100 and len(result) > 10
    for theta, text in zip(result.failed_theta, result.failures, strict=True):
        expected = (
            f"ArithmeticError: theta {theta[0]:.3f} is too much"
            if theta[0] > 0.5
            else "2 of 2 values NaN or Inf"
        )
        assert text == expected


def batch_refuses(theta):
    if (theta[:, 0] > 0.9).any():
        raise ArithmeticError("no")
    return theta + torch.randn(len(theta), 1)


def test_one_bad_theta_does_not_cost_the_batch():
    result = quiet(batch_refuses, 100, seed=0, batched=True, batch_size=50)
    assert torch.equal(result.failed_theta[:, 0] > 0.9, torch.ones(result.n_failed, dtype=torch.bool))
    assert (
        bool((result.theta[:, 0] <= 0.9).all()) and len(result) == 100 - result.n_failed and result.n_failed
    )
    assert len(torch.unique(result.x - result.theta)) > 80
    assert same(result, quiet(batch_refuses, 100, seed=0, batched=True, batch_size=50, workers=2))


def test_proposals():
    theta = torch.rand(20, 3, dtype=torch.float64)
    given = quiet(lambda t: 2 * t, 20, theta, seed=0)
    assert torch.equal(given.theta, theta) and given.x.dtype == torch.float64
    assert quiet(lambda t: t, 4, theta[:4].numpy()).x.shape == (4, 3)
    assert quiet(lambda t: t, 4, torch.arange(8).reshape(4, 2)).x.dtype == torch.float32
    scalar = quiet(lambda t: t**2, 30, Normal(0.0, 1.0), seed=0)
    assert scalar.theta.shape == (30, 1) and scalar.x.shape == (30, 1)


def test_output_kinds():
    assert quiet(lambda t: float(t[0])).x.shape == (50, 1)
    assert quiet(lambda t: t.sum(-1)).x.shape == (50, 1)
    assert quiet(lambda t: [float(t[0]), 2.0]).x.shape == (50, 2)
    assert quiet(lambda t: np.ones((2, 3)) * t.copy()[0]).x.shape == (50, 2, 3)


def test_n_of_one():
    assert quiet(torch_batched, 1).x.shape == (1, 3)
    assert quiet(torch_single, 1).x.shape == (1, 3)


def test_theta_in_the_result_is_safe_from_the_simulator():
    def overwrites(theta):
        theta *= 0
        return theta + 1

    assert bool((quiet(overwrites, seed=0).theta != 0).all())


def test_progress_bar_counts_runs(capsys):
    simulate(fails_above_half, PRIOR, 20, seed=0)
    shown = capsys.readouterr().err
    assert "20/20" in shown and "failed" in shown
    quiet(torch_single, 20)
    assert capsys.readouterr().err == ""


def test_chunks_are_shown_as_they_are_finished(tmp_path):
    seen = []
    runs = quiet(torch_single, 20, batch_size=8, store=tmp_path, look=seen.append)
    assert torch.equal(torch.cat(seen), runs.x) and len(seen) == 3
    again = []
    quiet(torch_single, 20, batch_size=8, store=tmp_path, look=again.append)
    assert torch.equal(torch.cat(again), runs.x)

    def ends(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quiet(torch_single, 20, batch_size=8, store=tmp_path / "new", look=ends)
    assert len(list((tmp_path / "new").glob("chunk-*"))) == 1


BAD = [
    (dict(n=0), ValueError, "`n`"),
    (dict(n=2.5), ValueError, "`n`"),
    (dict(workers=0), ValueError, "`workers`"),
    (dict(workers=1.5), ValueError, "`workers`"),
    (dict(batch_size=0), ValueError, "`batch_size`"),
    (dict(store=3), TypeError, "`store`: expected the path of a folder"),
    (dict(store=__file__), ValueError, "`store`: expected a folder"),
    (dict(seed=-1), ValueError, "`seed`"),
    (dict(proposal="prior"), TypeError, "`proposal`.*sample"),
    (dict(proposal=torch.rand(50)), ValueError, r"`proposal`.*\(n, D\)"),
    (dict(proposal=torch.rand(7, 2)), ValueError, r"`proposal`.*n = 50"),
    (dict(proposal=torch.full((50, 2), torch.nan)), ValueError, "`proposal`.*finite"),
    (dict(simulator=3), TypeError, "`simulator`"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_at_the_door(change, error, message):
    with pytest.raises(error, match=message):
        quiet(**{"simulator": torch_single, **change})


def ragged(theta):
    return torch.zeros(2 if theta[0] > 0.5 else 3)


@pytest.mark.parametrize("batch_size", [1, 50])
@pytest.mark.parametrize("workers", [1, 2])
def test_unlike_shapes_are_an_error(batch_size, workers):
    with pytest.raises(ValueError, match=r"`simulator`: expected x of one shape.*\([23],\)"):
        quiet(ragged, batch_size=batch_size, workers=workers, seed=0)


def test_batch_of_wrong_length_is_an_error():
    with pytest.raises(ValueError, match="`simulator`: expected x with 50 rows"):
        quiet(lambda theta: theta[:3], batched=True)


def test_all_runs_failing_is_an_error():
    def broken(theta):
        raise KeyError("the first reason")

    with pytest.raises(ValueError, match="50 failures of 50; the first: KeyError: 'the first reason'"):
        quiet(broken)


def test_interrupt_is_not_a_failed_run():
    def interrupted(theta):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(interrupted, batched=False)
