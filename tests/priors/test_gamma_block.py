"""Coordinates of gamma priors and inverse gamma ones, vague ones included."""

import math

import pytest
import torch
from scipy import special
from torch.distributions import Distribution, Gamma, Independent, InverseGamma

from visbi import VIPosterior
from visbi.fitting.target import Target, log_standard_normal
from visbi.priors import coordinates
from visbi.priors.blocks import GammaBlock


def prior_of(kind: type, shape: float, dtype: torch.dtype = torch.float64) -> Distribution:
    return Independent(
        kind(torch.tensor([shape, shape], dtype=dtype), torch.tensor([0.5, 3.0], dtype=dtype)), 1
    )


@pytest.mark.parametrize("shape", [1e-3, 0.3, 1.0, 40.0, 1e5])
def test_nodes_are_quantiles(shape):
    block = GammaBlock(torch.tensor([shape], dtype=torch.float64), torch.tensor([2.0]).double())
    z = torch.tensor([-1.0, 2.0, 2.5]).double()[:, None]  # of a shape of .001, from e^-1845 to e^.5
    log_theta = block.to_theta(z)[0].log().clamp_min(math.log(torch.finfo(torch.float64).tiny))
    exact = special.gammaincinv(shape, special.ndtr(z.numpy())) / 2
    for got, expected in zip(log_theta.flatten().tolist(), exact.flatten().tolist(), strict=True):
        assert expected < 1e-300 or got == pytest.approx(math.log(expected), abs=1e-9 * (1 + 1 / shape))


@pytest.mark.parametrize("kind", [Gamma, InverseGamma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [1e-3, 0.3, 40.0])
def test_the_prior_is_standard_normal_also_where_it_is_too_small_or_large_for_numbers(kind, dtype, shape):
    prior = prior_of(kind, shape, dtype)
    z = torch.linspace(-9, 9, 37).double()[:, None].expand(-1, 2)  # beyond the spline's ends, too
    target = Target(lambda theta: prior.log_prob(theta), coordinates(prior))
    rough = 1e-6 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(target.value(z[None])[0], log_standard_normal(z), rtol=rough, atol=rough)
    assert bool(target.value_and_gradient(z[None])[1].isfinite().all())


@pytest.mark.parametrize("kind", [Gamma, InverseGamma])
def test_there_and_back(kind):
    coords = coordinates(prior_of(kind, 2.0))
    z = 12 * torch.rand(200, 2).double() - 6
    theta, ladj = coords.to_theta(z)
    back, again = coords.to_z(theta)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, ladj, rtol=1e-9, atol=1e-9)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(coords.to_theta(z)[0].log().sum(), z)
    torch.testing.assert_close(slope.log().sum(-1) + theta.log().sum(-1), ladj, rtol=1e-9, atol=1e-9)


def test_a_count_under_a_vague_gamma() -> None:
    """Conjugate: Gamma(.001, .001) and counts 7, 9, 4."""
    counts, shape = torch.tensor([7.0, 9.0, 4.0]).double(), 1e-3
    prior = Independent(Gamma(torch.tensor([shape]), torch.tensor([shape])), 1)

    def potential(theta: torch.Tensor, x_o: torch.Tensor) -> torch.Tensor:
        rate = theta.double()
        log_p = (counts * rate.log() - rate - torch.lgamma(counts + 1)).sum(-1)
        return log_p + prior.log_prob(theta).double()

    report = (
        VIPosterior(potential, prior, q="auto")
        .train(torch.zeros(1, 1), seed=0, show_progress_bar=False)
        .report
    )
    total = float(counts.sum())
    exact = shape * math.log(shape) - math.lgamma(shape) + math.lgamma(total + shape)
    exact -= (total + shape) * math.log(3 + shape) + float(torch.lgamma(counts + 1).sum())
    assert report.status == "ok" and report.n_values + report.n_gradients < 150_000
    assert report.log_evidence == pytest.approx(exact, abs=0.02)
