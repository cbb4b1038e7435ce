"""`VIPosterior` with q="auto": what it finds, and what it does with everything else that a posterior can."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor

from auto_cases import KINDS, QUIET, auto, found, trained, two_modes
from posterior_cases import OTHER, SD, SHORT, X, alone_and_seeded, box, fitted, log_p, made, real
from visbi import BoxUniform, FitError, RefittingPosterior, VIPosterior, VIPosteriorParameters
from visbi.core.random import seeded
from visbi.families.gaussian import GaussianBody
from visbi.families.mixture import MixtureBody
from visbi.priors import MultipleIndependent

__all__ = ["alone_and_seeded"]

AMORTISED: dict[str, Any] = dict(max_num_iters=2, n_particles=8, num_transforms=1, hidden_features=4)


def amortised(posterior: VIPosterior, **options: Any) -> VIPosterior:
    with seeded(4):
        theta = posterior.prior.sample(torch.Size([40]))
    return posterior.train_amortized(
        theta, theta + 0.1, **{**AMORTISED, "show_progress_bar": False, **options}
    )


# what it finds


def test_a_gaussian() -> None:
    posterior = trained(auto(prior=real()))
    theta = posterior.sample((4000,))
    assert (theta.mean(0) - X[0]).abs().max() < 0.03 and (theta.std(0) - SD).abs().max() < 0.03
    assert posterior.report.status == "ok" and len(posterior.report.modes) == 1
    exact = 2 * math.log(SD * math.sqrt(2 * math.pi))
    assert posterior.report.log_evidence == pytest.approx(exact, abs=5 * posterior.report.log_evidence_se)


def test_two_modes() -> None:
    posterior = trained(auto(two_modes))
    theta = posterior.sample((4000,))
    upper = theta[theta.sum(-1) > X.sum()]
    assert len(upper) / 4000 == pytest.approx(0.5, abs=0.04)
    assert (upper.mean(0) - X[0] - 1.5).abs().max() < 0.03 and (upper.std(0) - 0.3).abs().max() < 0.03
    assert posterior.report.status in ("ok", "corrected")
    assert [mode.weight for mode in posterior.report.modes] == pytest.approx([0.5, 0.5], abs=0.04)


ONE = torch.ones(1)
PRIORS: dict[str, tuple[Callable[[], td.Distribution], Callable[[Tensor], Tensor]]] = {
    "mixed": (
        lambda: MultipleIndependent([td.Gamma(2 * ONE, ONE), td.Normal(0 * ONE, 2 * ONE)]),
        lambda theta: 3 * theta[:, 0].log() - 2 * theta[:, 0] - 0.5 * theta[:, 1].square(),
    ),
    "float64": (
        lambda: td.MultivariateNormal(torch.zeros(2).double(), 4 * torch.eye(2).double()),
        lambda theta: -0.5 * ((theta - 1) / 0.5).square().sum(-1),
    ),
    "one parameter": (lambda: box(1), lambda theta: -0.5 * ((theta[:, 0] - 1) / 0.5).square()),
}
MOMENTS = {
    "mixed": ([2.0, 0.0], [1.0, 1.0]),  # a gamma of shape 4 and rate 2, a standard normal
    "float64": ([1.0, 1.0], [0.5, 0.5]),
    "one parameter": ([1.0], [0.5]),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors(name: str) -> None:
    prior, density = PRIORS[name][0](), PRIORS[name][1]
    posterior = trained(auto(lambda theta, x_o: density(theta), prior), torch.zeros(1, 1))
    theta = posterior.sample((4000,))
    assert theta.dtype == prior.sample().dtype and bool(prior.support.check(theta).all())
    mean, sd = map(torch.tensor, MOMENTS[name])
    torch.testing.assert_close(theta.mean(0), mean.to(theta), atol=0.06, rtol=0)
    torch.testing.assert_close(theta.std(0), sd.to(theta), atol=0.06, rtol=0)
    raw = posterior.sample((5,), correct=False)
    assert raw.dtype == theta.dtype and posterior.log_prob(raw).dtype == theta.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pole_at_a_corner(dtype: torch.dtype) -> None:
    """Four Beta(.2, 3): the density is infinite at zero, where all draws ended, at 5e-324."""
    each = td.Beta(torch.tensor(0.2).double(), torch.tensor(3.0).double(), validate_args=False)
    prior = BoxUniform(torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype))
    posterior = VIPosterior(lambda theta, x: each.log_prob(theta.double()).sum(-1), prior, q="auto")
    posterior.train(X, seed=0, **QUIET)
    assert abs(posterior.report.log_evidence) < 0.03 and posterior.report.status in ("ok", "corrected")
    theta = posterior.sample((4000,)).double()
    assert (theta.mean(0) - 0.0625).abs().max() < 0.01 and len(theta.unique(dim=0)) > 3800


def test_trials() -> None:
    """Four independent observations: half the standard deviation."""
    trials = torch.tensor([[0.1, 0.2], [0.4, -0.3], [0.0, 0.5], [0.3, 0.0]])

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return -0.5 * ((theta[:, None] - x_o) / SD).square().sum((1, 2))

    theta = trained(auto(potential), trials).sample((4000,))
    assert (theta.mean(0) - trials.mean(0)).abs().max() < 0.02 and (theta.std(0) - SD / 2).abs().max() < 0.02


# draws


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0)])
@pytest.mark.parametrize("correct", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_draws(kind: str, correct: bool | None, shape: tuple[int, ...]) -> None:
    assert found(kind).sample(shape, correct=correct).shape == (*shape, 2)


def test_equal_seeds_give_equal_draws_whether_or_not_the_pool_grows() -> None:
    posterior = found("mixture")
    posterior._state = replace(posterior._state, report=replace(posterior.report, status="corrected"))
    assert len(posterior._state.draws.theta) == 500
    with seeded(5):
        first = posterior.sample((30_000,))
    assert len(posterior._state.draws.theta) > 30_000  # it has grown
    with seeded(5):
        assert torch.equal(posterior.sample((30_000,)), first)
    with seeded(6):
        assert not torch.equal(posterior.sample((30_000,)), first)


def test_the_pool_of_a_fit_that_is_not_good_does_not_grow() -> None:
    rows: list[int] = []

    def counted(theta: Tensor, x_o: Tensor) -> Tensor:
        rows.append(len(theta))
        return log_p(theta, x_o)

    posterior = auto(counted).train(X, max_potential_evals=3000, seed=1, **QUIET)
    assert posterior.report.status == "suspect" and posterior.report.stop_reason
    spent = sum(rows)
    assert posterior.sample((5000,)).shape == (5000, 2) and sum(rows) == spent


def test_no_density_without_an_evidence() -> None:
    posterior = auto().train(X, max_potential_evals=10, allow_failed=True, **QUIET)
    assert posterior.report.log_evidence == -math.inf
    with pytest.raises(ValueError, match="`normalized`: expected a fit with a finite log-evidence"):
        posterior.log_prob(torch.zeros(1, 2), normalized="potential")


@pytest.mark.parametrize("metric", ["psis", "prop", "prop_prior"])
def test_whatever_the_score_a_suspect_fit_warns(metric: str) -> None:
    with pytest.warns(UserWarning, match="the fit ended early"):
        auto().train(
            X, max_potential_evals=3000, seed=1, show_progress_bar=False, quality_control_metric=metric
        )


def test_draws_do_not_repeat() -> None:
    theta = trained(auto()).sample((20_000,))
    assert len(theta.unique(dim=0)) > 19_900


@pytest.mark.parametrize("kind", KINDS)
def test_densities(kind: str) -> None:
    posterior = found(kind)
    theta = torch.tensor([[0.3, -0.5], [0.1, 0.2]]).requires_grad_()
    (gradient,) = torch.autograd.grad(posterior.log_prob(theta, track_gradients=True).sum(), theta)
    for i in range(2):  # against differences
        step = torch.zeros(2, 2)
        step[:, i] = 1e-2
        difference = (posterior.log_prob(theta + step) - posterior.log_prob(theta - step)) / 2e-2
        torch.testing.assert_close(gradient[:, i], difference, atol=0.02, rtol=0.02)
    outside = torch.full((1, 2), 9.0)
    for normalized in ("q", "potential"):
        assert posterior.log_prob(outside, normalized=normalized).item() == -math.inf


def test_the_density_of_q_integrates_to_one() -> None:
    grid = torch.linspace(-3, 3, 201)
    points = torch.cartesian_prod(grid, grid)
    for kind in KINDS:
        total = float(found(kind).log_prob(points).double().exp().sum()) * 0.03**2
        assert total == pytest.approx(1.0, abs=2e-3)


# questions and answers


def test_before_training() -> None:
    posterior = auto()
    assert repr(posterior) == "VIPosterior(D=2, not fitted)" and posterior.default_x is None
    asks: list[Callable[[], Any]] = [
        posterior.sample,
        posterior.weighted_sample,
        lambda: posterior.log_prob(torch.zeros(1, 2)),
        lambda: posterior.log_prob(torch.zeros(1, 2), normalized="potential"),
        posterior.evaluate,
        lambda: posterior.report,
        lambda: posterior.trace,
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"train\(\)"):
            ask()
    with pytest.raises(ValueError, match="`x`"):
        posterior.train(**QUIET)
    with pytest.raises(NotImplementedError, match="RefittingPosterior"):
        posterior.sample_batched((3,), X)


def test_it_belongs_to_its_observation() -> None:
    posterior = trained(auto())
    assert torch.equal(posterior.default_x, X)
    for ask in (posterior.sample, posterior.weighted_sample):
        assert ask(x=X) is not None
        with pytest.raises(ValueError, match="`x`"):
            ask(x=OTHER)
    posterior.default_x = OTHER
    with pytest.raises(ValueError, match="`x`"):
        posterior.sample((2,))
    trained(posterior, None)
    assert (posterior.sample((2000,)).mean(0) - OTHER[0]).abs().max() < 0.06
    with pytest.raises(NotImplementedError, match="train_amortized"):
        posterior.sample_batched((3,), X)


def test_map() -> None:
    posterior = trained(auto(two_modes))
    best = posterior.map(num_iter=200)
    assert min(float((best - X - shift).abs().max()) for shift in (1.5, -1.5)) < 0.01
    assert posterior.map() is best


def test_evaluate_scores_fresh_draws_and_keeps_what_the_fit_knows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    posterior = trained(auto(two_modes), seed=2)  # one of 32 k-hats of fresh draws is above .7
    before, report = posterior.report, posterior.evaluate(N=3000)
    assert report.n_draws == 3000 and report.status == before.status
    assert (report.modes, report.rung, report.story, report.seed) == (
        before.modes,
        before.rung,
        before.story,
        before.seed,
    )
    assert posterior.evaluate("prop", N=3000).proportionality > 0.8
    assert posterior.report is before
    assert capsys.readouterr().out.count("\n") == 2


def test_evaluate_keeps_doubts(capsys: pytest.CaptureFixture[str]) -> None:
    posterior = trained(auto(two_modes), max_potential_evals=65_000)
    assert posterior.report.status == "suspect"
    assert posterior.evaluate(N=20_000).status == "suspect"
    assert "suspect" in capsys.readouterr().out


def test_evaluate_knows_that_draws_are_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    """A q half as wide again as the posterior: raw draws of it differ, corrected ones do not."""

    def flat(theta: Tensor, x_o: Tensor) -> Tensor:
        return 0 * theta[:, 0]

    def narrower(theta: Tensor, x_o: Tensor) -> Tensor:
        return -0.5 * ((theta - 0.1) / 0.45).square().sum(-1)

    for potential, status in ((narrower, "corrected"), (flat, "suspect")):
        posterior = found("mixture", auto(potential), allow_failed=True)
        assert posterior.evaluate(N=20_000).status == posterior.report.status == status
    assert capsys.readouterr().out.count("\n") == 2


def test_words() -> None:
    posterior = trained(auto())
    assert repr(posterior) == "VIPosterior(D=2, fitted by auto: a Gaussian)"
    assert "answered by a Gaussian" in str(posterior.report) and "seed 1" in str(posterior.report)
    assert posterior.trace.num_iters == 0 and posterior.trace.stop_reason == "answered by a Gaussian"


# choosing q, again and again


def test_parameters() -> None:
    for name in ("auto", "AUTO"):
        parameters = VIPosteriorParameters(q=name)
        assert parameters.q == "auto"
        posterior = trained(VIPosterior(log_p, box(), **vars(parameters)))
        assert posterior.report.rung == "a Gaussian"
    with pytest.raises(ValueError, match=r"`q`: expected one of 'auto', 'maf'.*got 'automatic'"):
        VIPosteriorParameters(q="automatic")


def test_amortised_fits_need_a_name() -> None:
    posterior = auto()
    assert amortised(posterior).q.config.flow_type == "maf"
    assert amortised(auto(), flow_type="gaussian").q.config.flow_type == "gaussian"
    assert amortised(auto(), params=VIPosteriorParameters(q="nsf")).q.config.flow_type == "nsf"
    of_instance = amortised(made(q="gaussian"), params=VIPosteriorParameters(q="auto"))
    assert of_instance.q.config.flow_type == "gaussian"  # "auto" is no wish
    with pytest.raises(ValueError, match=r"`flow_type`.*got 'auto'"):
        amortised(auto(), flow_type="auto")


def test_between_all_modes() -> None:
    posterior = trained(auto())
    with pytest.warns(UserWarning, match="replaces the fit to a single observation"):
        amortised(posterior)
    assert posterior.sample((3,), X, correct=True).shape == (3, 2)
    with pytest.raises(ValueError, match=r"`weighted_sample`.*amortised"):
        posterior.weighted_sample(x=X)
    with pytest.raises(ValueError, match=r"`normalized`.*amortised"):
        posterior.log_prob(torch.zeros(1, 2), X, normalized="potential")
    assert posterior.sample_batched((3,), torch.cat([X, OTHER])).shape == (3, 2, 2)
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        trained(posterior)
    assert posterior.report.rung == "a Gaussian" and posterior.sample((3,)).shape == (3, 2)
    posterior.set_q("gaussian")
    fitted(posterior)
    assert posterior.trace.num_iters == SHORT["max_num_iters"] and type(posterior.q.body) is GaussianBody
    posterior.q = "auto"
    with pytest.raises(ValueError, match=r"train\(\)"):
        posterior.sample()
    assert type(trained(posterior).q.body) is MixtureBody


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_as_q_is_a_warm_start(kind: str) -> None:
    lender = found(kind)
    with seeded(3):
        before = lender.sample((10,))
    posterior = auto(q=lender)
    with pytest.raises(ValueError, match=r"train\(\)"):
        posterior.sample()
    assert posterior.q is not lender.q
    later = fitted(made())
    later.set_q(lender)
    for one in (posterior, later):
        assert trained(one, seed=1).report.status == "ok"
        assert (one.sample((2000,)).mean(0) - X[0]).abs().max() < 0.05
    with seeded(3):
        assert torch.equal(lender.sample((10,)), before)


def test_a_found_q_has_nothing_to_train() -> None:
    posterior = made(q=trained(auto()).q)
    with pytest.raises(ValueError, match="`q`: expected trainable parameters"):
        fitted(posterior)
    with pytest.raises(ValueError, match="`q`: expected a family with fresh weights"):
        fitted(posterior, retrain_from_scratch=True)


def test_options_of_q_are_refused() -> None:
    with pytest.raises(ValueError, match="`parameters`"):
        auto(parameters=[torch.zeros(2, requires_grad=True)])


def test_refitting() -> None:
    refitting = RefittingPosterior(auto(), seed=1)
    theta = refitting.sample_batched((500,), torch.cat([X, OTHER]), show_progress_bars=False)
    assert (theta.mean(0) - torch.cat([X, OTHER])).abs().max() < 0.1


# another time


def test_training_again() -> None:
    posterior = trained(auto())
    first = posterior.report
    again = trained(posterior)  # begins with what was found as well
    assert again is posterior and posterior.report.status == "ok" and posterior.report is not first
    trained(posterior, OTHER)
    assert (posterior.sample((2000,)).mean(0) - OTHER[0]).abs().max() < 0.06


def test_retraining_from_scratch_forgets() -> None:
    posterior = trained(auto(two_modes), OTHER, seed=9)
    trained(posterior, retrain_from_scratch=True)
    fresh = trained(auto(two_modes))
    assert posterior.report == fresh.report
    assert all(map(torch.equal, posterior.weighted_sample(99), fresh.weighted_sample(99)))


# elsewhere


@pytest.mark.parametrize("kind", KINDS)
def test_everything_moves(kind: str) -> None:
    posterior = found(kind)
    posterior.map(num_iter=2, num_init_samples=10)
    stays = copy.deepcopy(posterior)
    assert posterior.to("meta") is posterior
    theta = torch.full((2, 2), 0.5)
    moved = {
        "default x": posterior.default_x,
        "map": posterior.map(),
        "corrected draws": posterior.sample((2,)),
        "draws": posterior.sample((2,), correct=False),
        "density": posterior.log_prob(theta),
        "posterior density": posterior.log_prob(theta, normalized="potential"),
        "pool": posterior._state.draws.theta,
        **dict(posterior.q.named_parameters()),
        **dict(posterior.q.named_buffers()),
    }
    assert {name: value.device.type for name, value in moved.items()} == dict.fromkeys(moved, "meta")
    assert stays.sample((2,)).device.type == stays.default_x.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fitted_on_a_gpu_and_moved_back() -> None:
    posterior = trained(auto(two_modes, device="cuda:0"))
    theta = posterior.sample((20,))
    assert theta.device == posterior.default_x.device == torch.device("cuda:0")
    log_q = posterior.log_prob(theta)
    posterior.to("cpu")
    torch.testing.assert_close(posterior.log_prob(theta.cpu()), log_q.cpu(), rtol=1e-4, atol=1e-4)
    assert posterior.sample((2,)).device.type == "cpu"


# what goes wrong


def test_a_potential_that_is_finite_nowhere() -> None:
    with pytest.raises(ValueError, match="`potential_fn`: expected finite values"):
        trained(auto(lambda theta, x_o: theta[:, 0] * math.nan))


def test_a_potential_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match="`potential_fn`"):
        trained(auto(lambda theta, x_o: theta))


def test_an_error_of_the_potential_leaves_the_fit_as_it_was() -> None:
    broken = [False]

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        if broken[0] and len(theta) > 2:
            raise ArithmeticError("mine")
        return log_p(theta, x_o)

    posterior = trained(auto(potential))
    before = posterior.report
    broken[0] = True
    with pytest.raises(ArithmeticError, match="mine"):
        trained(posterior, OTHER)
    assert posterior.report is before and torch.equal(posterior.default_x, X)


def test_failed_says_so_without_a_warning_before() -> None:
    with pytest.raises(FitError) as caught:
        auto().train(X, show_progress_bar=False, max_potential_evals=10)
    assert caught.value.posterior.report is caught.value.report
