"""With q="auto" the observations of a chunk are fitted in common calls; what that does not answer, alone."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from many_cases import X, many
from posterior_cases import SD, alone_and_seeded, box, log_p, real
from visbi import VIPosterior
from visbi.fitting import together
from visbi.fitting.config import TrainOptions
from visbi.fitting.together import fit_auto_together
from visbi.priors import coordinates

__all__ = ["alone_and_seeded"]


def joint(theta: Tensor, x: Tensor) -> Tensor:
    return log_p(theta, x) + real().log_prob(theta)


class Calls:
    """`joint`, and how many rows every call brought."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        self.rows.append(len(theta))
        return joint(theta, x)


def test_calls_are_common() -> None:
    few, all_ = Calls(), Calls()
    many(X[:2], "auto", few, chunk_size=2)
    many(torch.cat([X, X + 0.1, X - 0.1, X[:1]]), "auto", all_, chunk_size=16)
    assert len(all_.rows) < 2 * len(few.rows)
    assert sum(all_.rows) > 5 * sum(few.rows)


def test_what_is_not_answered_is_fitted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    side = many(X[:3], "auto", joint, chunk_size=3)
    monkeypatch.setattr(together, "_FEW", 2.0)
    alone = many(X[:3], "auto", joint, chunk_size=3)
    for i, posterior in enumerate(alone):
        seed = posterior.report.seed
        one = VIPosterior(joint, real(), q="auto").train(X[i : i + 1], seed=seed, show_progress_bar=False)
        assert one.report.n_values == posterior.report.n_values > 2 * side.reports[i].n_values
        assert one.report.modes == posterior.report.modes != () and one.report.khat == posterior.report.khat


def test_an_observation_that_raises_costs_only_itself() -> None:
    def picky(theta: Tensor, x: Tensor) -> Tensor:
        if bool((x == X[1]).all(-1).any()):
            raise ArithmeticError("not this one")
        return joint(theta, x)

    posteriors = many(X[:3], "auto", picky, chunk_size=3)
    assert [record.has_fit for record in posteriors.records] == [True, False, True]
    assert "not this one" in posteriors.reports[1].sentence


def test_a_potential_in_numpy_has_no_gradient_and_needs_none() -> None:
    rows: list[int] = []

    def in_numpy(theta: Tensor, x: Tensor) -> Tensor:
        rows.append(len(theta))
        gap = (theta.numpy() - x.numpy()) / SD
        return torch.as_tensor(-0.5 * (gap**2).sum(-1)) + real().log_prob(theta)

    posteriors = many(X[:3], "auto", in_numpy, chunk_size=3)
    assert all("no useful gradient" in report.story[0] for report in posteriors.reports)
    assert all(report.n_gradients < 1000 for report in posteriors.reports) and len(rows) < 200
    assert (posteriors.sample((2000,)).mean(0) - X[:3] * 16 / 17).abs().max() < 0.06


def test_an_observation_without_mass_fails_alone() -> None:
    """A potential that is finite nowhere for one x, and right for its neighbours."""

    def nowhere(theta: Tensor, x: Tensor) -> Tensor:
        return torch.where((x == X[1]).all(-1), -torch.inf, joint(theta, x))

    posteriors = many(X[:3], "auto", nowhere, chunk_size=3)
    assert posteriors.failed.tolist() == [1]
    assert (posteriors.sample((2000,)).mean(0)[[0, 2]] - X[[0, 2]] * 16 / 17).abs().max() < 0.06


def test_two_modes_for_each() -> None:
    def two(theta: Tensor, x: Tensor) -> Tensor:
        sides = [Independent(Normal(x + shift, 0.3), 1).log_prob(theta) for shift in (-1.2, 1.2)]
        return torch.logaddexp(sides[0] + 1.0986, sides[1])  # three to one

    posteriors = many(X[[0, 1, 3]] / 2, "auto", two, prior=box(), chunk_size=3)
    theta = posteriors.sample((4000,)) - X[[0, 1, 3]] / 2
    assert ((theta[..., 0] < 0).double().mean(0) - 0.75).abs().max() < 0.04
    assert [report.status in ("ok", "corrected") for report in posteriors.reports] == [True] * 3
    # both sides integrate to 1 + 3
    evidence = torch.tensor([report.log_evidence for report in posteriors.reports])
    assert (evidence - torch.log(torch.tensor(4.0))).abs().max() < 0.05


def test_draws_near_the_posterior_as_a_start() -> None:
    coords = coordinates(real())
    calls = Calls()

    def log_density(theta: Tensor, which: Tensor) -> Tensor:
        rows = X[which].repeat_interleave(theta.shape[1], 0)
        return calls(theta.flatten(0, 1), rows).reshape(theta.shape[:2])

    options = TrainOptions(init=SD * torch.randn(200, 2), seed=1)
    fits = fit_auto_together(log_density, coords, list(X.split(1)), options)
    assert all(fit is not None and fit.report.status in ("ok", "corrected") for fit in fits)
    with pytest.raises(ValueError, match=r"`init`: expected draws of shape \(N, 2\)"):
        fit_auto_together(log_density, coords, list(X), TrainOptions(init=torch.randn(9, 3)))


def test_budgets_are_those_of_each_fit() -> None:
    posteriors = many(X, "auto", joint, chunk_size=5, max_potential_evals=5000)
    assert all(report.n_values + report.n_gradients <= 5000 for report in posteriors.reports)
    assert all("max_potential_evals" in report.stop_reason for report in posteriors.reports)
