"""Ranks, coverage and TARP tell exact posteriors from widened, narrowed and shifted ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration_cases import WRONG, Cases, cases, wrong_q
from visbi.certificate import WeightedDraws, expected_coverage, sbc, tarp
from visbi.certificate.ranks import clear, ranks_among, shift_score, spread_score, unit
from visbi.core.random import seeded

DIAGNOSTICS: dict[str, Callable[[Cases], Any]] = {
    "sbc": lambda c: sbc(c.theta, c.draws, seed=1),
    "sbc with the likelihood": lambda c: sbc(
        c.theta, c.draws, log_densities={"log-likelihood": c.log_likelihood}, seed=1
    ),
    "coverage of regions": lambda c: expected_coverage(c.theta, c.draws, c.log_q, seed=1),
    "coverage of intervals": lambda c: expected_coverage(c.theta, c.draws, seed=1),
    "tarp": lambda c: tarp(c.theta, c.draws, seed=1),
}


@pytest.mark.parametrize("name", DIAGNOSTICS)
@pytest.mark.parametrize("dim", [1, 3])
def test_right_and_wrong_are_told_apart(name: str, dim: int) -> None:
    for verdict, how in WRONG.items():
        result = DIAGNOSTICS[name](cases(500, 100, dim, seed=3, **how))
        assert result.verdict == verdict, (verdict, str(result))
        assert str(result).startswith((f"{verdict}: ", f"{verdict} in "))
        assert (result.p_value < 1e-3) == (verdict != "calibrated")


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_false_alarms_are_as_rare_as_promised(name: str) -> None:
    p = np.array([DIAGNOSTICS[name](cases(60, 20, 2, seed=seed)).p_value for seed in range(150)])
    for level in (
        0.05,
        0.2,
    ):  # Holm's correction of quantities that depend on one another errs on the low side
        share, deviation = (p < level).mean(), (level * (1 - level) / len(p)) ** 0.5
        assert level / 5 < share + 3 * deviation and share < level + 3 * deviation


@pytest.mark.parametrize("name", ["coverage of regions", "sbc"])
def test_p_values_of_one_quantity_are_uniform(name: str) -> None:
    from scipy.stats import kstest

    p = [DIAGNOSTICS[name](cases(60, 20, 1, seed=seed)).p_value for seed in range(150)]
    assert kstest(p, "uniform").pvalue > 0.01


def test_a_q_that_ignores_x_shows_in_the_likelihood_alone() -> None:
    right = cases(400, 100)
    with seeded(0):
        prior = right.task.prior.sample((100, 400))
    assert right.task.log_likelihood is not None
    at_draws = torch.stack([right.task.log_likelihood(row, right.x) for row in prior])
    likelihood = {"log-likelihood": (right.log_likelihood[0], at_draws)}
    found = sbc(right.theta, prior, log_densities=likelihood, seed=1)
    assert found.verdicts == ("calibrated", "calibrated", "under-confident")
    assert found.verdict == "under-confident" and "log-likelihood" in str(found)


def test_wrong_weights_of_one_parameter_are_that_parameter_s() -> None:
    right = cases(500, 100, 3)
    draws = right.draws.clone()
    draws[..., 1] += 0.5
    found = sbc(right.theta, draws, names=["a", "b", "c"], seed=1)
    assert found.verdicts == ("calibrated", "biased", "calibrated")
    assert "the truth lies above the median of b" not in str(found) and "biased in b" in str(found)
    assert found.shift[1] < -clear() and abs(found.spread[1]) < abs(found.shift[1])
    assert expected_coverage(right.theta, draws, seed=1).verdicts[1] == "biased"
    of_tarp = tarp(right.theta, draws, names=["a", "b", "c"], seed=1)
    assert of_tarp.verdict == "biased" and "below the draws of b" in str(of_tarp)


@pytest.mark.parametrize(
    ("dim", "how", "verdict"),
    [
        (2, {"shift": 2.0}, "biased"),
        (5, {"shift": 1.0}, "biased"),
        (5, {"scale": 0.6, "shift": 0.1}, "over-confident"),
        (5, {"scale": 0.7}, "over-confident"),
        (5, {"scale": 1.4}, "under-confident"),
        (5, {}, "calibrated"),
    ],
)
def test_balls_tell_a_shift_of_every_parameter_from_narrowness(
    dim: int, how: dict[str, float], verdict: str
) -> None:
    """Where all draws lie elsewhere, balls around random points hold too few truths, too."""
    for seed in range(4):
        found = tarp(*shifted(seed, dim, **how), alpha=0.001, seed=seed)
        assert found.verdict == verdict, str(found)
        assert verdict != "biased" or "the truths lie below the draws" in str(found)


def shifted(seed: int, dim: int, *, scale: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Truths, and draws whose deviations are `scale` times and mean is off by `shift` of the right ones."""
    with seeded(seed):
        theta = torch.randn(300, dim)
        x = theta + torch.randn(300, dim)
        return theta, x / 2 + 0.5**0.5 * (scale * torch.randn(100, 300, dim) + shift)


def test_corrected_draws_are_right_where_raw_ones_are_not() -> None:
    wide = cases(400, 600, 1, scale=1.6)
    log_p = wide.log_likelihood[1] + wide.task.prior.log_prob(wide.draws)
    with seeded(2):
        corrected = torch.stack(
            [
                WeightedDraws(wide.draws[:, i], log_p[:, i], wide.log_q[1][:, i]).resampled(60)
                for i in range(len(wide.theta))
            ],
            1,
        )
    for diagnostic in (sbc, expected_coverage, tarp):
        assert diagnostic(wide.theta, wide.draws[:60], seed=1).verdict == "under-confident"
        assert diagnostic(wide.theta, corrected, seed=1).verdict == "calibrated"


