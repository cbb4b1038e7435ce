"""What fits cost: no more than 300,000 evaluations in ten dimensions, with gradient and without together."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, HalfCauchy, Independent, Normal

from visbi import VIPosterior
from visbi.certificate.report import GOOD
from visbi.priors import MultipleIndependent

MOST = 300_000


def kinks() -> tuple[Distribution, object]:
    """Double exponentials whose scales run from .01 to 10, under a prior of 50."""
    scales = torch.logspace(-2, 1, 10).double()

    def log_p(theta: Tensor) -> Tensor:
        return -(theta.abs() / scales).sum(-1)

    return Independent(Normal(torch.zeros(10), 50.0), 1), log_p


def raw_regression() -> tuple[Distribution, object]:
    """A logistic regression on predictors of scales from .1 to 3000, coefficients N(0, 1000^2)."""
    scales = torch.tensor([900.0, 20.0, 0.1, 120.0, 70.0, 30.0, 0.5, 5.0, 3000.0]).double()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = scales * (1 + 0.3 * torch.randn(200, 9).double())
        coefficients = 1.2 * torch.randn(9).double() / (0.3 * scales)
        y = (torch.sigmoid((x - x.mean(0)) @ coefficients) > torch.rand(200).double()).double()
    x = torch.cat([torch.ones(200, 1).double(), x], 1)

    def log_p(theta: Tensor) -> Tensor:
        logit = theta @ x.T
        likelihood = (y * logit - torch.nn.functional.softplus(logit)).sum(-1)
        return likelihood - 0.5 * (theta / 1000).square().sum(-1)

    return Independent(Normal(torch.zeros(10), 1000.0), 1), log_p


def horseshoe() -> tuple[Distribution, object]:
    """y = X b + noise with b_j = z_j l_j t: z normal; local l_j, global t and the noise's sd half-Cauchy."""
    with torch.random.fork_rng():
        torch.manual_seed(100)
        x = torch.randn(40, 4).double()
        y = 2.0 * x[:, 0] + torch.randn(40).double()
    one = [Normal(torch.zeros(1), 1.0) for _ in range(4)]
    half = [HalfCauchy(torch.tensor([scale])) for scale in (1.0, 1.0, 1.0, 1.0, 1.0, 5.0)]
    prior = MultipleIndependent([*one, *half])

    def log_p(theta: Tensor) -> Tensor:
        z, local, whole, sd = theta[:, :4], theta[:, 4:8], theta[:, 8:9], theta[:, 9]
        away = y - (z * local * whole) @ x.T
        likelihood = -0.5 * away.square().sum(-1) / sd.square() - 40 * sd.log()
        return prior.log_prob(theta.float()).double() + likelihood

    return prior, log_p


@pytest.mark.parametrize("problem", [kinks, raw_regression, horseshoe])
def test_ten_dimensions(problem) -> None:
    prior, log_p = problem()

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return log_p(theta.double()).to(theta)

    report = (
        VIPosterior(potential, prior, q="auto")
        .train(torch.zeros(1, 1), seed=0, show_progress_bar=False)
        .report
    )
    assert report.status in GOOD
    assert report.n_values + report.n_gradients <= MOST
