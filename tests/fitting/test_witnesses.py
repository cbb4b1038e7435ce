"""What speaks against a q beside its weights: mass that other proposals have found."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.families.gaussians import Mixture
from visbi.fitting import weighing, witnesses
from visbi.fitting.budget import Budget
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.explore import Exploration
from visbi.fitting.pool import Pool, Trial
from visbi.fitting.target import Target
from visbi.fitting.weighing import missing_at
from visbi.fitting.witnesses import doubts, missing_at_tops, missing_of_points
from visbi.priors import coordinates

PLACES = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)


def two_modes(theta):
    """.9 of the mass on the left, .1 on the right; the log-evidence is 1."""
    each = (
        -0.5 * ((theta[:, None] - PLACES) / 0.3).square().sum(-1) - 2 * math.log(0.3) - math.log(2 * math.pi)
    )
    return 1.0 + torch.logsumexp(each + torch.tensor([0.9, 0.1]).double().log(), 1)


def mixture(*weights: float) -> Mixture:
    cov = 0.12 * torch.eye(2, dtype=torch.float64).expand(1, 2, 2, 2)
    return Mixture.of(torch.tensor([weights], dtype=torch.float64).log(), PLACES[None], cov)


COORDS = coordinates(MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double()))
ONE = torch.ones(1, dtype=torch.float64)


def in_four(*weights: float) -> Mixture:
    loc = torch.cat([PLACES, torch.zeros_like(PLACES)], 1)[None]
    cov = 0.09 * torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
    return Mixture.of(torch.tensor([weights], dtype=torch.float64).log(), loc, cov)


def four_dimensions(theta):
    return in_four(0.9, 0.1).log_prob(theta[None])[0]


def group(*drawn: Mixture) -> Group:
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    target = Target(two_modes, coordinates(prior))
    pool = Pool(target)
    for q in drawn:
        pool.draw(q, 4000)
    return Group(target, [Record()], ALONE, pool)


def test_a_mode_that_another_proposal_found():
    left, both = mixture(1.0, 1e-12), mixture(0.5, 0.5)
    now = group(both)
    trial = now.pool.draw(left, 4000)
    assert float(missing_of_points(now, left, trial)) == pytest.approx(1 / 9, abs=0.02)
    assert any("an independent exploration has seen" in line for line in doubts(now, left, trial)[0])
    assert float(missing_of_points(now, both, now.pool.draw(both, 4000))) == 0.0


def test_what_is_in_doubt_already_is_not_moved(monkeypatch):
    """One doubt is enough, and moves cost most."""
    left = mixture(1.0, 1e-12)
    now = group(mixture(0.5, 0.5))
    monkeypatch.setattr(witnesses, "drift", lambda *_, **__: pytest.fail("it was"))
    assert len(doubts(now, left, now.pool.draw(left, 4000))[0]) == 1


def test_a_difference_within_its_error_is_none(monkeypatch):
    """Ripples make a smooth q too low at many places: no mass is missing, but two estimates of it differ."""

    def rippled(z):
        return (7 * torch.cos(40 * z) - 2 * z.square()).sum(-1)

    q = Mixture.of(
        torch.zeros(1, 1).double(), torch.zeros(1, 1, 2).double(), 0.25 * torch.eye(2).double()[None, None]
    )
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    target = Target(rippled, coordinates(prior))

    def told() -> list[float]:
        found = []
        for seed in range(20):
            torch.manual_seed(seed)
            now = Group(target, [Record()], ALONE, Pool(target))
            trial = now.pool.draw(q, 4000)
            found.append(float(missing_at(now, q, q.widened(0.5), trial.log_z, trial)))
        return found

    assert sum(share > 0.02 for share in told()) <= 1
    monkeypatch.setattr(weighing, "_SURE", 0.0)
    assert sum(share > 0.02 for share in told()) >= 5


def test_what_its_own_draws_bring_back_is_not_missing():
    """Too low by a factor of 50 there, and yet drawn from: the weights mend it."""
    low = mixture(0.998, 0.002)
    now = group(mixture(0.5, 0.5))
    assert float(missing_of_points(now, low, now.pool.draw(low, 200_000))) < 0.02


def test_what_its_own_draws_find_at_the_same_place_is_not_missing():
    """Other draws find a tenth of the mass where q is too low; those of q find it, too, or do not."""
    low, left = mixture(0.998, 0.002), mixture(1.0, 1e-12)
    now = group()
    log_z = torch.ones(1).double()
    right = mixture(1e-12, 1.0)
    assert float(missing_at(now, left, right, log_z, now.pool.draw(left, 4000))) == pytest.approx(
        0.1, abs=0.02
    )
    assert float(missing_at(now, low, right, log_z)) == pytest.approx(0.1, abs=0.02)
    assert float(missing_at(now, low, right, log_z, now.pool.draw(low, 200_000))) < 0.02


def sent(z: torch.Tensor) -> Exploration:
    """What particles saw that were everywhere at first, and at z (1, N, d) in the end."""
    everywhere = torch.randn(1, z.shape[1], z.shape[2]).double()
    seen = Exploration.of_draws(z, torch.zeros_like(z[..., 0]), z.shape[1])
    history = torch.stack([everywhere, z])
    return replace(seen, z=z, history_z=history, history_relative=torch.zeros_like(history[..., 0]), step=ONE)


def test_ascents_find_what_particles_lost(monkeypatch):
    """They all ended on the left; those of the first temperature lead to the right, too."""
    q = in_four(1.0, 1e-12)
    now = Group(Target(four_dimensions, COORDS), [Record()], ALONE, Pool(Target(four_dimensions, COORDS)))
    trial = now.pool.draw(q, 4000)
    assert float(missing_at_tops(now, q, trial.log_z, trial)) == 0.0  # nothing was sent
    torch.manual_seed(0)
    now.seen = sent(q.sample(500))
    assert float(missing_at_tops(now, q, trial.log_z, trial)) == pytest.approx(1 / 9, abs=0.02)
    assert now.elsewhere is not None
    assert now.elsewhere.loc[0, :, 0].max() == pytest.approx(2.0, abs=0.01)
    monkeypatch.setattr(witnesses, "above", lambda *_: pytest.fail("ascents are made once"))
    both = in_four(0.9, 0.1)
    assert float(missing_at_tops(now, both, trial.log_z + math.log(10 / 9))) == 0.0


def test_a_small_budget_is_not_spent_on_ascents():
    now = Group(
        Target(four_dimensions, COORDS, Budget(50_000)),
        [Record()],
        ALONE,
        Pool(Target(four_dimensions, COORDS)),
    )
    now.seen = sent(in_four(1.0, 1e-12).sample(500))
    q = in_four(1.0, 1e-12)
    assert float(missing_at_tops(now, q, torch.zeros(1).double())) == 0.0
    assert now.target.n_values == 0 and now.tops is None


@pytest.mark.parametrize(
    ("lacking", "more", "taken"), [(True, 0.5, True), (True, 0.01, False), (False, 0.5, False)]
)
def test_what_is_known_to_lack_mass_gives_way_to_more_evidence(lacking, more, taken):
    """Its own weights may be the better ones."""
    now = group()
    now.records[0].lacking = lacking
    z = torch.zeros(1, 100, 2).double()
    even, uneven = torch.zeros(1, 100).double(), torch.randn(1, 100).double()
    uneven = uneven - uneven.logsumexp(1, keepdim=True) + math.log(100) + more
    now.consider("one", mixture(1.0, 1e-12), Trial.of(z, even, torch.zeros_like(even)))
    now.consider("both", mixture(0.9, 0.1), Trial.of(z, uneven, torch.zeros_like(even)))
    assert now.records[0].best is not None
    assert (now.records[0].best[0] == "both") == taken


def test_a_single_point_is_no_witness():
    now = group(mixture(1.0, 1e-3))
    left = mixture(1.0, 1e-12)
    assert float(missing_of_points(now, left, now.pool.draw(left, 4000))) == 0.0
