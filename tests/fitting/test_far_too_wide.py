"""Priors a thousand times as wide as the posterior, as users write them who wish to say nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, HalfCauchy, Normal, Uniform

from visbi import VIPosterior, fit_many
from visbi.certificate.report import GOOD, Report
from visbi.priors import MultipleIndependent


def alone(kind: type[Distribution], *numbers: float) -> Distribution:
    return kind(*(torch.tensor([number]) for number in numbers))  # type: ignore[call-arg]


def report_of(log_likelihood: Callable[[Tensor], Tensor], prior: Distribution, seed: int) -> Report:
    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return (prior.log_prob(theta).double() + log_likelihood(theta.double())).to(theta)

    posterior = VIPosterior(potential, prior, q="auto")
    return posterior.train(torch.zeros(1, 1), seed=seed, show_progress_bar=False).report


def two_groups(n: int) -> Tensor:
    """(n, 150): 50 numbers around 1.5, 100 around 4.9."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return torch.stack(
            [torch.cat([1.5 + 0.2 * torch.randn(50), 4.9 + 0.8 * torch.randn(100)]) for _ in range(n)]
        )


def log_mixture(theta: Tensor, y: Tensor) -> Tensor:
    """log p(y | share, means, sds) of two normal groups, whose labels mean nothing."""
    share, one, other, wide, narrow = theta.double()[..., None].unbind(-2)
    parts = [
        share.log() - narrow.log() - 0.5 * ((y - one) / narrow).square(),
        (1 - share).log() - wide.log() - 0.5 * ((y - other) / wide).square(),
    ]
    return torch.logaddexp(*parts).sum(-1)


def groups_prior() -> Distribution:
    means = [alone(Normal, 0.0, 100.0) for _ in range(2)]
    sds = [alone(HalfCauchy, 10.0) for _ in range(2)]
    return MultipleIndependent([alone(Uniform, 0.0, 1.0), *means, *sds])


@pytest.mark.parametrize("seed", [1, 2])
def test_both_labels_of_two_groups_are_found(seed: int) -> None:
    """All particles end in one of the two equal modes; with seed 1 that was "ok" before."""
    y = two_groups(1)[0].double()
    report = report_of(lambda theta: log_mixture(theta, y), groups_prior(), seed)
    assert report.status in GOOD and len(report.modes) == 2
    assert [mode.weight for mode in report.modes] == pytest.approx([0.5, 0.5], abs=0.03)


def test_both_labels_side_by_side() -> None:
    """Two of six were answered by one label before, and the others took seven times as many evaluations."""
    prior = groups_prior()

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        return (prior.log_prob(theta).double() + log_mixture(theta, x.double())).to(theta)

    posteriors = fit_many(potential, prior, two_groups(6), seed=1, show_progress_bar=False)
    assert all(report.status in GOOD for report in posteriors.reports)
    assert max(report.n_values + report.n_gradients for report in posteriors.reports) < 50_000
    theta = posteriors.sample((4000,))
    assert (theta[..., 1] < theta[..., 2]).double().mean(0).tolist() == pytest.approx([0.5] * 6, abs=0.04)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_regression_on_raw_predictors_is_cheap(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = torch.tensor([900.0, 20.0, 0.1]) * (1 + 0.3 * torch.randn(200, 3))
    x = torch.cat([torch.ones(200, 1), x], 1).double()
    share = torch.sigmoid(x @ torch.tensor([-2.0, 0.004, -0.15, 20.0]).double())
    y = (share > torch.linspace(0.02, 0.98, 200)).double()

    def log_likelihood(theta: Tensor) -> Tensor:
        logit = theta @ x.T
        return (y * logit - torch.nn.functional.softplus(logit)).sum(-1)

    report = report_of(
        log_likelihood, MultipleIndependent([alone(Normal, 0.0, 1000.0) for _ in range(4)]), seed
    )
    assert report.status in GOOD
    assert report.n_gradients < 100_000  # 120,000 and more when particles had to come all the way
