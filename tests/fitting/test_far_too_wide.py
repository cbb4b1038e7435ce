"""Priors a thousand times as wide as the posterior, as users write them who wish to say nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, HalfCauchy, Normal, Uniform

from visbi import VIPosterior
from visbi.certificate.report import Report
from visbi.priors import MultipleIndependent


def alone(kind: type[Distribution], *numbers: float) -> Distribution:
    return kind(*(torch.tensor([number]) for number in numbers))  # type: ignore[call-arg]


def report_of(log_likelihood: Callable[[Tensor], Tensor], prior: Distribution, seed: int) -> Report:
    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return (prior.log_prob(theta).double() + log_likelihood(theta.double())).to(theta)

    posterior = VIPosterior(potential, prior, q="auto")
    return posterior.train(torch.zeros(1, 1), seed=seed, show_progress_bar=False).report


@pytest.mark.parametrize("seed", [1, 2])
def test_both_labels_of_two_groups_are_found(seed: int) -> None:
    """All particles end in one of the two equal modes; with seed 1 that was "ok" before."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        y = torch.cat([1.5 + 0.2 * torch.randn(50), 4.9 + 0.8 * torch.randn(100)]).double()

    def log_likelihood(theta: Tensor) -> Tensor:
        share, one, other, wide, narrow = theta[..., None].unbind(-2)
        parts = [
            share.log() - narrow.log() - 0.5 * ((y - one) / narrow).square(),
            (1 - share).log() - wide.log() - 0.5 * ((y - other) / wide).square(),
        ]
        return torch.logaddexp(*parts).sum(-1)

    means = [alone(Normal, 0.0, 100.0) for _ in range(2)]
    sds = [alone(HalfCauchy, 10.0) for _ in range(2)]
    report = report_of(log_likelihood, MultipleIndependent([alone(Uniform, 0.0, 1.0), *means, *sds]), seed)
    assert report.status in ("ok", "corrected") and len(report.modes) == 2
    assert [mode.weight for mode in report.modes] == pytest.approx([0.5, 0.5], abs=0.03)


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
    assert report.status in ("ok", "corrected")
    assert report.n_gradients < 100_000  # 120,000 and more when particles had to come all the way
