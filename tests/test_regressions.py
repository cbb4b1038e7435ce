"""What broke users of other tools, once each: numbered cases, and numbered defects found by reading."""

import copy
import io
import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

from posterior_cases import (
    GOOD,
    OTHER,
    SD,
    SHORT,
    X,
    alone_and_seeded,
    box,
    fitted,
    log_p,
    made,
    real,
    weights,
)
from visbi import VIPosterior
from visbi.certificate.weights import pareto_smooth, resample
from visbi.families import FAMILY_NAMES
from visbi.families.conditional import ConditionalFamily
from visbi.potentials import BasePotential
from visbi.priors import BoxUniform, MultipleIndependent

__all__ = ["alone_and_seeded"]

SMALL = dict(num_transforms=1, hidden_features=4)
STILL: dict[str, Any] = dict(max_num_iters=1, learning_rate=1e-12)


def own(loc: float = 0.0, scale: float = 1.0, dim: int = 2) -> td.Distribution:
    centre, width = torch.full((dim,), loc), torch.full((dim,), scale)
    return td.Independent(td.Normal(centre.requires_grad_(), width.requires_grad_()), 1)


class Module(nn.Module):
    event_shape, batch_shape, has_rsample = torch.Size([2]), torch.Size(), True

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def rsample(self, shape: Any = ()) -> Tensor:
        return td.Independent(td.Normal(self.loc, self.log_scale.exp()), 1).rsample(shape)

    sample = rsample

    def log_prob(self, theta: Tensor) -> Tensor:
        return td.Independent(td.Normal(self.loc, self.log_scale.exp()), 1).log_prob(theta)


