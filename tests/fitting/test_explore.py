"""The explorer finds where the mass is, all of it."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from mixture_cases import known, of_mixture
from visbi.fitting.explore import Exploration, explore, next_beta
from visbi.fitting.moves import StandardNormal
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
    for seed in range(8):
        torch.manual_seed(seed)
        found, target = explored(four_modes, BOX)
        theta = coordinates(BOX).to_theta(found.z[0])[0]
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
    assert found.z.shape == (1, 200, 2) and found.relative.shape == found.ell.shape == (1, 200)
    assert found.history_z.shape == (steps, 1, 200, 2) and found.history_relative.shape == (steps, 1, 200)
    assert found.betas.shape == found.log_evidences.shape == (steps, 1)
    assert found.betas[0] == 0 and found.betas[-1] == 1 and bool((found.betas.diff(dim=0) > 0).all())
    assert found.log_evidences[0] == 0 and torch.equal(found.log_evidences[-1], found.log_evidence)
    torch.testing.assert_close(found.ell, target.value(found.z))
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
    steps = zip(found.betas[:, 0].diff(), found.history_relative[:-1, 0], strict=True)
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
    assert mean.shape == (1, dim) and cov.shape == (1, dim, dim)
    torch.testing.assert_close(mean[0], loc, atol=0.25 * float(sd[0]), rtol=0)
    torch.testing.assert_close(cov[0], exact.covariance_matrix, atol=0.3 * float(sd[0]) ** 2, rtol=0)
    assert abs(found.log_evidence) < (0.3 if dim == 1 else 1.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.999])
def test_a_step_of_any_length_leaves_half_the_weights(scale, beta):
    relative, before = -scale * torch.randn(2, 4000).double().square(), torch.full((2,), beta).double()
    after = next_beta(relative, before)
    worth = 1 / ((after - before)[:, None] * relative).softmax(1).square().sum(1) / 4000
    assert bool((torch.where(after == 1, worth >= 0.5, (worth - 0.5).abs() < 0.01)).all())
    assert bool((before < after).all()) and (scale > 1e-3 or after.tolist() == [1.0, 1.0])


def test_the_prior_itself_takes_one_step():
    found, _ = explored(standard(3).log_prob, standard(3), 256)
    assert found.betas.tolist() == [[0.0], [1.0]]
    assert float(found.log_evidence) == pytest.approx(0.0, abs=1e-9)
    assert not torch.equal(found.z, found.history_z[0])


def test_shift_of_the_potential_only_shifts_the_evidence():
    torch.manual_seed(0)
    plain, _ = explored(four_modes, BOX, 128)
    torch.manual_seed(0)
    shifted, _ = explored(lambda theta: four_modes(theta) + 1e4, BOX, 128)
    torch.testing.assert_close(shifted.z, plain.z, rtol=1e-6, atol=1e-6)
    assert float(shifted.log_evidence) == pytest.approx(float(plain.log_evidence) + 1e4, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_regions_where_the_potential_is_not_finite(bad):
    """Most of the prior's mass is excluded; the truth is the rest of it."""

    def log_p(theta):
        return torch.where(theta[:, 0] > 0.8, standard(2).log_prob(theta), bad)

    torch.manual_seed(0)
    found, target = explored(log_p, standard(2), 512)
    assert target.n_nonfinite > 0 and bool((found.z[..., 0] > 0.8).all())
    inside = 0.5 * math.erfc(0.8 / math.sqrt(2))
    assert float(found.log_evidence) == pytest.approx(math.log(inside), abs=0.25)
    mean = math.exp(-0.32) / math.sqrt(2 * math.pi) / inside
    assert float(found.z[..., 0].mean()) == pytest.approx(mean, abs=0.1)


def test_few_particles_are_enough_to_run():
    found, _ = explored(four_modes, BOX, 8)
    assert found.z.shape == (1, 8, 2) and math.isfinite(found.log_evidence)


def test_a_potential_that_is_nowhere_finite_ends():
    found, target = explored(lambda theta: theta[:, 0] * math.nan, standard(2), 32)
    assert found.betas.tolist() == [[0.0], [1.0]] and bool(found.z.isfinite().all())
    assert target.n_nonfinite == target.n_gradients


# -- several populations, bases, weights, and moves without gradient --------------------------------------


class Given:
    """A mixture of Gaussians as the base."""

    def __init__(self, q):
        self.q = q

    def sample(self, fits, n, like):
        return self.q.sample(fits * n).reshape(fits, n, -1)

    def log_prob_and_score(self, z):
        log_q, score = self.q.log_prob_and_score(z.reshape(1, -1, z.shape[-1]))
        return log_q.reshape(z.shape[:-1]), score.reshape(z.shape)


def weighted_moments(found):
    z, log_w = found.weighted()
    w = log_w.softmax(1)[..., None]
    mean = (w * z).sum(1)
    return mean, (w * (z - mean[:, None]).square()).sum(1)