def test_ranks_by_hand() -> None:
    draws = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]])
    assert ranks_among(torch.tensor([2.5, 9.0]), draws).tolist() == [2, 3]


def test_ties_are_broken_evenly() -> None:
    with seeded(0):
        ranks = ranks_among(torch.zeros(4000), torch.zeros(3, 4000))
    assert torch.bincount(ranks).div(4000).sub(0.25).abs().max() < 4 * (0.1875 / 4000) ** 0.5
    # counts as parameters: half of the draws equal the truth, and it is still calibrated
    with seeded(1):
        counts = torch.poisson(torch.full((501, 300, 1), 0.5))
    assert sbc(counts[0], counts[1:], seed=2).verdict == "calibrated"


def test_scores_are_standard_normal() -> None:
    with seeded(0):
        u = unit(torch.randint(0, 21, (300, 2000)), 20)
    for score in (shift_score(u), spread_score(u, 20)):
        assert abs(float(score.mean())) < 0.1 and abs(float(score.std()) - 1) < 0.07


def test_coverage_is_what_theory_says() -> None:
    narrow = cases(2000, 200, 1, scale=0.6)
    held = float(torch.special.erf(torch.tensor(0.6 * 1.645 / 2**0.5)))  # of a 90 % interval
    for log_q in (None, narrow.log_q):
        found = expected_coverage(narrow.theta, narrow.draws, log_q, seed=1)
        assert found.held(0.9)[0] == pytest.approx(held, abs=0.04)
        k = int(np.abs(found.curves[0].levels - 0.9).argmin())
        assert found.curves[0].shares[k] == pytest.approx(held, abs=0.04)
        assert f"hold {100 * found.held(0.9)[0]:.0f} %" in str(found)


def test_area_to_curve() -> None:
    # of q = one point, f is 0 or 1: half of the truths are inside every ball of positive level
    truths = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    points = torch.zeros(50, 2000, 1)
    points[0] = 20.0  # so that there is a box
    found = tarp(truths, points, references=torch.full((2000, 1), -50.0), seed=1)
    assert found.atc == pytest.approx(0.25 - 0.375, abs=0.02)
    assert found.verdict == "over-confident" and found.ks_p_value < 1e-6


def test_references_may_be_given() -> None:
    right = cases(300, 50)
    found = tarp(right.theta, right.draws, references=right.x, seed=1)
    assert found.verdict == "calibrated"
    assert not torch.equal(found.ranks, tarp(right.theta, right.draws, seed=1).ranks)


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_seed_repeats_and_leaves_the_generator_alone(name: str) -> None:
    right = cases(50, 20)
    state = torch.random.get_rng_state()
    assert str(DIAGNOSTICS[name](right)) == str(DIAGNOSTICS[name](right))
    assert torch.equal(state, torch.random.get_rng_state())


THETA, DRAWS = torch.randn(30, 2), torch.randn(20, 30, 2)


@pytest.mark.parametrize("diagnostic", [sbc, expected_coverage, tarp])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": THETA[:, 0]}, r"`theta`: expected shape \(n_obs, D\) with n_obs >= 20"),
        ({"theta": THETA[:10], "draws": DRAWS[:, :10]}, "n_obs >= 20"),
        ({"theta": THETA * torch.nan}, "`theta`: expected finite numbers"),
        ({"draws": DRAWS[0]}, r"`draws`: expected shape \(n_draws, 30, 2\)"),
        ({"draws": DRAWS[:5]}, "n_draws >= 10"),
        ({"draws": DRAWS.transpose(0, 1)}, r"got \(30, 20, 2\)"),
        ({"names": ["a"]}, "`names`: expected 2 names; got 1"),
        ({"alpha": 1.0}, "`alpha`"),
    ],
)
def test_what_is_refused(diagnostic: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    arguments = {"theta": THETA, "draws": DRAWS, **change}
    with pytest.raises(ValueError, match=message):
        diagnostic(arguments.pop("theta"), arguments.pop("draws"), **arguments)


def test_refused_densities_and_references() -> None:
    with pytest.raises(ValueError, match=r"`log_q`: expected shapes \(30,\) and \(20, 30\)"):
        expected_coverage(THETA, DRAWS, (torch.zeros(30), torch.zeros(30, 20)))
    with pytest.raises(ValueError, match="`likelihood`: expected log-densities; got NaN"):
        sbc(THETA, DRAWS, log_densities={"likelihood": (torch.full((30,), torch.nan), torch.zeros(20, 30))})
    with pytest.raises(ValueError, match="`references`"):
        tarp(THETA, DRAWS, references=torch.zeros(2))
    with pytest.raises(ValueError, match="`level`"):
        expected_coverage(THETA, DRAWS).held(1.0)


def test_a_density_of_zero_is_a_low_rank() -> None:
    at_truth, at_draws = torch.full((30,), -torch.inf), torch.zeros(20, 30)
    assert expected_coverage(THETA, DRAWS, (at_truth, at_draws)).held(0.95)[0] == 0.0


def test_a_wrong_correlation_shows_in_regions() -> None:
    right = cases(500, 100, 2, seed=1)
    exact = wrong_q(right.task, right.x)
    with seeded(0):
        q = torch.distributions.Independent(torch.distributions.Normal(exact.mean, exact.stddev), 1)
        draws = q.sample((100,))
    assert right.task.log_likelihood is not None
    log_p = [right.log_likelihood[0], torch.stack([right.task.log_likelihood(row, right.x) for row in draws])]
    assert sbc(right.theta, draws, seed=1).verdict == "calibrated"
    assert sbc(right.theta, draws, log_densities={"likelihood": tuple(log_p)}, seed=1).verdict != "calibrated"
