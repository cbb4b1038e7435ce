"""All diagnostics at once, of everything that draws at many observations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calibration_cases import WRONG, Cases, cases, wrong_q
from visbi import RefittingPosterior, VIPosterior, calibrate, fit_many
from visbi.many import Posteriors
from visbi.plots import calibration_figures
from visbi.simulators.zoo import linear_gaussian

TASK = linear_gaussian.task()


def potential(theta: Tensor, x: Tensor) -> Tensor:
    assert TASK.log_likelihood is not None
    return TASK.prior.log_prob(theta) + TASK.log_likelihood(theta, x)


class OfAnotherPackage:
    """Exact draws through the interface of sbi's posteriors, narrowed by a factor."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def sample_batched(self, shape: Any, x: Tensor) -> Tensor:
        return wrong_q(TASK, x, scale=self.scale).sample(shape)


class WithDensities(OfAnotherPackage):
    def log_prob_batched(self, theta: Tensor, x: Tensor) -> Tensor:
        return wrong_q(TASK, x, scale=self.scale).log_prob(theta)


@pytest.fixture(scope="module")
def right() -> Cases:
    return cases(150, 60, seed=5)


@pytest.mark.parametrize("verdict", WRONG)
def test_draws_right_and_wrong(verdict: str) -> None:
    some = cases(400, 100, seed=4, **WRONG[verdict])
    found = calibrate(some.draws, some.theta, some.x, log_density=potential, seed=1)
    assert found.verdict == verdict
    for part in (found.sbc, found.coverage, found.tarp):
        assert part.verdict == verdict
    assert str(found).startswith(f"{verdict}\n  ranks: {verdict}") and str(found).count("\n") == 3
    assert list(calibration_figures(found)) == ["ranks", "coverage", "tarp"]
    assert found.local is found.prior is found.predictive is None


@pytest.mark.parametrize(
    ("make", "regions"), [(OfAnotherPackage, "theta_1"), (WithDensities, "highest-density")]
)
def test_posteriors_of_other_packages(make: Any, regions: str, right: Cases) -> None:
    found = calibrate(make(), right.theta, right.x, n_draws=80, seed=1)
    assert found.verdict == "calibrated" and found.coverage.names[0].startswith(regions)
    assert found.sbc.n_draws == 80
    assert calibrate(make(0.5), right.theta, right.x, seed=1).verdict == "over-confident"


def test_with_an_observation(right: Cases) -> None:
    found = calibrate(
        WithDensities(),
        right.theta,
        right.x,
        x_o=TASK.x_o,
        simulator=TASK.simulator,
        classifier="quadratic",
        names=["a", "b"],
        seed=1,
    )
    assert found.local is not None and found.prior is not None and found.predictive is not None
    assert found.local.verdict == "calibrated" and found.local.names == ("a", "b")
    assert found.prior.verdict == "familiar" and found.predictive.verdict == "calibrated"
    assert found.sbc.names == found.tarp.names == ("a", "b")
    assert found.predictions is not None and found.predictions.shape == (1000, 2)
    assert set(calibration_figures(found)) == {"ranks", "coverage", "tarp", "prior", "predictive"}
    assert str(found).count("\n") == 6
    odd: dict[str, Any] = {"x_o": right.x[0] + 20, "draws_o": right.draws[:, 0], "classifier": "quadratic"}
    far = calibrate(right.draws, right.theta, right.x, seed=1, **odd)
    assert far.prior is not None and far.prior.verdict == "foreign"
    assert far.predictive is None and "predict" not in str(far)


@pytest.fixture(scope="module")
def fitted(right: Cases) -> Posteriors:
    """Of 21 observations, the fourth of which is broken."""
    x = right.x[:21].clone()
    x[3] = torch.nan
    with pytest.warns(UserWarning, match="failed"):
        return fit_many(potential, TASK.prior, x, seed=1, show_progress_bar=False)


def test_posteriors_of_fit_many(right: Cases, fitted: Posteriors) -> None:
    theta, ranks = right.theta[:21], []
    for correct in (None, True, False):
        with pytest.warns(UserWarning, match="1 of 21 observations have no fit and are left out"):
            found = calibrate(fitted, theta, fitted.x, log_density=potential, correct=correct, seed=1)
        assert found.verdict == "calibrated" and found.sbc.names == ("theta_1", "theta_2", "log-density")
        assert found.coverage.names == ("highest-density regions",)
        assert len(found.sbc.ranks) == len(found.x) == 20
        ranks.append(found.sbc.ranks)
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])
    with pytest.raises(ValueError, match="`x`: expected the observations that the posteriors were fitted to"):
        calibrate(fitted, theta, fitted.x.flip(0))