NARROW = known([1.0], [[1.0, -0.5]], 0.2)


def test_populations_agree_with_single_ones():
    together = explore(of_mixture(NARROW, 2.0), 256, fits=16)
    single = [explore(of_mixture(NARROW, 2.0), 256) for _ in range(16)]
    assert together.z.shape == (16, 256, 2) and together.log_evidence.shape == (16,)
    assert together.acceptance.shape == (16,)
    for evidences in (together.log_evidence, torch.cat([found.log_evidence for found in single])):
        # the estimate is unbiased on the scale of Z; one of them has an error of about .15
        assert float((evidences - 2.0).exp().mean()) == pytest.approx(1.0, abs=0.2)
        assert 0.03 < float(evidences.std()) < 0.5
    for z in (together.z, torch.cat([found.z for found in single])):
        torch.testing.assert_close(z.mean((0, 1)), NARROW.loc[0, 0], atol=0.02, rtol=0)
        torch.testing.assert_close(z.flatten(0, 1).std(0), torch.full((2,), 0.2).double(), atol=0.02, rtol=0)
    between = together.z.mean(1).std(0)  # populations know nothing of each other
    assert bool((between > 0.2 / 16 / 3).all() and (between < 0.2 / 16 * 5).all())


def test_each_population_has_its_own_temperatures():
    """One starts at the posterior, the other far from it."""
    exact = of_mixture(NARROW)

    class Two(StandardNormal):
        def sample(self, fits, n, like):
            near = NARROW.sample(n)
            return torch.cat([near, 1.0 + 0 * near + torch.randn(1, n, 2, dtype=torch.float64)])

        def log_prob_and_score(self, z):
            near, far = NARROW.log_prob_and_score(z[:1]), known([1.0], [[1.0, 1.0]], 1.0)
            far = far.log_prob_and_score(z[1:])
            return torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]])

    found = explore(exact, 512, fits=2, base=Two(2))
    assert found.betas[1, 0] == 1 and found.betas[1, 1] < 1
    assert bool((found.betas[1:, 0] == 1).all()) and bool((found.betas[-1] == 1).all())
    assert bool((found.betas.diff(dim=0) >= 0).all()) and len(found.betas) > 3
    torch.testing.assert_close(found.log_evidence, torch.zeros(2).double(), atol=0.35, rtol=0)
    assert abs(float(found.log_evidence[0])) < 1e-9
    torch.testing.assert_close(found.z.mean(1), NARROW.loc[0].expand(2, -1), atol=0.05, rtol=0)
    mean, variance = weighted_moments(found)
    torch.testing.assert_close(mean, NARROW.loc[0].expand(2, -1), atol=0.04, rtol=0)
    torch.testing.assert_close(variance, torch.full((2, 2), 0.04).double(), atol=0.01, rtol=0)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "q",
    [
        known([1.0], [[1.0, -0.5, 0.0]], 0.3),
        known([0.5, 0.5], [[1.5, 0.0, 0.0], [-1.5, 0.0, 0.0]], 0.4),
    ],
    ids=["one mode", "two modes"],
)
def test_weighted_particles_have_the_moments_of_the_posterior(q, gradient):
    found = explore(of_mixture(q, 1.0), 512, fits=6, gradient=gradient)
    z, log_w = found.weighted()
    assert z.shape == (6, 512 * len(found.betas), 3) and log_w.shape == z.shape[:2]
    mean, variance = weighted_moments(found)
    exact = q.sample(200_000)[0]
    torch.testing.assert_close(mean.mean(0), exact.mean(0), atol=0.1, rtol=0)
    second = variance + mean.square()  # two modes' masses wander; the second moment does not
    torch.testing.assert_close(second.mean(0), exact.square().mean(0), atol=0.03, rtol=0.05)
    evidence = torch.logsumexp(log_w, 1) - math.log(z.shape[1])
    torch.testing.assert_close(evidence, found.log_evidence, atol=0.2, rtol=0)
    assert float((evidence - 1.0).exp().mean()) == pytest.approx(1.0, abs=0.25)


def test_weights_are_one_where_the_path_is_short():
    found = explore(of_mixture(known([1.0], [[0.0, 0.0]], 1.0), 3.0), 64)
    torch.testing.assert_close(found.weighted()[1], torch.full((1, 128), 3.0).double())


