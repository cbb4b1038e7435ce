"""`VIPosterior` for one observation: bad input, signatures, and what the published contract promises."""

import copy
import inspect
import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor

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
from visbi.families import FAMILY_NAMES
from visbi.potentials import CustomPotential
from visbi.priors import BoxUniform, MultipleIndependent

__all__ = ["alone_and_seeded"]

BAD = [math.nan, math.inf, -math.inf]


class Quacking:
    """The field's stateful interface, nothing more."""

    def __init__(self, x: Tensor | None = None, prior: Any = None) -> None:
        self.prior, self.device, self.x_is_iid, self._x = prior, "cpu", True, x

    def set_x(self, x: Tensor | None, x_is_iid: bool = True) -> None:
        self._x, self.x_is_iid = x, x_is_iid

    @property
    def x_o(self) -> Tensor | None:
        return self._x

    def return_x_o(self) -> Tensor | None:
        return self._x

    def to(self, device: str) -> None:
        self.device = device

    def __call__(self, theta: Tensor, track_gradients: bool = True) -> Tensor:
        assert self._x is not None
        with torch.set_grad_enabled(track_gradients):
            return log_p(theta, self._x)


# bad input: construction


class WithoutSupport(td.Distribution):
    arg_constraints = {}

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * value.square().sum(-1)


