"""One fit for each observation: right at each, alike in any order, the original untouched."""

import pickle
from typing import Any

import pytest
import torch

from posterior_cases import SD, X, fitted, log_p, made, real, weights
from visbi import RefittingPosterior, VIPosterior

XS = torch.tensor([[-1.0, 0.5], [0.0, 0.0], [1.0, 2.0]])
GOOD: dict[str, Any] = dict(learning_rate=0.05, max_num_iters=150, seed=1)


def refitting(**train: Any) -> RefittingPosterior:
    return RefittingPosterior(made(prior=real()), **{**GOOD, **train})


def test_each_observation_has_its_own_fit() -> None:
    posterior = refitting()
    theta = posterior.sample_batched((3000,), XS, show_progress_bars=False)
    assert theta.shape == (3000, 3, 2)
    for column, x in zip(theta.unbind(1), XS, strict=True):
        assert ((column.mean(0) - x) / SD).abs().max() < 0.1
        assert (column.std(0) / SD - 1).abs().max() < 0.1
        torch.testing.assert_close(posterior.log_prob(column, x), posterior.at(x).log_prob(column))


def test_order_does_not_matter() -> None:
    first, second = refitting(), refitting()
    first.sample_batched((1,), XS, show_progress_bars=False)
    second.sample_batched((1,), XS.flip(0), show_progress_bars=False)
    for x in XS:
        assert torch.equal(weights(first.at(x)), weights(second.at(x)))


def test_a_fit_is_made_once() -> None:
    posterior = refitting()
    assert posterior.at(XS[0]) is posterior.at(XS[:1]) and posterior.at(XS[0]) is not posterior.at(XS[1])


def test_trials_are_one_observation() -> None:
    trials = torch.stack([XS, XS + 1])  # two observations of three trials
    potential = lambda theta, x: -0.5 * (theta[:, None] - x).square().sum((1, 2))  # noqa: E731
    posterior = RefittingPosterior(VIPosterior(potential, real(), q="gaussian"), **GOOD)
    theta = posterior.sample_batched((2000,), trials, show_progress_bars=False)
    assert theta.shape == (2000, 2, 2)
    shift = (theta[:, 1] - theta[:, 0]).mean(0)
    assert (shift - 1).abs().max() < 0.15


def test_a_batch_with_auto_is_fitted_side_by_side() -> None:
    rows: list[int] = []

    def counting(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(theta))
        return log_p(theta, x)

    original = VIPosterior(counting, real(), q="auto")
    posterior = RefittingPosterior(original, seed=1)
    known = posterior.at(XS[1])
    calls = len(rows)
    theta = posterior.sample_batched((3000,), XS, show_progress_bars=False)
    others = len(rows) - calls
    fresh = RefittingPosterior(original, seed=1)
    fresh.sample_batched((3000,), XS, show_progress_bars=False)
    assert len(rows) - calls - others < 1.3 * others  # three take hardly more calls than two
    assert ((theta.mean(0) - XS) / SD).abs().max() < 0.1 and (theta.std(0) / SD - 1).abs().max() < 0.1
    assert posterior.at(XS[1]) is known and posterior.at(XS[0]) is not posterior.at(XS[2])


def test_what_fails_in_a_batch_raises_as_it_does_alone() -> None:
    def nowhere(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where((x == XS[2]).all(-1), -torch.inf, log_p(theta, x))

    with pytest.raises(ValueError, match="finite values at draws of the prior"):
        RefittingPosterior(VIPosterior(nowhere, real(), q="auto"), seed=1).sample_batched(
            (3,), XS, show_progress_bars=False
        )


@pytest.mark.parametrize("trained", [False, True])
def test_the_original_is_left_alone(trained: bool) -> None:
    original = fitted(made(prior=real())) if trained else made(prior=real())
    before = weights(original)
    RefittingPosterior(original, **GOOD).at(XS[2])
    assert torch.equal(weights(original), before)
    if trained:
        assert torch.equal(original.default_x, X) and original.sample().shape == (2,)


def test_starts_from_given_weights_if_asked() -> None:
    original = made(prior=real()).train(X, **GOOD, show_progress_bar=False)
    still = dict(learning_rate=1e-12, max_num_iters=1, seed=1)
    kept = RefittingPosterior(original, **still, retrain_from_scratch=False).at(XS[0])
    torch.testing.assert_close(weights(kept), weights(original))
    fresh = RefittingPosterior(original, **still).at(XS[0])
    assert (weights(fresh) - weights(original)).abs().max() > 0.01


def test_a_copy_in_another_process_fits_alike() -> None:
    posterior = refitting(max_num_iters=5)
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(weights(again.at(XS[0])), weights(posterior.at(XS[0])))


def test_divergence_and_family_are_the_originals() -> None:
    original = made(prior=real(), q="gaussian_diag", vi_method="fKL")
    fit = RefittingPosterior(original, max_num_iters=1).at(X)
    assert fit.vi_method == "fKL" and type(fit.q.body) is type(original.q.body)
    assert fit.potential_fn is original.potential_fn  # nothing large is copied


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(n_partcles=8), TypeError, "n_particles"),
        (dict(learning_rate=-1.0), ValueError, "`learning_rate`"),
    ],
)
def test_bad_options_show_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RefittingPosterior(made(), **options)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="`posterior`: expected a VIPosterior"):
        RefittingPosterior(lambda theta, x: theta)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`x`: expected an observation"):
        refitting().sample((3,))
    with pytest.raises(ValueError, match="`x`: expected finite numbers"):
        refitting().sample((3,), XS * torch.nan)
    with pytest.raises(ValueError, match="`x`: expected at least one observation"):
        refitting().sample_batched((3,), XS[:0])


def test_errors_of_a_single_fit_name_it() -> None:
    posterior = fitted(made(prior=real()))
    with pytest.raises(NotImplementedError, match="RefittingPosterior"):
        posterior.sample_batched((3,), XS)
    with pytest.raises(ValueError, match="RefittingPosterior"):
        posterior.sample((3,), XS[:1])