def test_draws_of_the_prior_can_stand_for_particles():
    q = known([0.7, 0.3], [[1.0, 0.0], [-1.0, 0.0]], 0.3)
    target = of_mixture(q, 1.0)
    z = torch.randn(1, 40_000, 2).double()
    ell = torch.where(z[..., 1] < 9.0, target.value(z), -torch.inf)
    found = Exploration.of_draws(z, ell - log_standard_normal(z), 500)
    assert target.n_gradients == 0 and found.step is None and found.betas.tolist() == [[0.0]]
    torch.testing.assert_close(target.value(found.z), found.ell)
    assert float((found.z[..., 0] > 0).double().mean()) == pytest.approx(0.7, abs=0.03)
    mean, variance = weighted_moments(found)
    torch.testing.assert_close(mean, torch.tensor([[0.4, 0.0]]).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(variance, torch.tensor([[0.93, 0.09]]).double(), atol=0.03, rtol=0)
    assert float(found.log_evidence) == pytest.approx(1.0, abs=0.05)
    assert found.of_fits(torch.tensor([True])).step is None


def test_a_likelihood_in_steps_is_walked():
    """floor(3 z) has no gradient; under z ~ N(0, 1) the evidence is a sum."""

    def log_p(theta):
        return standard(1).log_prob(theta) + (3 * theta[:, 0]).floor().clamp(-30, 30)

    found = explore(Target(log_p, coordinates(standard(1))), 512, fits=8, gradient=False)
    edges = torch.arange(-30, 32, dtype=torch.float64) / 3
    mass = torch.special.ndtr(edges).diff()
    steps = torch.arange(-30, 31, dtype=torch.float64)
    exact = torch.logsumexp(steps + mass.log(), 0)
    assert float((found.log_evidence - exact).exp().mean()) == pytest.approx(1.0, abs=0.15)
    shares = torch.softmax(steps + mass.log(), 0)
    step = (3 * found.z[..., 0]).floor()
    torch.testing.assert_close(step.mean(), (shares * steps).sum(), atol=0.2, rtol=0)


def test_without_gradient_none_is_asked_for():
    target = of_mixture(NARROW)
    explore(target, 64, gradient=False)
    assert target.n_gradients == 0 and target.n_values > 0


def test_a_bridge_leaves_an_exact_q_as_it_is():
    q = known([0.7, 0.3], [[1.5, 0.0], [-1.5, 0.5]], 0.4)
    found = explore(of_mixture(q, 1.3), 4096, base=Given(q))
    assert found.betas.tolist() == [[0.0], [1.0]]
    assert float(found.log_evidence) == pytest.approx(1.3, abs=1e-9)
    torch.testing.assert_close(found.relative, torch.full((1, 4096), 1.3).double())
    share = float((found.z[..., 0] > 0).double().mean())
    assert share == pytest.approx(0.7, abs=0.03)
    right = found.z[found.z[..., 0] > 0]
    torch.testing.assert_close(right.mean(0), torch.tensor([1.5, 0.0]).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(right.std(0), torch.full((2,), 0.4).double(), atol=0.03, rtol=0)


def test_a_bridge_from_a_q_that_is_off():
    q = known([1.0], [[0.6, -0.5]], 0.4)
    found = explore(of_mixture(NARROW, 1.0), 2048, base=Given(q))
    assert float(found.log_evidence) == pytest.approx(1.0, abs=0.15)
    torch.testing.assert_close(found.z[0].mean(0), NARROW.loc[0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(found.z[0].std(0), torch.full((2,), 0.2).double(), atol=0.02, rtol=0)


# -- particles of which half are moved ----------------------------------------------------------------------


def test_half_of_many_particles_are_paid_for():
    """Those before the last round stand for the rest: 1024 cost what 512 do, but for the first draws."""
    spent = {}
    for n in (512, 1024):
        torch.manual_seed(0)
        target = of_mixture(known([1.0], [[0.5] * 6], 0.05))
        found = explore(target, n)
        spent[n] = (target.n_gradients - n) / (len(found.betas) - 1)
        assert found.z.shape == (1, n, 6) and found.history_z.shape == (len(found.betas), 1, n, 6)
        torch.testing.assert_close(target.value(found.z), found.ell)
        assert len(found.z[0].unique(dim=0)) > 0.85 * n  # a move that was refused leaves two alike
    assert spent[1024] == pytest.approx(spent[512], rel=0.2)


@pytest.mark.parametrize("gradient", [True, False])
def test_many_particles_have_the_moments_of_the_posterior(gradient):
    q = known([0.6, 0.4], [[1.5, 0.0, 0.0], [-1.5, 0.0, 0.0]], 0.2)
    found = explore(of_mixture(q, 1.0), 1024, fits=8, gradient=gradient)
    assert float((found.log_evidence - 1.0).exp().mean()) == pytest.approx(1.0, abs=0.15)
    right = found.z[..., 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.6, abs=0.05)
    assert float(right.double().mean(1).std()) < 0.08  # of 512 ancestors, each seven times resampled
    for side, centre in ((right, q.loc[0, 0]), (~right, q.loc[0, 1])):
        torch.testing.assert_close(found.z[side].mean(0), centre, atol=0.02, rtol=0)
        torch.testing.assert_close(found.z[side].std(0), torch.full((3,), 0.2).double(), atol=0.015, rtol=0)
    second = (lambda mean, variance: (variance + mean.square()).mean(0))(*weighted_moments(found))
    torch.testing.assert_close(second[0], torch.tensor(2.29).double(), atol=0.08, rtol=0)