def test_draws_do_not_make_draws_at_x_o(right: Cases) -> None:
    with pytest.raises(ValueError, match="`draws_o`: expected draws at x_o, which these"):
        calibrate(right.draws, right.theta, right.x, x_o=TASK.x_o)


def test_refitting(right: Cases) -> None:
    theta, x = right.theta[:20], right.x[:20]
    posterior = VIPosterior(potential, TASK.prior, q="gaussian")
    refitting = RefittingPosterior(posterior, learning_rate=0.1, max_num_iters=12, seed=1)
    found = {c: calibrate(refitting, theta, x, correct=c, seed=1) for c in (None, False, True)}
    assert found[None].coverage.names == ("highest-density regions",)
    assert torch.equal(found[None].sbc.ranks, found[False].sbc.ranks)
    assert not torch.equal(found[None].sbc.ranks, found[True].sbc.ranks)


def test_refitting_with_auto_is_fitted_side_by_side(right: Cases) -> None:
    """The potential is called for many observations at once: 20 take fewer calls than 4 one by one."""
    calls: list[int] = []

    def counting(theta: Tensor, x: Tensor) -> Tensor:
        calls.append(len(theta))
        return potential(theta, x)

    theta, x = right.theta[:20], right.x[:20]
    posterior = VIPosterior(counting, TASK.prior, q="auto")
    found = calibrate(RefittingPosterior(posterior, seed=1), theta, x, n_draws=50, seed=1)
    together = len(calls)
    alone = RefittingPosterior(posterior, seed=1)
    for row in x[:4]:
        alone.at(row)
    assert found.verdict == "calibrated" and 0 < together < len(calls) - together


def test_refitting_repeats_by_the_seed_of_calibrate(right: Cases) -> None:
    """Fits without a seed of their own take theirs from it; fits that are kept change no draw."""
    theta, x = right.theta[:20], right.x[:20]
    posterior = VIPosterior(potential, TASK.prior, q="auto")
    kept, state = RefittingPosterior(posterior), torch.random.get_rng_state()
    first, again = (calibrate(kept, theta, x, n_draws=50, seed=1).sbc.ranks for _ in range(2))
    anew, other = (
        calibrate(RefittingPosterior(posterior), theta, x, n_draws=50, seed=seed).sbc.ranks for seed in (1, 2)
    )
    assert torch.equal(first, again) and torch.equal(first, anew) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.fixture(scope="module")
def wide(right: Cases) -> VIPosterior:
    """An amortised q after a few steps."""
    posterior = VIPosterior(potential, TASK.prior)
    options: dict[str, Any] = {"flow_type": "gaussian", "hidden_features": 16, "learning_rate": 0.01}
    return posterior.train_amortized(
        right.theta, right.x, max_num_iters=15, seed=1, show_progress_bar=False, **options
    )


def test_amortised_raw_and_corrected(right: Cases, wide: VIPosterior) -> None:
    raw, corrected = (
        calibrate(wide, right.theta[:50], right.x[:50], n_draws=50, correct=correct, seed=1)
        for correct in (None, True)
    )
    assert raw.verdict != "calibrated" and corrected.verdict == "calibrated"
    assert raw.coverage.names == ("highest-density regions",)


class Bent:
    """A potential that is wrong while q is fitted to it, and then set right, so that q is what is wrong.

    The posterior's deviations are times `scale`, and its mean is off by `shift` of them.
    """

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        assert TASK.posterior is not None
        sd = TASK.posterior(x).stddev
        return potential(theta - self.shift * sd, x) / self.scale**2

    def set_right(self) -> None:
        self.scale, self.shift = 1.0, 0.0


@pytest.mark.parametrize("verdict", WRONG)
def test_wrong_raw_draws_are_told_and_corrected_ones_are_right(verdict: str) -> None:
    """Every diagnostic, of q in four ways; corrected draws at data seeds 10 to 21: 12 of 12 calibrated."""
    bent, runs, fresh = Bent(**WRONG[verdict]), cases(1000, 2, seed=8), cases(200, 2, seed=10)
    posterior = VIPosterior(bent, TASK.prior)
    options: dict[str, Any] = {"flow_type": "gaussian", "hidden_features": 16, "learning_rate": 0.02}
    options |= {"n_particles": 8, "batch_size": 128, "gamma": 0.99, "max_num_iters": 300}
    posterior.train_amortized(runs.theta, runs.x, seed=1, show_progress_bar=False, **options)
    bent.set_right()
    given: dict[str, Any] = {"n_draws": 100, "x_o": TASK.x_o, "classifier": "regression", "seed": 1}
    raw, corrected = (
        calibrate(posterior, fresh.theta, fresh.x, correct=correct, **given) for correct in (False, True)
    )
    for found, expected in ((raw, verdict), (corrected, "calibrated")):
        assert found.local is not None and found.prior is not None
        parts = [found.sbc, found.coverage, found.tarp, found.local]
        assert [part.verdict for part in parts] == [expected] * 4, str(found)
        assert found.verdict == expected and found.prior.verdict == "familiar"