def test_a_prior_without_support_is_an_error_unless_there_is_a_transform() -> None:
    with pytest.raises(
        ValueError, match=r"`prior`: expected .*`support`.*theta_transform.*; got WithoutSupp"
    ):
        made(prior=WithoutSupport())
    identity = td.transforms.AffineTransform(torch.zeros(2), torch.ones(2))
    assert fitted(made(prior=WithoutSupport(), theta_transform=identity)).sample((3,)).shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(potential_fn=None, prior=box()),
            TypeError,
            "`potential_fn`: expected a BasePotential or a call",
        ),
        (dict(potential_fn=log_p), ValueError, "`prior`: expected a Distribution"),
        (dict(potential_fn=log_p, prior=[box()]), TypeError, "`prior`: expected a torch Distribution"),
        (dict(potential_fn=log_p, prior=td.Uniform(torch.zeros(2), 1)), ValueError, "`prior`: .*BoxUniform"),
    ],
)
def test_potential_and_prior(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VIPosterior(**arguments)


@pytest.mark.parametrize("name", ["num_transforms", "hidden_features"])
@pytest.mark.parametrize("value", [0, -1, 2.5, math.nan])
def test_sizes(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`: expected a whole number >= 1"):
        made(**{name: value})


@pytest.mark.parametrize("name", ["z_score_theta", "z_score_x"])
@pytest.mark.parametrize("value", ["", "Independent", None, True])
def test_z_scores(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`: expected one of 'none', 'independent', 'structured'"):
        made(**{name: value})


@pytest.mark.parametrize("q", ["mafia", "MAF", "", None, 3, [], torch.zeros(2)])
def test_an_unknown_family_lists_the_known_ones(q: Any) -> None:
    for attempt in (lambda: made(q=q), lambda: made().set_q(q)):
        with pytest.raises(ValueError, match="`q`: expected one of ") as error:
            attempt()
        assert all(repr(name) in str(error.value) for name in FAMILY_NAMES)


@pytest.mark.parametrize("method", ["rkl", "RKL", "iw", "", None, 0, "Alpha"])
def test_an_unknown_method_lists_the_known_ones(method: Any) -> None:
    posterior = made()
    expected = "`vi_method`: expected one of 'rKL', 'fKL', 'IW', 'alpha'"
    for attempt in (lambda: made(vi_method=method), lambda: posterior.set_vi_method(method)):
        with pytest.raises(ValueError, match=expected):
            attempt()
    with pytest.raises(ValueError, match=expected):
        posterior.vi_method = method
    assert posterior.vi_method == "rKL"


def test_a_posterior_of_another_length_is_no_start() -> None:
    with pytest.raises(ValueError, match="`q`: expected a posterior over 2 parameters, as the prior; got 3"):
        made(q=made(prior=box(3)))


@pytest.mark.parametrize("q", ["gaussian", made()])
@pytest.mark.parametrize("name", ["parameters", "modules"])
def test_parameters_are_not_dropped_for_a_q_that_brings_its_own(name: str, q: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`: expected None"):
        made(q=q, **{name: [torch.ones(2, requires_grad=True)]})


def test_x_shape_is_deprecated_and_ignored() -> None:
    with pytest.warns(DeprecationWarning, match="`x_shape` is deprecated and ignored") as caught:
        posterior = made(x_shape=torch.Size([7]))
    assert caught[0].filename == inspect.getfile(made)  # the line that passed it
    assert fitted(posterior).sample((3,)).shape == (3, 2)


# bad input: x


@pytest.mark.parametrize("bad", BAD)
def test_x_must_be_finite(bad: float) -> None:
    x = torch.tensor([[0.0, bad]])
    posterior = fitted()
    attempts = [
        lambda: made().train(x),
        lambda: posterior.train(x),
        lambda: posterior.set_default_x(x),
        lambda: posterior.sample((1,), x=x),
        lambda: posterior.log_prob(torch.zeros(1, 2), x=x),
        lambda: posterior.potential(torch.zeros(1, 2), x=x),
        lambda: posterior.map(x),
        lambda: VIPosterior(Quacking(x, box()), q="gaussian"),
        lambda: CustomPotential(log_p, box(), x),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"`x(_o)?`: expected finite numbers; got 1 of 2 NaN or Inf"):
            attempt()
    assert torch.equal(posterior.default_x, X)


@pytest.mark.parametrize("x", ["0.3", object()])
def test_x_must_be_a_tensor(x: Any) -> None:
    with pytest.raises(TypeError, match="`x`: expected a tensor"):
        made().train(x)


@pytest.mark.parametrize("potential", [log_p, CustomPotential(log_p), Quacking()])
def test_a_missing_x(potential: Any) -> None:
    posterior = made(potential)
    theta = torch.zeros(1, 2)
    missing = r"`x`: expected an observation \(pass x or call set_default_x\); got None"
    for attempt in (
        lambda: posterior.train(**SHORT),
        lambda: posterior.potential(theta),
        lambda: posterior.map(init_method="prior", num_iter=1),
    ):
        with pytest.raises(ValueError, match=missing):
            attempt()


def test_a_callable_may_have_its_observation_inside() -> None:
    posterior = made(lambda theta, _: log_p(theta, X)).train(**GOOD)
    assert posterior.default_x is None
    assert (posterior.sample((2000,)).mean(0) - X[0]).abs().max() < 0.1
    with pytest.raises(ValueError, match="`x`"):
        posterior.sample((1,), x=X)


def test_a_type_error_of_the_potential_itself_is_not_blamed_on_x() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        made(lambda theta, x_o: theta + "a").train(X, **SHORT)


@pytest.mark.parametrize("entry", [0, 1])
def test_an_x_that_differs_in_any_entry_is_another_one(entry: int) -> None:
    posterior, near = fitted(), X.clone()
    near[0, entry] += 1e-6
    for x in (near, X[:, :1], torch.cat([X, X]), OTHER):
        with pytest.raises(
            ValueError, match=r"`x`: expected the observation that q was fitted to \(call train"
        ):
            posterior.sample((2,), x=x)
        with pytest.raises(ValueError, match="`x`"):
            posterior.log_prob(torch.zeros(1, 2), x=x)
    for x in (X, X[0], X.clone(), None):
        assert posterior.sample((2,), x=x).shape == (2, 2)
        assert posterior.log_prob(torch.zeros(1, 2), x=x).shape == (1,)


def test_a_new_default_x_is_another_one() -> None:
    posterior = fitted().set_default_x(OTHER)
    with pytest.raises(ValueError, match="`x`: expected the observation that q was fitted to"):
        posterior.sample((2,))
    with pytest.raises(ValueError, match="`x`"):
        posterior.log_prob(torch.zeros(1, 2))
    assert posterior.sample((2,), x=X).shape == (2, 2)  # the one it was fitted to still is
    assert posterior.map(num_iter=200).sub(OTHER).abs().max() < 0.02
    assert fitted(posterior, x=None).sample((2,)).shape == (2, 2)
    assert torch.equal(posterior.default_x, OTHER)


@pytest.mark.parametrize("x_o", [X, X[0]])
def test_the_observation_of_the_potential_is_the_default(x_o: Tensor) -> None:
    for potential in (CustomPotential(log_p, box(), x_o), Quacking(x_o, box())):
        posterior = fitted(VIPosterior(potential, q="gaussian"), x=None)
        assert posterior.sample((2,), x=x_o).shape == (2, 2)
        assert torch.equal(posterior.default_x, X)


# bad input: potentials


@pytest.mark.parametrize(
    ("potential", "error", "got"),
    [
        (lambda theta, x_o: theta - x_o, ValueError, r"got \(2, 2\)"),
        (lambda theta, x_o: (theta - x_o).sum(), ValueError, r"got \(\)"),
        (lambda theta, x_o: theta[:1, 0], ValueError, r"got \(1,\)"),
        (lambda theta, x_o: 1.0, TypeError, "got float"),
        (lambda theta, x_o: theta[:, 0].detach().numpy(), TypeError, "got ndarray"),
        (lambda theta, x_o: None, TypeError, "got NoneType"),
    ],
)
def test_what_a_potential_returns(potential: Any, error: type[Exception], got: str) -> None:
    posterior = made(potential)
    before = weights(posterior)
    for attempt in (
        lambda: posterior.train(X, show_progress_bar=False),
        lambda: posterior.potential(torch.zeros(2, 2), X),
        lambda: posterior.map(X, init_method=torch.zeros(2, 2)),
    ):
        with pytest.raises(error, match=f"`potential_fn`: expected to return .*{got}"):
            attempt()
    assert torch.equal(weights(posterior), before)  # seen before the fit began


@pytest.mark.parametrize("bad", BAD)
def test_a_potential_that_is_not_finite_is_counted_and_left_out(bad: float) -> None:
    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return torch.where(theta[:, 0] > 1.5, bad, log_p(theta, x_o))

    posterior = made(potential).train(X, **GOOD)
    assert posterior.trace.excluded > 0
    assert bool(torch.isfinite(weights(posterior)).all())
    assert (posterior.sample((2000,)).mean(0) - X[0]).abs().max() < 0.1


# bad input: keywords


@pytest.mark.parametrize(
    ("typo", "meant"), [("n_partcles", "n_particles"), ("learning_rat", "learning_rate"), ("k", "Known: ")]
)
def test_an_unknown_keyword_of_train_names_the_nearest(typo: str, meant: str) -> None:
    posterior = made()
    for attempt in (posterior, fitted(made())):
        with pytest.raises(TypeError, match=rf"`{typo}`: expected a keyword of train\(\).*{meant}"):
            attempt.train(X, **{typo: 3})


@pytest.mark.parametrize("method", ["sample", "log_prob", "potential", "map", "evaluate", "set_q", "to"])
def test_no_other_method_swallows_keywords(method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm_posterior'"):
        getattr(fitted(), method)(norm_posterior=True)


RANGES = {
    **{key: [0, -1, math.nan] for key in ("n_particles", "max_num_iters", "learning_rate", "clip_value")},
    **{key: [-1, 0.5] for key in ("min_num_iters", "warm_up_rounds")},
    "gamma": [0.0, -0.1, 1.01, math.nan],
    "quality_control_metric": ["khat", None],
    "eps": [-1.0],
    "K": [0],
    "alpha": [-1.0],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in RANGES.items() for v in values])
def test_values_out_of_range(name: str, value: Any) -> None:
    posterior = fitted()
    before = weights(posterior)
    for one in (made(), posterior):
        with pytest.raises(ValueError, match=f"`{name}`: expected .*; got "):
            one.train(OTHER, **{name: value})
    assert torch.equal(weights(posterior), before) and torch.equal(posterior.default_x, X)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 1), (2, 4, 2), (4, 0)])
def test_theta_of_wrong_length(shape: tuple[int, ...]) -> None:
    posterior = fitted()
    for method in (posterior.log_prob, posterior.potential):
        with pytest.raises(ValueError, match=r"`theta`: expected shape \(batch, 2\); got \("):
            method(torch.zeros(shape))
    with pytest.raises(ValueError, match="`theta`"):
        posterior.map(init_method=torch.zeros(shape))


def test_theta_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="`theta`: expected a tensor; got str"):
        fitted().log_prob("theta")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (5, TypeError, "a shape such as (100,); got 5"),
        ("ab", TypeError, "a shape such as (100,); got 'ab'"),
        ((-1,), ValueError, "no negative number; got (-1,)"),
    ],
)
def test_sample_shapes(shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'`sample_shape`: expected {message}')}$"):
        fitted().sample(shape)


def test_a_failed_fit_warns() -> None:
    def far(theta: Tensor, x_o: Tensor) -> Tensor:
        return -0.5 * ((theta - 2.5) / 0.01).square().sum(-1)

    options = {**SHORT, "max_num_iters": 1, "quality_control": True}
    with pytest.warns(
        UserWarning, match=r"^Quality of q: k-hat .* q misses essential parts of the posterior"
    ):
        posterior = made(far).train(X, **options)
    assert posterior.report.status == "failed"


def test_before_train() -> None:
    posterior = made().set_default_x(X)
    for attempt in (
        lambda: posterior.sample((2,)),
        lambda: posterior.sample((2,), x=X),
        lambda: posterior.log_prob(torch.zeros(1, 2)),
        lambda: posterior.evaluate(),
        lambda: posterior.map(),
        lambda: posterior.report,
        lambda: posterior.trace,
    ):
        with pytest.raises(ValueError, match=r"call train\(\)"):
            attempt()
    assert posterior.potential(torch.zeros(1, 2)).shape == (1,)  # needs no q
    assert "not fitted" in repr(posterior) and "3 steps" in repr(fitted(posterior))


def test_sample_batched_says_what_to_do_instead() -> None:
    with pytest.raises(NotImplementedError, match=r"train_amortized\(\)"):
        fitted().sample_batched((2,), torch.cat([X, OTHER]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_iter=0), "`num_iter`"),
        (dict(num_to_optimize=0), "`num_to_optimize`"),
        (dict(learning_rate=0.0), "`learning_rate`"),
        (dict(init_method="q"), "`init_method`: expected one of 'proposal', 'posterior', 'prior'"),
        (dict(init_method=torch.full((1, 2), math.nan)), "`init_method`: expected finite"),
        (dict(num_init_samples=0), "`num_init_samples`"),
        (dict(save_best_every=0), "`save_best_every`"),
    ],
)
def test_options_of_map(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted().map(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(quality_control_metric="khat"),
            "`quality_control_metric`: expected one of 'psis', 'prop', 'prop_",
        ),
        (dict(N=0), "`N`: expected a whole number >= 1"),
        (dict(N=10), "`N`: expected at least 25 draws; got 10"),
    ],
)
def test_options_of_evaluate(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted().evaluate(**options)


# the published signatures

PUBLISHED = {
    "__init__": "potential_fn, prior=None, q='maf', theta_transform=None, vi_method='rKL', device='cpu', "
    "x_shape=None, parameters=None, modules=None, num_transforms=5, hidden_features=50, "
    "z_score_theta='independent', z_score_x='independent'",
    "to": "device",
    "set_q": "q, parameters=None, modules=None",
    "set_vi_method": "method",
    "sample": "sample_shape=(), x=None, show_progress_bars=True",
    "sample_batched": "sample_shape, x, max_sampling_batch_size=10000, show_progress_bars=True",
    "log_prob": "theta, x=None, track_gradients=False",
    "train": "x=None, n_particles=256, learning_rate=0.001, gamma=0.999, max_num_iters=2000, "
    "min_num_iters=10, clip_value=10.0, warm_up_rounds=100, retrain_from_scratch=False, "
    "reset_optimizer=False, show_progress_bar=True, check_for_convergence=True, quality_control=True, "
    "quality_control_metric='psis', **kwargs",
    "train_amortized": "theta, x, n_particles=128, learning_rate=0.001, gamma=0.999, max_num_iters=500, "
    "clip_value=5.0, batch_size=64, validation_fraction=0.1, validation_batch_size=None, "
    "validation_n_particles=None, stop_after_iters=20, show_progress_bar=True, retrain_from_scratch=False, "
    "flow_type=None, num_transforms=None, hidden_features=None, z_score_theta=None, z_score_x=None, "
    "params=None",
    "potential": "theta, x=None, track_gradients=False",
    "set_default_x": "x",
    "evaluate": "quality_control_metric='psis', N=50000",
    "map": "x=None, num_iter=1000, num_to_optimize=100, learning_rate=0.01, init_method='proposal', "
    "num_init_samples=10000, save_best_every=10, show_progress_bars=False, force_update=False",
}


@pytest.mark.parametrize("method", [name for name in PUBLISHED if hasattr(VIPosterior, name)])
def test_signature_is_the_published_one(method: str) -> None:
    published = inspect.signature(eval(f"lambda self, {PUBLISHED[method]}: None")).parameters
    ours = inspect.signature(getattr(VIPosterior, method)).parameters
    extra = {name: p for name, p in ours.items() if name not in published}
    assert all(p.kind is p.KEYWORD_ONLY for p in extra.values())
    shared = [p for name, p in ours.items() if name in published]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in published.values()
    ]


def test_published_properties() -> None:
    posterior = fitted()
    assert torch.equal(posterior.default_x, X)
    assert posterior.q.event_shape == (2,)
    posterior.default_x = OTHER
    assert torch.equal(posterior.default_x, OTHER)
    posterior.q = "gaussian_diag"
    assert posterior.q.body.raw_below is None


# what holds for a fit


def test_the_known_posterior_is_found() -> None:
    posterior = made(prior=real()).train(X, **GOOD)
    theta = posterior.sample((4000,))
    assert (theta.mean(0) - X[0]).abs().max() < 0.05 and (theta.std(0) - SD).abs().max() < 0.05
    assert (posterior.map() - X).abs().max() < 1e-3
    at = torch.tensor([[0.3, -0.5], [0.8, -0.5]])
    assert float(posterior.log_prob(at).diff()) == pytest.approx(-0.5, abs=0.05)
    assert posterior.report.status == "ok"
    evidence = math.log(2 * math.pi * SD**2)
    assert posterior.report.log_evidence == pytest.approx(evidence, abs=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), [4]])
def test_shapes_of_draws(shape: Any) -> None:
    theta = fitted().sample(shape)
    assert theta.shape == (*shape, 2) and not theta.requires_grad


def test_shapes_of_log_prob_and_potential() -> None:
    posterior = fitted()
    for method in (posterior.log_prob, posterior.potential):
        assert method(torch.zeros(5, 2)).shape == (5,)
        assert method(torch.zeros(2)).shape == (1,)
        assert method(torch.zeros(0, 2)).shape == (0,)


def test_outside_the_support() -> None:
    inside, outside = (
        torch.zeros(1, 2),
        torch.tensor([[4.0, 0.0], [0.0, -3.5], [math.nan, 0.0], [math.inf, 0]]),
    )
    posterior = fitted()
    log_q = posterior.log_prob(torch.cat([outside, inside]))
    assert bool((log_q[:-1] == -math.inf).all()) and bool(torch.isfinite(log_q[-1]))
    theta = torch.cat([outside, inside]).requires_grad_()
    posterior.log_prob(theta, track_gradients=True)[-1].backward()
    assert bool(torch.isfinite(theta.grad).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_and_densities_are_in_the_priors_dtype(dtype: torch.dtype) -> None:
    prior = BoxUniform(-3 * torch.ones(2, dtype=dtype), 3 * torch.ones(2, dtype=dtype))
    posterior = fitted(made(prior=prior), x=X.to(dtype))
    theta = posterior.sample((3,))
    assert theta.dtype == posterior.log_prob(theta).dtype == posterior.map(num_iter=2).dtype == dtype


def test_train_returns_the_posterior_and_keeps_why_it_stopped() -> None:
    posterior = made()
    assert fitted(posterior) is posterior
    assert posterior.trace.stop_reason == "reached max_num_iters = 3"
    assert posterior.report.stop_reason == posterior.trace.stop_reason
    assert "reached max_num_iters = 3" in str(posterior.report)
    assert len(posterior.trace.loss) == 3


def test_ctrl_c_ends_the_fit_and_keeps_it() -> None:
    calls = 0

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return log_p(theta, x_o)

    posterior = fitted(made(potential), max_num_iters=50)
    assert posterior.trace.stop_reason == "interrupted" and posterior.trace.num_iters == 4
    assert posterior.sample((2,)).shape == (2, 2)


def test_q_starts_as_the_prior() -> None:
    prior = td.Independent(td.Normal(torch.tensor([4.0, -2.0]), torch.tensor([0.1, 7.0])), 1)
    posterior = fitted(made(prior=prior, z_score_theta="none"), max_num_iters=1, learning_rate=1e-12)
    off = posterior.sample((500,)).mean(0) - prior.mean
    assert off.abs().max() > 1  # not where it is built
    options = dict(max_num_iters=1, learning_rate=1e-12, warm_up_rounds=1000)
    theta = fitted(made(prior=prior, z_score_theta="none"), **options).sample((4000,))
    assert ((theta.mean(0) - prior.mean) / prior.stddev).abs().max() < 0.15
    assert (theta.std(0) / prior.stddev - 1).abs().max() < 0.15


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("method", ["rKL", "fKL", "IW", "alpha"])
def test_every_method_finds_the_known_posterior(method: str, dim: int) -> None:
    x = torch.linspace(-0.5, 0.5, dim)[None]
    posterior = made(prior=real(dim), vi_method=method).train(x, **{**GOOD, "n_particles": 256})
    theta = posterior.sample((4000,))
    assert (theta.mean(0) - x[0]).abs().max() < 0.12 and (theta.std(0) - SD).abs().max() < 0.12


def test_the_four_methods_give_four_gradients() -> None:
    moved = []
    for method in ("rKL", "fKL", "IW", "alpha"):
        posterior = made(vi_method=method)
        before = weights(posterior)
        fitted(posterior, max_num_iters=1, optimizer=torch.optim.SGD, seed=0, clip_value=1e9)
        moved.append(weights(posterior) - before)
    for i, one in enumerate(moved):
        assert all((one - other).norm() > 0.01 * one.norm() for other in moved[:i])


def test_a_family_that_cannot_be_rebuilt_says_so() -> None:
    theta = box().sample(torch.Size([50]))
    simulations = (theta, theta + SD * torch.randn_like(theta))
    options: dict[str, Any] = dict(max_num_iters=3, n_particles=4, show_progress_bar=False)
    amortised = made().train_amortized(*simulations, **options)
    posterior = fitted(made(q=amortised.q.at(X)))  # q(theta | X) as a start for a fit to X
    before, trace = weights(posterior), posterior.trace
    with pytest.raises(ValueError, match="`q`: expected a family that can be rebuilt"):
        fitted(posterior, retrain_from_scratch=True)
    assert torch.equal(weights(posterior), before) and posterior.trace is trace
    with pytest.warns(UserWarning, match="replaces the fit to a single observation"):
        posterior.train_amortized(*simulations, flow_type="gaussian", **options)
    assert posterior.sample((3,), X).shape == (3, 2)  # not lost for want of a fresh q(theta)


# the maximum


def test_the_map_is_kept_until_x_changes() -> None:
    calls = 0

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return log_p(theta, x_o)

    posterior = fitted(made(potential))
    first = posterior.map(num_iter=100)
    before = calls
    assert posterior.map(num_iter=100) is first and calls == before
    fitted(posterior)  # the same x
    before = calls
    assert posterior.map(num_iter=100) is first and calls == before
    assert posterior.map(num_iter=100, force_update=True) is not first and calls > before
    assert (posterior.map(OTHER, num_iter=200) - OTHER).abs().max() < 0.02  # another x, and kept is the old
    before = calls
    assert (posterior.map() - X).abs().max() < 0.05 and calls == before
    posterior.set_default_x(OTHER)
    assert (posterior.map(num_iter=200) - OTHER).abs().max() < 0.02
    fitted(posterior, X)
    assert (posterior.map(num_iter=200) - X).abs().max() < 0.02


def test_ctrl_c_in_map_keeps_the_best_so_far() -> None:
    calls = 0

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt
        return log_p(theta, x_o)

    posterior = made(potential).set_default_x(X)
    start = OTHER.clone()
    best = posterior.map(init_method=start, save_best_every=1)
    assert log_p(best, X) > log_p(start, X)
    assert posterior.map() is best  # can be asked for again


@pytest.mark.parametrize("peak", [[0.3, 0.5, 1.0], [5.0, -1.0, 2.0]])
def test_map_of_a_mixed_prior_and_at_its_bounds(peak: list[float]) -> None:
    one = torch.ones(1)
    prior = MultipleIndependent([BoxUniform(0 * one, one), td.HalfCauchy(one), td.Normal(0 * one, one)])
    posterior = fitted(
        made(lambda theta, x_o: -0.5 * (theta - x_o).square().sum(-1), prior), torch.tensor([peak])
    )
    nearest = torch.tensor([min(peak[0], 1.0), max(peak[1], 0.0), peak[2]])
    best = posterior.map()
    assert best.shape == (1, 3)
    assert (best[0] - nearest).abs().max() < 5e-3 and bool(prior.support.check(best[0]).all())


# scores


def wide(scale: float, prior: Any = None) -> VIPosterior:
    """q = N(0, scale^2) in one dimension, its potential N(0, 1), as of a fit that did nothing."""
    real = td.Independent(td.Normal(torch.zeros(1), 3 * torch.ones(1)), 1)
    q = td.Independent(
        td.Normal(torch.zeros(1, requires_grad=True), torch.tensor([scale]).requires_grad_()), 1
    )
    posterior = VIPosterior(lambda theta, x_o: 7.0 - 0.5 * theta[:, 0].square(), prior or real, q=q)
    return fitted(posterior, torch.zeros(1, 1), max_num_iters=1, learning_rate=1e-12)


@pytest.mark.parametrize(("scale", "khat"), [(0.6, 0.64), (0.8, 0.36)])
def test_evaluate_psis(scale: float, khat: float, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = wide(scale)
    report = posterior.evaluate()
    assert report.n_draws == 50_000
    assert report.khat == pytest.approx(khat, abs=0.2)
    line = capsys.readouterr().out
    assert line == f"k-hat {report.khat:.3f} ({report.status}): {report.sentence}\n"
    if scale > math.sqrt(0.5):  # else the weights have no variance
        share = math.sqrt(2 * scale**2 - 1) / scale**2  # E[w]^2 / E[w^2]
        assert report.ess_fraction == pytest.approx(share, abs=0.05)
    assert report.log_evidence == pytest.approx(7.0 + 0.5 * math.log(2 * math.pi), abs=0.05)
    exact = 2 * abs(gaussian_mass(scale) - gaussian_mass(scale, of_p=True))
    assert report.total_variation == pytest.approx(exact, abs=0.03)


def gaussian_mass(scale: float, *, of_p: bool = False) -> float:
    """Half the mass between the points where N(0, 1) and N(0, scale^2) cross, of either."""
    crossing = math.sqrt(-2 * math.log(scale) / (1 / scale**2 - 1))
    return 0.5 * math.erf(crossing / (1.0 if of_p else scale) / math.sqrt(2))


def r_squared(scale: float, spread: float) -> float:
    """1 - E[(p - b q)^2] / Var p for p = exp(-t^2/2), q = exp(-t^2 / 2 scale^2), t ~ N(0, spread^2)."""

    def mean_of(precision: float) -> float:  # E exp(-precision t^2 / 2)
        return 1 / math.sqrt(1 + precision * spread**2)

    pp, pq, qq = mean_of(2.0), mean_of(1 + scale**-2), mean_of(2 * scale**-2)
    return 1 - (pp - pq**2 / qq) / (pp - mean_of(1.0) ** 2)


@pytest.mark.parametrize("scale", [0.6, 1.0, 2.0])
@pytest.mark.parametrize(("metric", "prior_spread"), [("prop", None), ("prop_prior", 3.0)])
def test_evaluate_prop(
    metric: str, prior_spread: float | None, scale: float, capsys: pytest.CaptureFixture[str]
) -> None:
    report = wide(scale).evaluate(metric, N=20_000)
    exact = r_squared(scale, prior_spread or scale)
    assert report.proportionality == pytest.approx(exact, abs=0.03)
    assert report.n_draws == 20_000
    assert capsys.readouterr().out.startswith(f"{metric} r^2 {report.proportionality:.3f} (1 is best): ")


def test_prop_and_prop_prior_look_at_different_places() -> None:
    posterior = wide(0.6)
    prop, prior = (posterior.evaluate(metric).proportionality for metric in ("prop", "prop_prior"))
    assert abs(prop - prior) > 0.1
    assert posterior.evaluate().proportionality is None


def test_a_perfect_q(capsys: pytest.CaptureFixture[str]) -> None:
    report = wide(1.0).evaluate()
    assert report.status == "ok" and report.total_variation < 1e-3 and report.ess_fraction > 0.999
    assert capsys.readouterr().out == f"k-hat -inf (ok): {report.sentence}\n"


# quality control


@pytest.mark.parametrize("metric", ["psis", "prop", "prop_prior"])
def test_a_bad_score_warns_with_what_to_do_and_nothing_else(metric: str) -> None:
    calls = []

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        calls.append(len(theta))
        return log_p(theta, x_o)

    posterior = made(potential)
    with pytest.warns(UserWarning, match="^Quality of q: ") as caught:
        posterior.train(X, **{**SHORT, "quality_control": True, "quality_control_metric": metric})
    assert len(caught) == 1 and caught[0].filename == __file__
    said, name = str(caught[0].message), "k-hat" if metric == "psis" else f"{metric} r^2"
    assert f"{name} " in said and ("Train longer" in said or "resampling with them would mend it" in said)
    assert posterior.trace.num_iters == 3 and calls.count(32) == 3  # no second fit
    assert torch.equal(posterior.default_x, X)


@pytest.mark.parametrize("metric", ["psis", "prop", "prop_prior"])
def test_a_good_score_is_silent(metric: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(prior=real()).train(X, **{**GOOD, "quality_control": True, "quality_control_metric": metric})


def test_a_poor_prop_beside_a_good_report_does_not_reassure(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = made(prior=real()).train(X, **GOOD)
    monkeypatch.setattr("visbi.scoring.proportionality", lambda log_p, log_q: 0.1)
    with pytest.warns(UserWarning, match="prop r.2 0.10. q is not proportional .*Train longer"):
        posterior.train(quality_control_metric="prop", show_progress_bar=False, max_num_iters=1)


def test_quality_control_never_raises_on_a_q_that_cannot_be_rebuilt() -> None:
    q = td.Independent(td.Normal(torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)), 1)
    with pytest.warns(UserWarning, match="Quality of q"):
        made(q=q).train(X, **{**SHORT, "quality_control": True})


def test_a_fit_of_nothing_finite_warns_and_does_not_raise() -> None:
    posterior = made(lambda theta, x_o: theta[:, 0] * math.nan)
    with pytest.warns(UserWarning, match="Quality of q: .*NaN"):
        posterior.train(X, **{**SHORT, "quality_control": True, "max_num_iters": 60})
    assert "no finite loss" in posterior.trace.stop_reason


# randomness


def test_a_seed_repeats_the_fit_and_leaves_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    a, b, c = (fitted(seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


def test_without_a_seed_the_global_generator_decides() -> None:
    def run() -> Tensor:
        torch.manual_seed(3)
        posterior = fitted()
        return torch.cat([weights(posterior), posterior.sample((4,)).flatten(), posterior.map(num_iter=3)[0]])

    assert torch.equal(run(), run())


def test_torchs_settings_are_left_alone() -> None:
    before = td.Distribution._validate_args, torch.get_default_dtype(), torch.get_num_threads()
    fitted(made(q="maf", num_transforms=1, hidden_features=4))
    assert (td.Distribution._validate_args, torch.get_default_dtype(), torch.get_num_threads()) == before


# devices


def test_a_device_keeps_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is asked to go to the very device that was named."""
    posterior = fitted()
    posterior.map(num_iter=2)
    asked: list[tuple[str, str | None]] = []

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | torch.device):
            asked.append(str(device))
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    assert posterior.to("cuda:1") is posterior
    assert len(asked) > 10 and set(asked) == {"cuda:1"}
    assert posterior._device == posterior.potential_fn.device == "cuda:1"


def test_everything_moves() -> None:
    posterior = fitted()
    posterior.map(num_iter=2)
    original = copy.deepcopy(posterior)
    posterior.to("meta")
    found = {
        "x": posterior.default_x,
        "map": posterior._map,
        "fitted x": posterior._state.x,
        "prior": posterior.prior.sample(),
        "link": posterior.link_transform(torch.zeros(1, 2, device="meta")),
        "draws": posterior.sample((2,)),
        "density": posterior.log_prob(torch.zeros(1, 2)),
        "potential": posterior.potential(torch.zeros(1, 2)),
        "moments": next(iter(posterior._state.optimizer.state.values()))["exp_avg"],
    }
    assert {name: value.device.type for name, value in found.items()} == dict.fromkeys(found, "meta")
    assert posterior.potential_fn.prior is posterior.prior
    assert original.sample((2,)).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fit_goes_on_elsewhere() -> None:
    posterior = fitted(max_num_iters=20).to("cuda:0")
    assert fitted(posterior, max_num_iters=20).sample((2,)).device == torch.device("cuda:0")
    assert posterior.map(num_iter=2).device == posterior.default_x.device == torch.device("cuda:0")
    posterior.to("cpu")
    assert fitted(posterior).sample((2,)).device.type == "cpu"
    assert fitted(made(device="cuda")).log_prob(torch.zeros(1, 2)).device.type == "cuda"