def build(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
    return own(dim=event_shape[0])


def mixed() -> MultipleIndependent:
    one = torch.ones(1)
    return MultipleIndependent([BoxUniform(0 * one, one), td.HalfCauchy(one), td.Normal(0 * one, one)])


AMORTISED: dict[str, Any] = dict(
    flow_type="gaussian", hidden_features=8, n_particles=8, max_num_iters=5, show_progress_bar=False
)


def amortised(posterior: VIPosterior | None = None, **options: Any) -> VIPosterior:
    posterior = made() if posterior is None else posterior
    theta = posterior.prior.sample(torch.Size([60]))
    return posterior.train_amortized(theta, theta + SD * torch.randn_like(theta), **{**AMORTISED, **options})


def draws(posterior: VIPosterior, n: int = 20) -> Tensor:
    torch.manual_seed(2)
    return posterior.sample((n,))


def assert_finite(posterior: VIPosterior) -> None:
    theta = posterior.sample((200,))
    assert bool(posterior.prior.support.check(theta).all())
    assert bool(torch.isfinite(theta).all() and torch.isfinite(posterior.log_prob(theta)).all())
    assert all(map(math.isfinite, posterior.trace.loss)) and posterior.trace.skipped == 0


# the cases


@pytest.mark.parametrize("ask", ["sample", "log_prob", "evaluate"])
def test_regression_01_before_train(ask: str) -> None:
    arguments = (torch.zeros(1, 2),) if ask == "log_prob" else ()
    with pytest.raises(ValueError, match=r"train\(\)"):
        getattr(made().set_default_x(X), ask)(*arguments)


@pytest.mark.parametrize("through", ["pickle", "torch"])
@pytest.mark.parametrize("q", [*FAMILY_NAMES, "distribution", "module", "callable"])
def test_regression_03_files(q: str, through: str) -> None:
    kinds: dict[str, Any] = {"distribution": own(), "module": Module(), "callable": build}
    posterior = fitted(made(q=kinds.get(q, q), **SMALL))
    before = weights(posterior)
    if through == "pickle":
        again = pickle.loads(pickle.dumps(posterior))
    else:
        buffer = io.BytesIO()
        torch.save(posterior, buffer)
        again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(weights(posterior), before) and posterior.potential_fn is not again.potential_fn
    assert torch.equal(draws(posterior), draws(again))
    fitted(again)
    assert not torch.equal(weights(again), before) and torch.equal(weights(posterior), before)


@pytest.mark.parametrize("q", ["maf", "gaussian", "distribution", "callable"])
def test_regression_04_a_deepcopys_optimizer_steps_the_copy(q: str) -> None:
    kinds: dict[str, Any] = {"distribution": own(), "callable": build}
    posterior = fitted(made(q=kinds.get(q, q), **SMALL))
    duplicate = copy.deepcopy(posterior)
    held = {id(p) for group in duplicate._state.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in duplicate.q.trainable()}
    before = weights(posterior)
    fitted(duplicate)
    assert torch.equal(weights(posterior), before) and not torch.equal(weights(duplicate), before)


@pytest.mark.parametrize("q", ["gaussian", "callable", "distribution"])
def test_regression_05_retraining_applies_the_link_once(q: str) -> None:
    kinds: dict[str, Any] = {"callable": build, "distribution": own()}
    posterior = made(prior=box(2, 5.0), q=kinds.get(q, q))
    torch.manual_seed(1)
    first = fitted(posterior, **STILL).sample((4000,))
    fitted(posterior)
    second = fitted(posterior, **STILL, retrain_from_scratch=True).sample((4000,))
    for theta in (first, second):  # z ~ N(0, 1) through the link is the prior
        assert theta.abs().max() <= 5
        assert theta.std(0).sub(5 / math.sqrt(3)).abs().max() < 0.15


def test_regression_06_a_warm_start_is_a_copy() -> None:
    first = made(prior=real()).train(X, **GOOD)
    before, state = weights(first), copy.deepcopy(first._state.optimizer.state_dict())
    second = made(prior=real(), q=first)
    assert torch.equal(weights(second), before)
    assert not {id(p) for p in first.q.trainable()} & {id(p) for p in second.q.trainable()}
    fitted(second, OTHER)
    assert not torch.equal(weights(second), before) and torch.equal(weights(first), before)
    assert str(first._state.optimizer.state_dict()) == str(state)
    assert torch.equal(first.default_x, X) and torch.equal(second.default_x, OTHER)


def test_regression_07_a_users_own_q() -> None:
    for q in (own(), Module(), build):
        posterior = made(prior=real(), q=q).train(X, **{**GOOD, "learning_rate": 0.05})
        assert (posterior.sample((2000,)).mean(0) - X[0]).abs().max() < 0.1
        again = fitted(posterior, **STILL, retrain_from_scratch=True).sample((2000,))
        assert again.mean(0).abs().max() < 0.1  # where it began
    with pytest.raises(ValueError, match="`q`: expected trainable parameters"):
        made(q=td.Independent(td.Normal(torch.zeros(2), torch.ones(2)), 1))
    with pytest.raises(ValueError, match="computed"):
        made(q=td.Independent(td.Normal(torch.zeros(2), torch.zeros(2).requires_grad_().exp()), 1))


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("q", FAMILY_NAMES)
def test_regression_08_every_family_in_every_dimension(q: str, dim: int) -> None:
    posterior = fitted(made(prior=box(dim), q=q, **SMALL), torch.zeros(1, dim), max_num_iters=2)
    assert_finite(posterior)
    assert posterior.sample((7,)).shape == (7, dim)


@pytest.mark.parametrize("q", ["gaussian", "maf"])
def test_regression_09_mixed_supports(q: str) -> None:
    assert_finite(fitted(made(prior=mixed(), q=q, **SMALL), torch.full((1, 3), 0.5)))


@pytest.mark.parametrize("level", ["none", "independent", "structured"])
def test_regression_10_a_half_cauchy(level: str) -> None:
    prior = td.Independent(td.HalfCauchy(torch.ones(2)), 1)
    posterior = fitted(made(prior=prior, z_score_theta=level), max_num_iters=30)
    assert_finite(posterior)
    far = torch.tensor([[1e-20, 1e20], [1e6, 1e-6]])
    assert not bool(posterior.log_prob(far).isnan().any())


class Rounded(td.Transform):
    """A map that does not find its way back."""

    domain = codomain = td.constraints.real_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x.round()

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(x.shape[:-1])

    def inverse_shape(self, shape: Any) -> Any:
        return shape


def test_regression_11_a_transform_that_does_not_return() -> None:
    with pytest.warns(
        UserWarning, match="does not return prior draws to where they were; theta is used as it is"
    ):
        posterior = made(prior=real(), theta_transform=Rounded())
    theta = torch.tensor([[0.3, -1.2]])
    assert torch.equal(posterior.theta_transform(theta), theta)
    posterior.train(X, **GOOD)
    assert (posterior.sample((2000,)).mean(0) - X[0]).abs().max() < 0.1


def test_regression_12_map_of_mixed_priors_and_conditioned_potentials() -> None:
    peak = torch.tensor([[0.4, 0.7, -0.2]])
    best = fitted(made(log_p, mixed()), peak).map()
    assert best.shape == (1, 3) and (best - peak).abs().max() < 2e-3

    def conditioned(theta: Tensor, x_o: Tensor) -> Tensor:
        return log_p(torch.cat([theta[:, :1], 0.7 + 0 * theta[:, :1], theta[:, 1:]], 1), x_o)

    best = fitted(made(conditioned, box()), peak).map()
    assert best.shape == (1, 2) and (best - peak[:, [0, 2]]).abs().max() < 2e-3
    assert best.device == peak.device


class Trials(BasePotential):
    """x ~ N(theta, 1), independent trials, under a flat prior."""

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        assert x is not None and x_is_iid
        return -0.5 * (theta[:, None] - x).square().sum((1, 2))


@pytest.mark.parametrize("trials", [1, 16, 32])  # as many as there are particles, too
def test_regression_14_independent_trials_multiply(trials: int) -> None:
    x = X + torch.randn(trials, 2)
    posterior = VIPosterior(
        Trials(), td.Independent(td.Normal(torch.zeros(2), 3 * torch.ones(2)), 1), q="gaussian"
    )
    theta = posterior.train(x, **{**SHORT, "init": "match"}).sample((4000,))
    sd = 1 / math.sqrt(trials)
    assert ((theta.mean(0) - x.mean(0)) / sd).abs().max() < 0.15
    assert (theta.std(0) / sd - 1).abs().max() < 0.15


def test_regression_15_gaussian_upper_triangle() -> None:
    posterior = fitted(made(prior=real(3)), torch.zeros(1, 3))
    body = posterior.q.body
    with torch.no_grad():
        body.raw_below.copy_(torch.tensor([0.05, -0.03, 0.08]))
        body.raw_log_diag.copy_(torch.tensor([0.02, -0.05, 0.0]))
    tril = body.scale_tril.detach()
    assert torch.equal(tril, tril.tril()) and int((tril != 0).sum()) == 6
    exact = td.MultivariateNormal(body.loc.detach(), tril @ tril.mT)
    z = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(body.log_prob(z), exact.log_prob(z))
    drawn = posterior.theta_transform(posterior.sample((40_000,))).double()
    torch.testing.assert_close(torch.cov(drawn.mT), exact.covariance_matrix, atol=0.05, rtol=0.05)


def test_regression_16_torchs_validation_stays_on() -> None:
    assert td.Distribution._validate_args is True
    for q in ("nsf", "gf"):
        fitted(made(q=q, **SMALL))
    assert td.Distribution._validate_args is True
    with pytest.raises(ValueError, match="constraint"):
        td.Normal(torch.zeros(1), -torch.ones(1))


@pytest.mark.parametrize(
    "extra", [dict(method="sir"), dict(oversampling_factor=4), dict(max_sampling_batch=1)]
)
def test_regression_17_unknown_keywords_are_not_swallowed(extra: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(extra))):
        fitted().sample((3,), **extra)
    with pytest.raises(TypeError, match=next(iter(extra))):
        made().train(X, **extra)


