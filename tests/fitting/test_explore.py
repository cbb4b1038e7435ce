"""The explorer finds where the mass is, all of it."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.fitting.explore import explore
from visbi.fitting.target import Target, log_standard_normal
from visbi.priors import BoxUniform, coordinates

CENTRES = torch.tensor([[-6.0, -6.0], [-5.0, 6.0], [6.0, 5.0], [3.0, -7.0]], dtype=torch.float64)
MASSES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
BOX = BoxUniform(-10 * torch.ones(2).double(), 10 * torch.ones(2).double())
LOG_EVIDENCE = 1.7


def four_modes(theta):
    """log of prior times likelihood; its integral over the box is exp(LOG_EVIDENCE)."""
    each = -0.5 * ((theta[:, None] - CENTRES) / 0.5).square().sum(-1) - math.log(2 * math.pi * 0.25)
    return torch.logsumexp(each + MASSES.log(), 1) + LOG_EVIDENCE


def standard(dim):
    return MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())


def explored(log_p, prior, n=1024):
    target = Target(log_p, coordinates(prior))
    return explore(target, n), target


def test_four_modes_with_their_masses_and_evidence():
    masses, evidence = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        found, target = explored(four_modes, BOX)
        theta = coordinates(BOX).to_theta(found.z)[0]
        nearest = torch.cdist(theta, CENTRES)
        assert float((nearest.min(1).values < 2.5).double().mean()) > 0.98
        masses.append(torch.bincount(nearest.argmin(1), minlength=4) / 1024)
        evidence.append(found.log_evidence)
        assert 0.4 < found.acceptance <= 1
        assert target.n_nonfinite == 0 and target.n_values == 0
    shares = torch.stack(masses).double()
    assert bool((shares > 0.02).all())
    torch.testing.assert_close(shares.mean(0), MASSES, atol=0.06, rtol=0)
    errors = torch.tensor(evidence) - LOG_EVIDENCE
    assert float(errors.abs().max()) < 0.5 and abs(float(errors.mean())) < 0.2


def test_what_is_kept():
    torch.manual_seed(0)
    found, target = explored(four_modes, BOX, 200)
    steps = len(found.betas)
    assert found.z.shape == (200, 2) and found.relative.shape == (200,)
    assert found.history_z.shape == (steps, 200, 2) and found.history_relative.shape == (steps, 200)
    assert found.betas[0] == 0 and found.betas[-1] == 1 and bool((found.betas.diff() > 0).all())
    assert torch.equal(found.history_z[-1], found.z)
    assert torch.equal(found.history_relative[-1], found.relative)
    flat = found.history_z.reshape(-1, 2)
    expected = target.value(flat) - log_standard_normal(flat)
    torch.testing.assert_close(found.history_relative.reshape(-1), expected)
    prior = found.history_z[0]
    assert float(prior.mean().abs()) < 0.2 and abs(float(prior.std()) - 1) < 0.15


def test_each_temperature_leaves_half_the_particles_worth():
    torch.manual_seed(0)
    found, _ = explored(four_modes, BOX, 400)
    steps = zip(found.betas.diff(), found.history_relative[:-1], strict=True)
    shares = [float(torch.softmax(b * r, 0).square().sum().reciprocal()) / 400 for b, r in steps]
    assert all(share == pytest.approx(0.5, abs=1e-3) for share in shares[:-1]) and shares[-1] >= 0.5 - 1e-3


@pytest.mark.parametrize("dim", [1, 10])
def test_a_gaussian_is_met_in_its_moments(dim):
    torch.manual_seed(1)
    loc = torch.linspace(-2, 2, dim, dtype=torch.float64) + 1
    exact = MultivariateNormal(loc, (0.01 * torch.eye(dim) + 0.03).double())
    found, _ = explored(exact.log_prob, standard(dim))
    mean, cov = found.moments()
    sd = exact.variance.sqrt()
    assert mean.shape == (dim,) and cov.shape == (dim, dim)
    torch.testing.assert_close(mean, loc, atol=0.25 * float(sd[0]), rtol=0)
    torch.testing.assert_close(cov, exact.covariance_matrix, atol=0.3 * float(sd[0]) ** 2, rtol=0)
    assert abs(found.log_evidence) < (0.3 if dim == 1 else 1.0)


def test_the_prior_itself_takes_one_step():
    found, _ = explored(standard(3).log_prob, standard(3), 256)
    assert found.betas.tolist() == [0.0, 1.0]
    assert found.log_evidence == pytest.approx(0.0, abs=1e-9)
    assert not torch.equal(found.z, found.history_z[0])


def test_shift_of_the_potential_only_shifts_the_evidence():
    torch.manual_seed(0)
    plain, _ = explored(four_modes, BOX, 128)
    torch.manual_seed(0)
    shifted, _ = explored(lambda theta: four_modes(theta) + 1e4, BOX, 128)
    torch.testing.assert_close(shifted.z, plain.z, rtol=1e-6, atol=1e-6)
    assert shifted.log_evidence == pytest.approx(plain.log_evidence + 1e4, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_regions_where_the_potential_is_not_finite(bad):
    """Most of the prior's mass is excluded; the truth is the rest of it."""

    def log_p(theta):
        return torch.where(theta[:, 0] > 0.8, standard(2).log_prob(theta), bad)

    torch.manual_seed(0)
    found, target = explored(log_p, standard(2), 512)
    assert target.n_nonfinite > 0 and bool((found.z[:, 0] > 0.8).all())
    inside = 0.5 * math.erfc(0.8 / math.sqrt(2))
    assert found.log_evidence == pytest.approx(math.log(inside), abs=0.25)
    mean = math.exp(-0.32) / math.sqrt(2 * math.pi) / inside
    assert float(found.z[:, 0].mean()) == pytest.approx(mean, abs=0.1)


def test_few_particles_are_enough_to_run():
    found, _ = explored(four_modes, BOX, 8)
    assert found.z.shape == (8, 2) and math.isfinite(found.log_evidence)


def test_a_potential_that_is_nowhere_finite_ends():
    found, target = explored(lambda theta: theta[:, 0] * math.nan, standard(2), 32)
    assert found.betas.tolist() == [0.0, 1.0] and bool(found.z.isfinite().all())
    assert target.n_nonfinite == target.n_gradients
