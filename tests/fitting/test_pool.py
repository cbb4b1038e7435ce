"""All points together are a sample of the posterior, whatever they were drawn from."""

import math

import pytest
import torch

from visbi.certificate import effective_sample_size, pareto_smooth
from visbi.families.gaussians import Mixture
from visbi.fitting.pool import Pool, Trial
from visbi.fitting.target import Target
from visbi.priors import coordinates

LOG_Z = 2.3


def gaussian(centre: list[float], sd: float) -> Mixture:
    loc = torch.tensor(centre, dtype=torch.float64)
    cov = sd**2 * torch.eye(len(centre), dtype=torch.float64)
    return Mixture.of(torch.zeros(1, 1).double(), loc[None, None], cov[None, None])


def both(one: Mixture, other: Mixture, share: float = 0.5) -> Mixture:
    return one.with_(other, share)


EXACT = both(gaussian([1.5, 0.0], 0.5), gaussian([-1.5, 0.5], 0.3), 0.25)
MEAN = 0.75 * EXACT.loc[0, 0] + 0.25 * EXACT.loc[0, 1]
PROPOSALS = [
    gaussian([-1.5, 0.5], 0.4),  # sees one mode of two
    gaussian([1.5, 0.0], 0.6),  # sees the other
    gaussian([0.0, 0.0], 3.0),  # sees both, seldom
    gaussian([9.0, 9.0], 0.5),  # sees none
]


def pool_of(exact: Mixture = EXACT, shift: float = LOG_Z) -> Pool:
    prior = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    return Pool(Target(lambda theta: exact.log_prob(theta[None])[0] + shift, coordinates(prior)))


def evidence(pool: Pool) -> float:
    log_w = pool.log_w()
    return float(torch.logsumexp(log_w, 1)) - math.log(log_w.shape[1])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_evidence_and_moments_whatever_the_proposals(order):
    pool = pool_of()
    for which, n in zip(order, (1000, 2000, 4000, 500), strict=True):
        pool.draw(PROPOSALS[which], n)
    log_w = pool.log_w()
    assert log_w.shape == (1, 7500) and pool.target.n_values == 7500
    assert evidence(pool) == pytest.approx(LOG_Z, abs=0.06)
    w, z = log_w[0].softmax(0)[:, None], pool.z[0]
    mean = (w * z).sum(0)
    torch.testing.assert_close(mean, MEAN, atol=0.1, rtol=0)
    left = float(w[z[:, 0] < 0].sum())
    assert left == pytest.approx(0.25, abs=0.02)
    shift = (w * (z - EXACT.loc[0, 0]).square())[z[:, 0] > 0].sum(0) / (1 - left)
    torch.testing.assert_close(shift, torch.full((2,), 0.25).double(), atol=0.03, rtol=0)


def test_weights_are_those_of_the_balance_heuristic():
    pool = pool_of()
    for q, n in zip(PROPOSALS, (30, 50, 70, 40), strict=True):
        pool.draw(q, n)
    mixed = sum(n / 190 * q.log_prob(pool.z).exp() for q, n in zip(PROPOSALS, (30, 50, 70, 40), strict=True))
    torch.testing.assert_close(pool.log_w(), EXACT.log_prob(pool.z) + LOG_Z - mixed.log())


def test_draws_of_the_posterior_have_equal_weights():
    pool = pool_of()
    pool.draw(EXACT, 100)
    pool.draw(EXACT, 50)
    torch.testing.assert_close(pool.log_w(), torch.full((1, 150), LOG_Z).double())


def test_a_bad_proposal_does_no_harm():
    pool = pool_of()
    pool.draw(gaussian([0.0, 0.0], 0.2), 1000)  # its own weights have no variance
    alone = evidence(pool)
    pool.draw(both(PROPOSALS[0], PROPOSALS[1]), 4000)
    assert abs(alone - LOG_Z) > 1.0 and evidence(pool) == pytest.approx(LOG_Z, abs=0.03)
    assert effective_sample_size(pool.log_w()[0]) > 2000


def test_a_trial_weighs_fresh_draws_by_themselves():
    pool = pool_of()
    pool.draw(PROPOSALS[2], 500)
    trial = pool.draw(PROPOSALS[1], 400)
    assert trial.z.shape == (1, 400, 2) and torch.equal(pool.z[:, 500:], trial.z)
    torch.testing.assert_close(trial.ell, EXACT.log_prob(trial.z) + LOG_Z)
    torch.testing.assert_close(trial.log_q, PROPOSALS[1].log_prob(trial.z))
    torch.testing.assert_close(trial.log_w, trial.ell - trial.log_q)
    assert float(trial.share) == effective_sample_size(trial.log_w[0]) / 400
    assert float(trial.khat) == pareto_smooth(trial.log_w[0])[1]
    assert isinstance(trial, Trial)


def test_points_stand_for_the_posterior_and_none_is_there_twice():
    pool = pool_of()
    for q in PROPOSALS:
        pool.draw(q, 2000)
    for most in (500, 3000, 50_000):
        z, weights = (each[0] for each in pool.points(most))
        assert len(z) == len(weights) <= min(most, 8000) and len(z.unique(dim=0)) == len(z)
        assert float(weights.sum()) == pytest.approx(1.0)
        assert bool((weights > 0).all())
        torch.testing.assert_close((weights[:, None] * z).sum(0), MEAN, atol=0.12, rtol=0)
        assert float(weights[z[:, 0] < 0].sum()) == pytest.approx(0.25, abs=0.03)


def test_points_that_outweigh_all_others_are_there_once():
    pool = pool_of(gaussian([4.0, 0.0], 0.2))
    pool.draw(gaussian([0.0, 0.0], 2.0), 1000)
    z, weights = (each[0] for each in pool.points(500))
    assert len(z.unique(dim=0)) == len(z) < 100
    assert float(weights.max()) > 1 / 100 and float(weights.sum()) == pytest.approx(1.0)


def test_a_large_constant_changes_nothing_but_the_evidence():
    torch.manual_seed(0)
    plain = pool_of()
    first = plain.draw(PROPOSALS[2], 500)
    torch.manual_seed(0)
    shifted = pool_of(shift=LOG_Z + 1e4)
    second = shifted.draw(PROPOSALS[2], 500)
    assert evidence(shifted) == pytest.approx(evidence(plain) + 1e4)
    assert float(second.share) == pytest.approx(float(first.share))
    assert float(second.khat) == pytest.approx(float(first.khat), abs=1e-5)


def test_draws_where_the_potential_is_not_finite_weigh_nothing():
    pool = pool_of()
    inner = pool.target._log_p
    pool.target._log_p = lambda theta: torch.where(theta[:, 0] > 0, inner(theta), torch.nan)
    trial = pool.draw(PROPOSALS[2], 4000)
    assert torch.equal(trial.ell == -math.inf, trial.z[..., 0] <= 0)
    z, _ = pool.points(1000)
    assert bool((z[..., 0] > 0).all())
    assert evidence(pool) == pytest.approx(LOG_Z + math.log(0.75), abs=0.15)