def test_regression_18_resampling_weighs_by_p_over_q() -> None:
    q = td.Normal(torch.tensor(0.5), torch.tensor(1.5))
    theta = q.sample((40_000,))
    log_weights = -0.5 * theta.square() - q.log_prob(theta)
    chosen = theta[resample(log_weights, 20_000)]
    assert float(chosen.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(chosen.std()) == pytest.approx(1.0, abs=0.05)  # weights of p alone would give .83


@pytest.mark.parametrize("factor", [1, 32])
def test_regression_19_oversampling_reaches_the_resampling(factor: int) -> None:
    n, q = 2000, td.Normal(torch.tensor(0.5), torch.tensor(1.5))
    candidates = q.sample((factor * n,))
    chosen = resample(-0.5 * candidates.square() - q.log_prob(candidates), n)
    distinct = len(chosen.unique()) / n
    assert distinct < 0.8 if factor == 1 else distinct > 0.95  # few candidates must come up again


@pytest.mark.parametrize("at_once", [4, 30])
def test_regression_19_the_batch_size_reaches_the_sampler(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, sizes, draw = amortised(), [], ConditionalFamily.draw

    def counted(self: ConditionalFamily, x: Tensor, n: int, **options: Any) -> Any:
        sizes.append(n * len(x))
        return draw(self, x, n, **options)

    monkeypatch.setattr(ConditionalFamily, "draw", counted)
    posterior.sample_batched((20,), torch.randn(3, 2), max_sampling_batch_size=at_once)
    assert max(sizes) == at_once - at_once % 3 and sum(sizes) == 60


def test_regression_21_a_pickled_transform_has_its_inverse() -> None:
    theta = torch.tensor([[0.3, -1.2]])
    for prior in (box(), real(), td.Independent(td.HalfCauchy(torch.ones(2)), 1)):
        posterior = fitted(made(prior=prior))
        transform, link = (
            pickle.loads(pickle.dumps(t)) for t in (posterior.theta_transform, posterior.link_transform)
        )
        inside = theta.abs()
        z = posterior.theta_transform(inside)
        for back in (transform.inv(z), link(z), posterior.link_transform.inv.inv(z)):
            torch.testing.assert_close(back, inside, rtol=1e-4, atol=1e-5)


def test_regression_22_devices() -> None:
    buffer = io.BytesIO()
    torch.save(fitted(made(prior=mixed()), torch.zeros(1, 3)), buffer)
    posterior = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False, map_location="meta")
    assert posterior._device == posterior.potential_fn.device == "meta"
    assert posterior.prior.sample().device.type == posterior.sample().device.type == "meta"
    # an index is kept as it was named: cpu:0 is a device torch takes for cpu
    assert fitted(made(device="cpu:0"))._device == "cpu:0"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_regression_23_an_x_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="`x`: expected finite numbers"):
        made().train(torch.tensor([[bad, 0.0]]))


