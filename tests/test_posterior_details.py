"""What `VIPosterior` keeps, copies, moves and passes on: details that no fit shows by itself."""

import copy
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

from auto_cases import auto, found
from auto_cases import trained as automatic
from posterior_cases import OTHER, X, alone_and_seeded, box, fitted, log_p, made, real
from visbi import VIPosterior, VIPosteriorParameters
from visbi.families.gaussian import GaussianBody
from visbi.fitting.amortized_config import AmortizedOptions, Choice
from visbi.potentials import CustomPotential

__all__ = ["alone_and_seeded"]


class Counting:
    """`log_p`, and how many thetas it has been asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, theta: Tensor, x_o: Tensor) -> Tensor:
        self.asked += len(theta)
        return log_p(theta, x_o)


def amortised(posterior: VIPosterior | None = None) -> VIPosterior:
    theta = box().sample((20,))
    options = dict(flow_type="gaussian", max_num_iters=2, n_particles=2, show_progress_bar=False)
    return (made() if posterior is None else posterior).train_amortized(theta, theta.clone(), **options)


# what is kept


def test_a_report_is_made_once() -> None:
    posterior = fitted(made(potential := Counting()))
    report, before = posterior.report, potential.asked
    assert posterior.report is report and potential.asked == before
    assert report.n_draws == 50_000
    fitted(posterior)
    assert posterior.report is not report


def test_the_draws_that_corrected_ones_are_taken_from_are_kept() -> None:
    posterior = fitted(made(potential := Counting(), real()), max_num_iters=300, learning_rate=0.02)
    potential.asked = 0
    assert posterior.sample((10,), correct=True).shape == (10, 2) and potential.asked == 16_384
    posterior.sample((1000,), correct=True), posterior.weighted_sample(1000)
    assert potential.asked == 16_384
    theta, _ = posterior.weighted_sample(20_000)
    assert potential.asked == 20_000 and torch.equal(posterior.weighted_sample(20_000)[0], theta)
    fitted(posterior)
    potential.asked = 0
    posterior.weighted_sample(25)  # of another q
    assert potential.asked == 25


def test_a_map_outlasts_a_fit_to_the_same_x_alone() -> None:
    posterior = fitted()
    first = posterior.map(num_iter=2)
    assert fitted(posterior).map() is first
    fitted(posterior, OTHER)
    assert (posterior.map(num_iter=300) - OTHER).abs().max() < 0.1
    posterior.set_q("gaussian_diag")
    assert posterior._map is None


# what is shared


def test_a_start_shares_nothing_with_the_posterior_that_lent_it() -> None:
    lender = fitted(made(z_score_theta="structured"))
    posterior = made(q=lender)
    assert posterior.vi_method == lender.vi_method and posterior._coords is not lender._coords
    posterior.to("meta")
    assert posterior.link_transform(torch.zeros(1, 2, device="meta")).device.type == "meta"
    assert lender.sample((2,)).device.type == lender.link_transform(torch.zeros(1, 2)).device.type == "cpu"


def test_how_many_draws_a_start_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    lender, asked = fitted(), []
    draws = lender.sample((4096,))
    monkeypatch.setattr(lender, "sample", lambda shape: asked.append(shape) or draws)
    fitted(init=lender)
    assert asked == [(4096,)]


@pytest.mark.parametrize("own", [None, box(2, 1.0)])
def test_a_potential_without_a_prior_gets_one(own: Any) -> None:
    potential = CustomPotential(log_p, own)
    posterior = VIPosterior(potential, box(2, 0.5), q="gaussian")
    assert posterior.potential_fn is potential
    assert potential.prior is (posterior.prior if own is None else own)
    assert VIPosterior(log_p, box(), q="gaussian").potential_fn.prior is not None


# where a fit starts


def test_a_start_is_one_for_the_first_fit_alone() -> None:
    posterior = fitted(made(prior=real(), q=made(prior=real())))
    with pytest.warns(UserWarning, match="replaces the fit to a single"):
        amortised(posterior)
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        fitted(posterior, init="match", max_num_iters=1, learning_rate=1e-6)
    assert (posterior.sample((4000,)).mean(0) - X[0]).abs().max() < 0.1  # placed anew


def test_a_start_is_not_moved_to_the_prior() -> None:
    lender = fitted(made(prior=real()), max_num_iters=300, learning_rate=0.02)
    warm = dict(warm_up_rounds=200, learning_rate=0.02, max_num_iters=1)
    theta = fitted(made(prior=real(), q=lender), **warm).sample((4000,))
    assert (theta.std(0) - 0.5).abs().max() < 0.1
    theta = fitted(lender, **warm, retrain_from_scratch=True).sample((4000,))
    assert theta.std(0).min() > 1.2  # as wide as the prior, or nearly


def test_an_amortised_fit_takes_q_back_to_before_any_fit() -> None:
    posterior = fitted(made(prior=real(), q="gaussian_diag"), max_num_iters=300, learning_rate=0.02)
    with pytest.warns(UserWarning, match="replaces the fit to a single"):
        amortised(posterior)
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        fitted(posterior, max_num_iters=1, learning_rate=1e-6)
    assert (posterior.sample((4000,)).std(0) - 2.0).abs().max() < 0.2  # the prior's
    assert posterior.q.body.raw_below is None  # still diagonal


@pytest.mark.parametrize("q", ["nsf", "auto"])
def test_what_an_amortised_fit_is_told(q: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def amortize(*arguments: Any, **keywords: Any) -> Any:
        told.update(keywords, arguments=arguments)
        raise RuntimeError("told")

    monkeypatch.setattr("visbi.fitting.amortized.amortize", amortize)
    own = dict(num_transforms=3, hidden_features=7, z_score_theta="none", z_score_x="structured")
    posterior = made(q=q, vi_method="IW", **own)
    how: dict[str, Any] = dict(n_particles=3, learning_rate=0.1, gamma=0.5, max_num_iters=4, clip_value=2.0)
    how.update(batch_size=6, validation_fraction=0.3, validation_batch_size=8, validation_n_particles=9)
    how.update(stop_after_iters=5, show_progress_bar=False, retrain_from_scratch=True, seed=11)
    what = dict(num_transforms=2, hidden_features=4, z_score_theta="structured", z_score_x="none")
    theta, x, net, params = torch.zeros(2, 2), torch.ones(2, 2), nn.Identity(), VIPosteriorParameters()
    with pytest.raises(RuntimeError, match="told"):
        posterior.train_amortized(
            theta, x, **how, flow_type="maf", **what, params=params, embedding_net=net, objective="forward"
        )
    data, *rest, options = told["arguments"]
    assert data == (theta, x) and data[0] is theta and data[1] is x
    assert rest == [posterior.potential_fn, posterior.prior, posterior._coords]
    assert options == AmortizedOptions(**how, objective="forward")
    explicit, given, instance = told["choices"]
    assert explicit == Choice("maf", **what) and given is params
    assert instance == Choice(None if q == "auto" else posterior.q, **own)
    assert told["method"] == "IW" and told["embedding_net"] is net and told["before"] is posterior._state


def test_what_an_automatic_fit_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    lender, starts, states = found("mixture", allow_failed=True), [], []

    def fit_auto(problem: Any, x: Any, options: Any, *, earlier: Any = None) -> Any:
        starts.append(earlier)
        states.append(torch.get_rng_state())
        return lender._state

    monkeypatch.setattr("visbi.fitting.auto.fit_auto", fit_auto)
    posterior = automatic(auto())
    assert starts == [None] and posterior.q is lender.q
    automatic(posterior)
    assert starts[-1] is lender.q
    automatic(posterior, retrain_from_scratch=True)
    assert starts[-1] is None
    assert all(torch.equal(state, states[0]) for state in states)  # whatever q there was
    warm = auto(q=lender)
    automatic(copy.deepcopy(warm), retrain_from_scratch=True)
    assert starts[-1] is None
    start = warm.q
    automatic(warm)
    assert starts[-1] is start and start is not lender.q
    with pytest.warns(UserWarning, match="replaces the fit to a single"):
        amortised(warm)
    assert type(warm._family.body) is GaussianBody
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        automatic(warm)
    assert starts[-1] is None  # it was one for the first fit alone


# where things are


def test_priors_that_differ_move_apart() -> None:
    posterior = VIPosterior(CustomPotential(log_p, box(2, 1.0)), box(2, 0.5), q="gaussian")
    assert posterior.to("cpu") is posterior
    for one in (posterior, copy.deepcopy(posterior)):
        assert float(one.prior.sample((500,)).abs().max()) <= 0.5
        assert float(one.potential_fn.prior.sample((500,)).abs().max()) > 0.5
    posterior.to("meta")
    assert posterior.prior.sample().device.type == posterior.potential_fn.prior.sample().device.type == "meta"


def test_what_comes_to_a_posterior_that_has_moved() -> None:
    posterior = fitted().to("meta")
    assert posterior.set_default_x(X).default_x.device.type == "meta"
    assert posterior.sample((2,), X).device.type == posterior.sample((2,), correct=True).device.type == "meta"
    assert posterior.sample((3, 4), correct=True).shape == (3, 4, 2)
    assert posterior.potential(torch.zeros(1, 2), X).device.type == "meta"
    for q in ("gaussian_diag", fitted()):
        posterior.set_q(q)
        assert {weight.device.type for weight in posterior.q.parameters()} == {"meta"}
        assert posterior.link_transform(torch.zeros(1, 2, device="meta")).device.type == "meta"
    moved = amortised().to("meta")
    assert moved.sample((2,), X).device.type == moved.sample_batched((2,), X).device.type == "meta"


class Bare:
    """The field's interface without a `to`."""

    def set_x(self, x: Tensor, x_is_iid: bool = True) -> None:
        self.x = x

    def return_x_o(self) -> Tensor:
        return X

    def __call__(self, theta: Tensor, track_gradients: bool = True) -> Tensor:
        return log_p(theta, self.x)