def test_options_have_effects(right: Cases) -> None:
    def run(**options: Any) -> Any:
        return calibrate(WithDensities(), right.theta, right.x, **{"seed": 1, **options})

    plain = run()
    assert torch.equal(plain.sbc.ranks, run().sbc.ranks)
    assert not torch.equal(plain.sbc.ranks, run(seed=2).sbc.ranks)
    assert plain.sbc.n_draws == 200 and run(n_draws=50).sbc.n_draws == 50
    assert run(log_density=potential).sbc.names == (*plain.sbc.names, "log-density")
    assert run(alpha=0.3).sbc.alpha == pytest.approx(0.1) and run(alpha=1 - 1e-9).verdict != "calibrated"


def test_a_small_alpha_has_exchanges_enough(right: Cases) -> None:
    options: dict[str, Any] = {"x_o": TASK.x_o[None], "classifier": "quadratic", "alpha": 0.02, "seed": 1}
    found = calibrate(WithDensities(), right.theta, right.x, **options)
    assert found.local is not None and len(found.local.null) == 201 and found.local.alpha == 0.005
    assert found.prior is not None and found.prior.alpha == 0.02
    assert found.x_o is not None and found.x_o.shape == (2,)


def test_a_seed_leaves_the_generator_alone(right: Cases) -> None:
    state = torch.random.get_rng_state()
    calibrate(WithDensities(), right.theta, right.x, x_o=TASK.x_o, classifier="quadratic", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("posterior", "change", "error", "message"),
    [
        (3, {}, TypeError, r"`posterior`: expected something with `sample_batched\(shape, x\)`"),
        (OfAnotherPackage(), {"correct": True}, TypeError, "`correct`: expected None"),
        (OfAnotherPackage(), {"theta": torch.zeros(30)}, ValueError, r"`theta`: expected shape \(n_obs, D\)"),
        (OfAnotherPackage(), {"x": torch.zeros(20, 2)}, ValueError, "equally many rows"),
        (OfAnotherPackage(), {"alpha": 0}, ValueError, "`alpha`"),
        (OfAnotherPackage(), {"n_draws": 0}, ValueError, "`n_draws`"),
        (
            OfAnotherPackage(),
            {"log_density": lambda theta, x: theta},
            ValueError,
            "`log_density`: expected one",
        ),
        (torch.zeros(5, 5, 5), {}, ValueError, "`draws`"),
        (
            torch.zeros(50, 30, 2),
            {"x_o": torch.zeros(2)},
            ValueError,
            r"`x`: expected shape \(n, ...\), n >= 100",
        ),
    ],
)
def test_what_is_refused(posterior: Any, change: dict[str, Any], error: Any, message: str) -> None:
    arguments: dict[str, Any] = {"theta": torch.randn(30, 2), "x": torch.randn(30, 2), **change}
    with pytest.raises(error, match=message):
        calibrate(posterior, **arguments)


@pytest.mark.slow
def test_a_thousand_fits() -> None:
    """Ranks of 1000 automatic fits are uniform, and those of the same fits narrowed are not.

    The automatic fit keeps a wide component in q, so that its weights stay bounded: raw draws are too wide.
    """
    many = cases(1000, 10, seed=8)
    posteriors = fit_many(potential, TASK.prior, many.x, seed=1, show_progress_bar=False)
    raw, corrected = (
        calibrate(posteriors, many.theta, many.x, log_density=potential, correct=correct, seed=1)
        for correct in (False, None)
    )
    assert corrected.verdict == "calibrated", str(corrected)
    assert corrected.sbc.chi2_p_values.min() > 0.01 and corrected.sbc.p_value > 0.01
    assert raw.verdict == "under-confident", str(raw)
    draws = posteriors.sample((100,))
    narrow = draws.mean(0) + 0.8 * (draws - draws.mean(0))
    assert calibrate(narrow, many.theta, many.x, seed=1).verdict == "over-confident"