def test_regression_24_one_x_has_one_shape() -> None:
    posterior = fitted(x=X[0])
    assert posterior.default_x.shape == (1, 2)
    for x in (X, X[0], None):
        assert posterior.sample((4,), x=x).shape == (4, 2)
        assert posterior.log_prob(torch.zeros(3, 2), x=x).shape == (3,)
        assert posterior.potential(torch.zeros(3, 2), x=x).shape == (3,)
        assert posterior.map(x, num_iter=2).shape == (1, 2)


@pytest.mark.parametrize("q", ["gaussian", "maf", "callable"])
def test_regression_25_rounds_do_not_pile_up(q: str) -> None:
    posterior = fitted(made(q=build if q == "callable" else q, **SMALL))
    sizes = []
    for _ in range(4):
        posterior = fitted(made(q=posterior))
        sizes.append(len(pickle.dumps(posterior)))
    assert max(sizes) - min(sizes) < 200


def test_regression_25_cycles_do_not_recurse() -> None:
    potential = Trials()
    potential.myself = [potential]  # type: ignore[attr-defined]
    prior = real()
    prior.owner = prior  # type: ignore[attr-defined]
    posterior = fitted(VIPosterior(potential, prior, q="gaussian"))
    duplicate = copy.deepcopy(posterior)
    assert duplicate.potential_fn.myself[0] is not potential  # type: ignore[attr-defined]
    assert duplicate.prior.owner is duplicate.prior  # type: ignore[attr-defined]
    assert torch.equal(draws(duplicate), draws(posterior))
    assert posterior.to("meta").prior.sample().device.type == "meta"


