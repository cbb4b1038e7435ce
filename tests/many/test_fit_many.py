"""`fit_many`: right at each observation, repeatable, and clear about what it cannot do."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from many_cases import GOOD, X, equal, many, tensors
from posterior_cases import SD, alone_and_seeded, box, log_p, made, real, weights
from visbi import VIPosterior, fit_many

__all__ = ["alone_and_seeded"]


@pytest.mark.parametrize("q", ["gaussian", "auto"])
def test_each_observation_has_its_own_posterior(q: str) -> None:
    """Conjugate: prior N(0, 4), likelihood N(theta, .25)."""
    posteriors = many(X[:3], q, joint, **({} if q == "auto" else GOOD))
    theta = posteriors.sample((4000,))
    assert theta.shape == (4000, 3, 2)
    variance = 1 / (1 / 4 + 1 / SD**2)
    assert ((theta.mean(0) - X[:3] * variance / SD**2) / variance**0.5).abs().max() < 0.1
    assert (theta.std(0) / variance**0.5 - 1).abs().max() < 0.1
    assert all(report.status in ("ok", "corrected") for report in posteriors.reports)


def joint(theta: Tensor, x: Tensor) -> Tensor:
    return log_p(theta, x) + real().log_prob(theta)


@pytest.mark.parametrize("q", ["gaussian", "auto"])
def test_a_seed_repeats_and_another_differs(q: str) -> None:
    first = many(X[:3], q)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    assert equal(first, many(X[:3], q))
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]
    assert not equal(first, many(X[:3], q, seed=2))


def test_without_seed_torch_decides() -> None:
    first, second = many(seed=None), many(seed=None)
    torch.manual_seed(0)
    third = many(seed=None)
    torch.manual_seed(0)
    assert equal(third, many(seed=None)) and not equal(first, second)


def test_chunks_differ_and_their_size_belongs_to_the_seed() -> None:
    same = X[:1].expand(4, 2)
    posteriors = many(same)
    assert len({tuple(weights(each).tolist()) for each in posteriors}) == 4
    assert not equal(posteriors, many(same, chunk_size=4))
    # other chunks change nothing in a chunk
    assert torch.equal(tensors(many(X[:2]))[0], tensors(many(X))[0])


@pytest.mark.parametrize("in_rows", [True, False])
def test_potentials_for_one_observation_at_a_time(in_rows: bool) -> None:
    def first_row(theta: Tensor, x: Tensor) -> Tensor:
        return joint(theta, x if in_rows else x[0])

    posteriors = many(X[:2], potential=first_row, **GOOD)
    assert posteriors.job.in_rows == in_rows
    mean = posteriors.sample((2000,), correct=True).mean(0)
    assert (mean - X[:2] / (1 + SD**2 / 4)).abs().max() < 0.05


def test_trials_are_one_observation() -> None:
    trials = torch.stack([X, X + 1])  # two observations of five trials
    potential = lambda theta, x: -0.5 * (theta[:, None] - x).square().sum((1, 2))  # noqa: E731
    theta = many(trials, potential=potential, x_is_iid=True, **GOOD).sample((2000,))
    assert ((theta[:, 1] - theta[:, 0]).mean(0) - 1).abs().max() < 0.1


def test_failing_observations_are_singled_out() -> None:
    def picky(theta: Tensor, x: Tensor) -> Tensor:
        if bool((x == X[2]).all(-1).any()):
            raise ArithmeticError("not this one")
        return joint(theta, x)

    x = X.clone()
    x[3, 0] = torch.nan
    with pytest.warns(UserWarning, match="Of 5 fits 2 failed"):
        posteriors = many(x, potential=picky, prior=real(), quality_control=True, **GOOD)
    assert posteriors.failed.tolist() == [2, 3] and len(posteriors.suspect) == 0
    assert "not this one" in posteriors.reports[2].sentence and "1 of 2 NaN" in posteriors.reports[3].sentence
    with pytest.raises(ValueError, match="no fit to this observation: ArithmeticError: not this one"):
        posteriors[2]
    theta = posteriors.sample((7,))
    assert theta[:, [2, 3]].isnan().all() and theta[:, [0, 1, 4]].isfinite().all()
    assert torch.equal(posteriors.log_prob(theta).isnan(), theta.isnan().any(-1))
    assert "failed: x[2], x[3]" in str(posteriors)


def test_suspect_fits_are_told() -> None:
    with pytest.warns(UserWarning, match="suspect"):
        posteriors = many(quality_control=True)
    assert posteriors.suspect.tolist() == [0, 1, 2, 3, 4]


def test_a_posterior_as_q_brings_its_own() -> None:
    lender = VIPosterior(log_p, box(), q="gaussian_diag", vi_method="fKL")
    posteriors = many(X[:2], lender, prior=box())
    assert posteriors[1].vi_method == "fKL" and type(posteriors[1].q.body) is type(lender.q.body)
    assert posteriors[0].q is not posteriors[1].q is not lender.q


def test_starts_from_given_weights_if_asked() -> None:
    original = made(prior=real()).train(X[:1], **GOOD, show_progress_bar=False, seed=1, quality_control=False)
    still = dict(learning_rate=1e-12, max_num_iters=1)
    kept = many(X[:2], original, retrain_from_scratch=False, **still)
    torch.testing.assert_close(weights(kept[1]), weights(original))
    assert (weights(many(X[:2], original, **still)[0]) - weights(original)).abs().max() > 0.01


def test_a_distribution_of_ones_own_as_q() -> None:
    loc, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    own = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
    posteriors = many(X[:3], own, **GOOD)
    assert (posteriors.sample((2000,)).mean(0) - X[:3]).abs().max() < 0.1
    assert loc.tolist() == [0.0, 0.0]


def test_idle_options_warn_once() -> None:
    with pytest.warns(UserWarning, match="`learning_rate`: of no use") as caught:
        many(X[:3], "auto", learning_rate=0.1)
    assert len(caught) == 1


def test_progress_counts_observations(capsys: pytest.CaptureFixture[str]) -> None:
    fit_many(log_p, real(), X, "gaussian", max_num_iters=1, chunk_size=2, seed=1, quality_control=False)
    assert "fitting: 100%" in (said := capsys.readouterr().err) and "5/5" in said


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(x=X[:0]), ValueError, "`x`: expected observations"),
    (dict(x="abc"), TypeError, "`x`: expected a tensor"),
    (dict(x=X * torch.nan), ValueError, "`x`: expected an observation without NaN"),
    (dict(workers=0), ValueError, "`workers`: expected a whole number"),
    (dict(chunk_size=0), ValueError, "`chunk_size`: expected a whole number"),
    (dict(memory=-1.0), ValueError, "`memory`: expected a finite number > 0"),
    (dict(store=3), TypeError, "`store`: expected the path of a folder"),
    (dict(store=__file__), ValueError, "`store`: expected a folder"),
    (dict(seed=-1), ValueError, "`seed`: expected a whole number"),
    (dict(q="mef"), ValueError, "`q`: expected"),
    (dict(n_partcles=3), TypeError, "Did you mean `n_particles`"),
    (dict(learning_rate=-1.0), ValueError, "`learning_rate`: expected"),
    (dict(potential=lambda theta, x: -theta.square().sum(-1)), ValueError, "`potential`: expected a func"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        many(**change)


def test_trials_that_are_not_said_to_be_some() -> None:
    def of_trials(theta: Tensor, x: Tensor) -> Tensor:
        return -(theta[:, None] - x).square().sum((1, 2))[..., None].expand(-1, 3)

    for said, noted in ((False, True), (True, False)):
        with pytest.raises(ValueError, match="to return shape") as raised:
            many(X[:, None].expand(-1, 4, -1), potential=of_trials, x_is_iid=said)
        assert any("x_is_iid=True" in note for note in getattr(raised.value, "__notes__", [])) is noted


def test_all_failing_is_an_error() -> None:
    def tired(theta: Tensor, x: Tensor) -> Tensor:
        if len(theta) > 100:
            raise ArithmeticError("enough")
        return joint(theta, x)

    with pytest.raises(ValueError, match="observation 0: ArithmeticError: enough"):
        many(potential=tired)