def test_what_cannot_move_may_stay(tmp_path: Any) -> None:
    posterior = fitted(VIPosterior(Bare(), box(), q="gaussian"), None)
    assert copy.deepcopy(posterior).sample((2,)).device.type == "cpu"
    posterior.save(tmp_path / "it")
    for device in (None, "cpu", torch.device("cpu")):
        back = VIPosterior.load(tmp_path / "it", potential_fn=Bare(), device=device)
        assert fitted(back).sample((2,)).device.type == "cpu"
    with pytest.raises(AttributeError, match="to"):
        posterior.to("meta")


def test_built_on_a_device() -> None:
    built: list[Any] = []

    def q(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
        built.append(device)
        loc = torch.zeros(event_shape, device=device, requires_grad=True)
        return td.Independent(td.Normal(loc, torch.ones_like(loc).detach(), validate_args=False), 1)

    posterior = VIPosterior(log_p, box(), q=q, device="meta")
    assert built == ["meta"] and posterior.prior.sample().device.type == "meta"
    assert posterior.link_transform(torch.zeros(1, 2, device="meta")).device.type == "meta"
    named = VIPosterior(log_p, box(), q="gaussian", device=torch.device("meta"))
    assert {weight.device.type for weight in named.q.parameters()} == {"meta"}
    named.set_default_x(X)
    assert copy.deepcopy(named).default_x.device.type == "meta"


def test_the_setters() -> None:
    posterior = fitted()
    posterior.vi_method = "IW"
    assert posterior.vi_method == "IW" and posterior.set_vi_method("fKL") is posterior
    posterior.default_x = OTHER
    assert torch.equal(posterior.default_x, OTHER) and posterior.set_default_x(X) is posterior
    posterior.q = "gaussian_diag"
    assert "not fitted" in repr(posterior)


# numbers


def test_integers_become_what_the_prior_is_in() -> None:
    posterior = fitted()
    whole = torch.tensor([[0, 1], [1, 0]])
    for density in (posterior.log_prob, posterior.potential):
        assert density(whole).dtype == torch.float32
        assert torch.equal(density(whole), density(whole.float()))
        assert density(whole.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"shape \(batch, 2\); got \(2,\)|got \(1, 3\)"):
        posterior.log_prob([0, 1, 2])  # type: ignore[arg-type]


def test_the_fewest_draws() -> None:
    posterior = fitted()
    assert posterior.weighted_sample(25)[0].shape == (25, 2)
    assert posterior.evaluate(N=25).n_draws == 25
    assert posterior.sample((0,)).shape == (0, 2) and posterior.sample((2, 0)).shape == (2, 0, 2)


def test_a_sibling_shares_coordinates_and_is_warm_after_a_fit() -> None:
    fresh, trained = made(q="maf"), fitted()
    sibling = fresh.sibling()
    assert sibling.coordinates is fresh.coordinates and sibling.q.coords is fresh.q.coords
    lent = made(q=trained)
    assert not sibling._warm
    assert trained.sibling()._warm and lent.sibling()._warm and lent.sibling().sibling()._warm