def test_regression_more_seeds_may_be_tensors() -> None:
    state = torch.random.get_rng_state()
    a, b = fitted(seed=torch.tensor(4)), fitted(seed=4)
    assert torch.equal(weights(a), weights(b)) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("q", ["gaussian", "maf"])
@pytest.mark.parametrize("of_prior", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_x", [torch.float32, torch.float64])
def test_regression_more_double_precision(q: str, of_prior: torch.dtype, of_x: torch.dtype) -> None:
    prior = BoxUniform(-3 * torch.ones(2, dtype=of_prior), 3 * torch.ones(2, dtype=of_prior))
    posterior = fitted(made(prior=prior, q=q, **SMALL), X.to(of_x))
    assert_finite(posterior)
    assert posterior.sample((2,)).dtype == of_prior
    assert posterior.log_prob(torch.zeros(2, 2, dtype=of_x)).shape == (2,)


def test_regression_more_options_that_cannot_act_are_not_ignored() -> None:
    with pytest.warns(UserWarning, match="vi_method = 'IW' is not used"):
        amortised(made(vi_method="IW"))
    with pytest.raises(ValueError, match="`init`"):
        made(q=own()).train(X, **SHORT, init="match")
    with pytest.raises(ValueError, match="`parameters`"):
        made(q="maf", parameters=[torch.zeros(1, requires_grad=True)])
    for method in ("train", "sample", "log_prob", "potential", "map", "evaluate"):
        with pytest.raises(TypeError, match="norm_posterior"):
            getattr(fitted(), method)(norm_posterior=True)
    with pytest.raises(TypeError, match="norm_posterior"):
        amortised(norm_posterior=True)


def test_regression_more_a_theta_transform_is_used() -> None:
    own_map = td.transforms.AffineTransform(torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.5]))
    theta = torch.tensor([[0.3, -1.2]])
    for mode in (copy.copy, fitted, amortised):
        one = mode(made(prior=real(), theta_transform=own_map, z_score_theta="none"))
        torch.testing.assert_close(one.theta_transform(theta), own_map(theta))
        torch.testing.assert_close(one.q.coords.to_z(theta)[0].float(), own_map(theta))


@pytest.mark.parametrize("mode", [fitted, amortised])
def test_regression_more_one_device_for_all(mode: Any) -> None:
    posterior = mode(made(q="maf", **SMALL)).set_default_x(X)
    posterior.map(num_iter=2, num_init_samples=10)
    posterior.to("meta")
    theta = torch.zeros(2, 2)  # what a user brings is moved along
    found = [posterior.sample((2,)), posterior.log_prob(theta, X), posterior.potential(theta, X)]
    found += [
        posterior.default_x,
        posterior.map(),
        posterior.prior.sample(),
        posterior.theta_transform(theta.to("meta")),
    ]
    assert {t.device.type for t in (*found, *posterior.q.parameters(), *posterior.q.buffers())} == {"meta"}


@pytest.mark.parametrize("mode", [fitted, amortised])
@pytest.mark.parametrize("nothing", [-math.inf, math.nan])
def test_regression_more_a_diagnostic_of_nothing_ends(nothing: float, mode: Any) -> None:
    posterior = mode(made(lambda theta, x_o: 0 * theta[:, 0] + nothing)).set_default_x(X)
    report = posterior.evaluate(N=100)
    assert report.status != "ok" and report.sentence
    assert bool(torch.isfinite(posterior.map(num_iter=2, num_init_samples=10)).all())


@pytest.mark.parametrize("method", ["rKL", "fKL", "IW", "alpha"])
def test_regression_more_the_defaults_are_not_biased(method: str) -> None:
    posterior = made(prior=real(), vi_method=method).train(X, show_progress_bar=False)
    theta = posterior.sample((20_000,))
    assert ((theta.mean(0) - X[0]) / SD).abs().max() < 0.05
    assert (theta.std(0) / SD - 1).abs().max() < 0.05


def test_regression_more_the_best_weights_are_kept_and_the_end_is_explained() -> None:
    wild = dict(learning_rate=3.0, clip_value=1e6, max_num_iters=60, stop_after_iters=5)
    trace = amortised(**wild).trace
    assert trace.validation_loss[trace.best_iter] == min(trace.validation_loss) < trace.validation_loss[-1]
    assert "no lower held-out loss for stop_after_iters = 5 steps" in trace.stop_reason
    assert fitted().trace.stop_reason == "reached max_num_iters = 3"


# the defects


def gradient(method: str, potential: Any = log_p, prior: Any = None, **options: Any) -> Tensor:
    posterior = made(potential, real() if prior is None else prior, vi_method=method)
    before = weights(posterior)
    plain = dict(max_num_iters=1, optimizer=torch.optim.SGD, clip_value=1e9, seed=3)
    return weights(fitted(posterior, **{**plain, **options})) - before


def test_defect_01_iw_is_not_rkl() -> None:
    one = gradient("rKL", n_particles=256)
    for k in (2, 8):
        many = gradient("IW", n_particles=256 // k, K=k)
        assert (many - one).norm() > 0.1 * one.norm()
    two, eight = (gradient("IW", n_particles=32, K=k) for k in (2, 8))
    assert (two - eight).norm() > 0.01 * eight.norm()  # K is not idle
    total = dict(dreg=False, stick_the_landing=False)
    assert torch.allclose(gradient("IW", K=1, **total), gradient("rKL", **total), rtol=1e-6)


@pytest.mark.parametrize(("scale", "theory"), [(0.8, 0.36), (0.6, 0.64), (0.5, 0.75)])
def test_defect_02_khat_not_biased_low(scale: float, theory: float) -> None:
    found = []
    for _ in range(5):
        theta = scale * torch.randn(50_000, dtype=torch.float64)
        found.append(pareto_smooth(0.5 * theta.square() * (1 / scale**2 - 1))[1])
    assert sum(found) / 5 == pytest.approx(theory, abs=0.12)


@pytest.mark.parametrize("shift", [-1e3, -110.0, 90.0, 1e3])
@pytest.mark.parametrize("method", ["rKL", "fKL", "IW", "alpha"])
def test_defect_03_weights_do_not_overflow(method: str, shift: float) -> None:
    moved = gradient(method, lambda theta, x_o: log_p(theta, x_o) + shift)
    torch.testing.assert_close(moved, gradient(method), rtol=2e-2, atol=1e-6)
    posterior = fitted(made(lambda theta, x_o: log_p(theta, x_o) + shift, vi_method=method))
    assert all(map(math.isfinite, posterior.trace.loss))
    assert math.isfinite(posterior.report.log_evidence)
    report = posterior.evaluate("prop", N=500)
    assert report.proportionality is not None and 0 <= report.proportionality <= 1


def test_defect_05_eps_counts_on_the_first_call() -> None:
    posterior = fitted(max_num_iters=210, n_particles=64, eps=1e6)
    assert posterior._state.options.eps == 1e6 and posterior.trace.num_iters == 200


def test_defect_06_quality_control_keeps_its_hands_off() -> None:
    sizes: list[int] = []

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        sizes.append(len(theta))
        return log_p(theta, x_o)

    q = own(2.0, 0.01)
    posterior = made(potential, real(), q=q)
    with pytest.warns(UserWarning, match="Quality of q") as caught:
        posterior.train(OTHER, **{**SHORT, "n_particles": 19, "quality_control": True})
    assert len(caught) == 1 and sizes[:4] == [2, 19, 19, 19] and 19 not in sizes[4:]
    assert torch.equal(posterior.default_x, OTHER)
    options = posterior._state.options
    assert (options.n_particles, options.max_num_iters, options.learning_rate) == (19, 3, 1e-3)


@pytest.mark.parametrize("nothing", [-math.inf, math.nan])
def test_defect_08_resampling_nothing_is_an_error(nothing: float) -> None:
    with pytest.raises(ValueError, match="at least one finite log-weight"):
        resample(torch.full((100,), nothing), 10)


def test_defect_09_what_was_found_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    posterior = fitted()
    report = posterior.evaluate(N=500)
    assert report.n_draws == 500 and f"{report.khat:.3f}" in capsys.readouterr().out
    assert len(posterior.trace.loss) == 3 and posterior.trace.loss[0] > posterior.trace.loss[2] - 1


@pytest.mark.parametrize("x_shape", [(1, 6, 6), (5, 2), (4, 1, 3)])
def test_defect_10_networks_that_embed_and_x_of_more_axes(
    x_shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    class Mean(nn.Module):
        """(M, ...) -> (M, 3), of whatever shape."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1)[..., None]).relu().mean(1)

    prior = real()
    theta = prior.sample(torch.Size([80]))
    spread = theta.sum(1).view(80, *[1] * len(x_shape))
    x = spread + torch.randn(80, *x_shape)

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        assert x.shape[1:] == x_shape
        return prior.log_prob(theta) - 0.5 * (x.flatten(1) - theta.sum(1)[:, None]).square().sum(1)

    for net in (None, Mean()):
        posterior = VIPosterior(potential, prior)
        posterior.train_amortized(theta, x, **AMORTISED, embedding_net=net)
        assert posterior.sample((4,), x[0]).shape == (4, 2)
        assert posterior.sample_batched((4,), x[:3]).shape == (4, 3, 2)
        assert posterior.log_prob(theta[:3], x[:3]).shape == (3,)
        posterior.set_default_x(x[0])
        report = posterior.evaluate(N=200)  # of the one that it is asked about
        assert report.n_draws == 200 and f"{report.khat:.3f}" in capsys.readouterr().out


def test_defect_11_a_seeded_fit_depends_on_nothing_before_it() -> None:
    def second(between: int) -> Tensor:
        torch.manual_seed(between)
        return weights(fitted(made(q="maf", **SMALL), seed=1, retrain_from_scratch=True))

    assert torch.equal(second(1), second(2))


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_defect_12_a_loss_that_is_not_finite_costs_one_step(later: bool) -> None:
    broken = [False]

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        values = log_p(theta, x_o)
        return values * math.nan if broken[0] else values

    heavy = partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01)
    posterior = made(potential)
    if later:
        fitted(posterior, optimizer=heavy)
    before = weights(posterior)
    broken[0] = True
    fitted(posterior, optimizer=heavy)
    assert torch.equal(weights(posterior), before)  # no snapshot, no warm-up
    assert posterior.trace.skipped == 3 and posterior.trace.num_iters == 3
    held = posterior._state.optimizer.param_groups[0]
    assert (held["momentum"], held["weight_decay"]) == (0.9, 0.01)
    broken[0] = False
    assert fitted(posterior, optimizer=heavy).trace.skipped == 0
    assert not torch.equal(weights(posterior), before)
