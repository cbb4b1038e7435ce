"""Every keyword of an amortised `VIPosterior` does what is documented, on the first call and on a later one.

As in `test_contract_options`: a keyword that no test marks with `@shows` is a failure.
"""

import copy
import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from posterior_cases import PUBLISHED_FAMILIES
from shown import Shown
from visbi import BoxUniform, VIPosterior, VIPosteriorParameters, ZukoFlowType
from visbi.core.random import seeded
from visbi.families import FAMILY_NAMES, LinkedFamily, named_family
from visbi.families.conditional import ConditionalFamily
from visbi.families.gaussian import GaussianBody
from visbi.priors import coordinates

shows = Shown()
METHODS = (
    "train_amortized",
    "sample",
    "weighted_sample",
    "sample_batched",
    "log_prob",
    "potential",
    "map",
    "evaluate",
    "certify",
    "stack",
    "refine",
)
LATER = pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
X_O = torch.tensor([[0.6, -0.4]])
QUICK: dict[str, Any] = dict(
    flow_type="gaussian",
    num_transforms=1,
    hidden_features=8,
    n_particles=4,
    max_num_iters=3,
    show_progress_bar=False,
    seed=0,
)
GOOD: dict[str, Any] = dict(QUICK, n_particles=16, max_num_iters=150, learning_rate=0.02, gamma=0.99)


def box() -> BoxUniform:
    return BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))


class Seen:
    """log N(x; theta, 0.3^2) under a flat prior; keeps the x of every call."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        self.x.append(x)
        return -0.5 * ((theta - x) / 0.3).square().sum(-1)

    @property
    def sizes(self) -> list[int]:
        return [len(x) for x in self.x]


def simulations(n: int = 100) -> tuple[Tensor, Tensor]:
    with seeded(5):
        theta = box().sample((n,))
        return theta, theta + 0.3 * torch.randn(n, 2)


def made(potential: Any = None, **options: Any) -> VIPosterior:
    return VIPosterior(potential or Seen(), box(), **{"q": "gaussian", **options})


def fitted(posterior: VIPosterior | None = None, n: int = 100, **options: Any) -> VIPosterior:
    posterior = made() if posterior is None else posterior
    return posterior.train_amortized(*simulations(n), **{**QUICK, **options})


def ready(later: bool, potential: Any = None) -> VIPosterior:
    """A posterior that has not been trained, or one that has."""
    posterior = made(potential)
    return fitted(posterior, seed=7) if later else posterior


def weights(posterior: VIPosterior) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in posterior.q.parameters()])


def moved(posterior: VIPosterior, **options: Any) -> Tensor:
    """How far a call moves the weights, where steps are so small that each of them is one downhill."""
    posterior = fitted(posterior, **{"max_num_iters": 1, "learning_rate": 1e-12})
    before = weights(posterior)
    fitted(posterior, **{"n_particles": 256, "learning_rate": 1e-4, "max_num_iters": 1, **options})
    assert posterior.trace.best_iter > 0  # else the weights are those of before
    return weights(posterior) - before


# that all are shown


@pytest.mark.parametrize("method", METHODS)
def test_every_keyword_is_shown(method: str) -> None:
    parameters = inspect.signature(getattr(VIPosterior, method)).parameters
    assert shows.of(method) == set(parameters) - {"self"}


def test_every_entry_of_the_parameters_is_shown() -> None:
    entries = {field.name for field in dataclasses.fields(VIPosteriorParameters)}
    assert shows.of("VIPosteriorParameters") == entries


def test_every_published_method_is_walked() -> None:
    from test_contract_options import METHODS as SINGLE

    public = {name for name, _ in inspect.getmembers(VIPosterior, inspect.isfunction) if name[0] != "_"}
    elsewhere = {"save", "sibling"}  # tests of saving; tests of fit_many
    assert public - elsewhere <= {*SINGLE, *METHODS}


# train_amortized: data


@shows("train_amortized", "theta")
@LATER
def test_theta_is_checked_and_not_learned_from(later: bool) -> None:
    posterior = ready(later)
    theta, x = simulations()
    for wrong in (theta[:-1], theta[:, :1], theta * torch.nan):
        with pytest.raises(ValueError, match="`theta"):
            posterior.train_amortized(wrong, x, **QUICK)
    others = [copy.deepcopy(posterior).train_amortized(t, x, **QUICK).trace for t in (theta, theta.flip(0))]
    assert others[0] == others[1]


@shows("train_amortized", "x")
@LATER
def test_x_is_what_q_learns_from(later: bool) -> None:
    potential = Seen()
    posterior = ready(later, potential)
    potential.x.clear()
    theta, x = simulations(50)
    posterior.train_amortized(theta, x, **QUICK)
    seen = torch.cat(potential.x).unique(dim=0)
    assert all(bool((row == x).all(-1).any()) for row in seen) and len(seen) == 50
    with pytest.raises(ValueError, match="`x`"):
        posterior.train_amortized(theta, x * torch.inf, **QUICK)


# train_amortized: sizes of steps and of the held-out loss


@shows(
    "train_amortized",
    "n_particles",
    "batch_size",
    "validation_batch_size",
    "validation_n_particles",
    "validation_fraction",
)
@LATER
def test_sizes(later: bool) -> None:
    potential = Seen()
    posterior = ready(later, potential)

    def sizes(**options: Any) -> set[int]:
        potential.x.clear()
        fitted(posterior, **options)
        return set(potential.sizes) - {4}  # 2 x 2: one look at the shape of what the potential returns

    assert sizes(n_particles=3, batch_size=8) == {3 * 8}
    assert sizes(n_particles=3, batch_size=7, validation_batch_size=5) == {3 * 7, 3 * 5}
    assert sizes(n_particles=3, batch_size=7, validation_n_particles=11) == {3 * 7, 7 * 11}
    # all that are held out, all that are left
    assert sizes(n_particles=3, batch_size=100, validation_fraction=0.3) == {3 * 70, 3 * 30}


@shows("train_amortized", "learning_rate")
@LATER
def test_learning_rate(later: bool) -> None:
    for rate in (1e-4, 3e-4):  # the size of Adam's first step
        step = moved(ready(later), learning_rate=rate).abs()
        assert float(step.max()) == pytest.approx(rate, rel=0.02)


@shows("train_amortized", "gamma")
@LATER
def test_gamma(later: bool) -> None:
    one, still, on = (
        moved(ready(later), max_num_iters=n, gamma=g) for n, g in ((1, 1.0), (4, 1e-9), (4, 1.0))
    )
    torch.testing.assert_close(still, one, rtol=1e-2, atol=1e-6)
    assert (on - one).abs().max() > 1e-4


@shows("train_amortized", "clip_value")
@LATER
def test_clip_value(later: bool) -> None:
    # Adam forgets the size of a gradient unless it is below its own 1e-8
    assert moved(ready(later), clip_value=1e-10).abs().max() < 0.02e-4 < moved(ready(later)).abs().max()


@shows("train_amortized", "max_num_iters")
@LATER
def test_max_num_iters(later: bool) -> None:
    trace = fitted(ready(later), max_num_iters=5).trace
    assert trace.num_iters == 5 and trace.stop_reason == "reached max_num_iters = 5"


@shows("train_amortized", "stop_after_iters")
@LATER
@pytest.mark.parametrize("patience", [2, 5])
def test_stop_after_iters(patience: int, later: bool) -> None:
    wild = dict(learning_rate=3.0, clip_value=1e6, max_num_iters=200)
    trace = fitted(ready(later), **wild, stop_after_iters=patience).trace
    assert trace.num_iters == trace.best_iter + patience < 200
    assert f"stop_after_iters = {patience}" in trace.stop_reason
    assert min(trace.validation_loss) == trace.validation_loss[trace.best_iter]


# train_amortized: what it goes down


@shows("train_amortized", "objective")
@LATER
def test_objective(later: bool) -> None:
    flat = dict(GOOD, max_num_iters=40, gamma=1.0, stop_after_iters=40)
    posterior = ready(later)
    (theta, x), at, found = simulations(400), torch.cat([X_O, 0 * X_O]), {}
    for objective in ("elbo", "forward", "mixed"):
        one = copy.deepcopy(posterior)
        one.potential_fn.potential_fn = Seen()
        one.train_amortized(theta, x - 0.5, **flat, objective=objective, retrain_from_scratch=later)
        found[objective] = one.sample((2000,), at).mean(0) - at
        looked = len(one.potential_fn.potential_fn.x)
        assert looked == {"elbo": 1 + 2 * 40 + 1, "forward": 1, "mixed": 1 + 2 * 40 + 1}[objective]
        assert one.trace.num_iters == 40 and (one.trace.before is None) is (objective != "mixed")
    # the simulations say that theta is half a unit above x, the potential does not
    assert found["elbo"].abs().max() < 0.15
    assert (found["forward"] - 0.5).abs().max() < 0.15
    assert ((found["mixed"] > 0.1) & (found["mixed"] < 0.4)).all()
    default = fitted(copy.deepcopy(posterior))
    assert torch.equal(weights(default), weights(fitted(copy.deepcopy(posterior), objective="elbo")))
    with pytest.raises(ValueError, match="`objective`: expected one of 'elbo', 'forward', 'mixed'"):
        fitted(posterior, objective="ELBO")


# train_amortized: how it goes


@shows("train_amortized", "show_progress_bar")
@LATER
def test_show_progress_bar(later: bool, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = fitted(ready(later))
    assert capsys.readouterr().err == ""
    fitted(posterior, show_progress_bar=True)
    assert "Fitting" in capsys.readouterr().err


@shows("train_amortized", "seed")
@LATER
@pytest.mark.parametrize("flow_type", ["gaussian", "nsf"])
def test_seed(flow_type: str, later: bool) -> None:
    posterior = fitted(flow_type=flow_type) if later else made()
    data, before = simulations(), torch.get_rng_state()

    def trained(seed: Any) -> Tensor:
        again = copy.deepcopy(posterior)
        options = {**QUICK, "flow_type": flow_type, "n_particles": 64, "seed": seed}
        return weights(again.train_amortized(*data, **options))

    assert torch.equal(trained(1), trained(torch.tensor(1)))
    assert not torch.equal(trained(1), trained(2))
    assert torch.equal(torch.get_rng_state(), before)
    trained(None)
    assert not torch.equal(torch.get_rng_state(), before)


@shows("train_amortized", "retrain_from_scratch")
def test_retrain_from_scratch() -> None:
    first = [fitted(retrain_from_scratch=scratch) for scratch in (False, True)]
    assert torch.equal(weights(first[0]), weights(first[1]))  # nothing yet to leave
    good, tiny = fitted(**GOOD), dict(max_num_iters=1, learning_rate=1e-12)
    kept, fresh = (
        fitted(copy.deepcopy(good), **tiny, retrain_from_scratch=scratch) for scratch in (False, True)
    )
    near = [(one.sample((500,), X_O).mean(0) - X_O[0]).abs().max() for one in (good, kept, fresh)]
    assert near[0] < 0.15 and near[1] < 0.15 < 0.3 < near[2]
    assert kept.q is not fresh.q


# train_amortized: what is built


@shows("train_amortized", "flow_type", "num_transforms", "hidden_features", "z_score_theta", "z_score_x")
@LATER
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flow_type", "nsf"),
        ("flow_type", ZukoFlowType.GF),
        ("num_transforms", 3),
        ("hidden_features", 5),
        ("z_score_theta", "none"),
        ("z_score_x", "structured"),
        ("z_score_x", "none"),
    ],
)
def test_what_is_built(name: str, value: Any, later: bool) -> None:
    base = {**QUICK, "flow_type": "maf"}
    plain, posterior = fitted(**base), fitted(**base) if later else made()
    if later:
        with pytest.warns(UserWarning, match=f"q is built anew, because of another {name}"):
            fitted(posterior, **{**base, name: value})
    else:
        fitted(posterior, **{**base, name: value})
    assert getattr(posterior.q.config, name) == getattr(value, "value", value)
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = posterior.sample((5,), X_O)
        torch.manual_seed(1)
        assert not torch.equal(drawn, plain.sample((5,), X_O))
    sizes = [len(weights(one)) for one in (plain, posterior)]
    assert (sizes[0] == sizes[1]) is name.startswith("z_score")


def test_every_flow_type_by_member_and_by_string() -> None:
    assert {member.value for member in ZukoFlowType} | {"gaussian", "gaussian_diag"} == set(
        PUBLISHED_FAMILIES
    )
    assert set(PUBLISHED_FAMILIES) <= set(FAMILY_NAMES)
    for member in ZukoFlowType:
        one, other, upper = (
            fitted(flow_type=kind, max_num_iters=1) for kind in (member, member.value, member.value.upper())
        )
        assert one.q.config == other.q.config == upper.q.config
        assert torch.equal(weights(one), weights(other))


@shows("train_amortized", "params")
@shows("VIPosteriorParameters", "q", "num_transforms", "hidden_features", "z_score_theta", "z_score_x")
@LATER
def test_params_stand_between_arguments_and_instance(later: bool) -> None:
    run = dict(max_num_iters=1, n_particles=2, show_progress_bar=False, seed=0)
    wanted = dict(num_transforms=2, hidden_features=7, z_score_theta="none", z_score_x="structured")
    params = VIPosteriorParameters(q=ZukoFlowType.NICE, **wanted)
    posterior = made(q="maf", num_transforms=1, hidden_features=5)
    if later:
        posterior.train_amortized(*simulations(), **run)
        assert (posterior.q.config.flow_type, posterior.q.config.hidden_features) == ("maf", 5)
        with pytest.warns(UserWarning, match="built anew, because of another flow_type, num_transforms"):
            posterior.train_amortized(*simulations(), **run, params=params)
    else:
        posterior.train_amortized(*simulations(), **run, params=params)
    assert vars(posterior.q.config) == {"flow_type": "nice", **wanted}
    posterior.train_amortized(*simulations(), **run)  # goes on with what it has
    assert vars(posterior.q.config) == {"flow_type": "nice", **wanted}
    explicit = dict(
        flow_type="gf", num_transforms=1, hidden_features=6, z_score_theta="structured", z_score_x="none"
    )
    for name, value in explicit.items():
        posterior.train_amortized(
            *simulations(), **run, params=params, retrain_from_scratch=True, **{name: value}
        )
        assert vars(posterior.q.config) == {"flow_type": "nice", **wanted, name: value}


@shows("VIPosteriorParameters", "vi_method")
def test_a_divergence_that_an_amortised_fit_does_not_use_is_said_aloud() -> None:
    said = r"maximises the ELBO, that is rKL: vi_method = 'fKL' is not used"
    with pytest.warns(UserWarning, match=said) as caught:
        fitted(params=VIPosteriorParameters(vi_method="fKL"))
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match=said):
        fitted(made(vi_method="fKL"))
    fitted(made(vi_method="fKL"), params=VIPosteriorParameters())  # params stand above the instance


def test_the_parameters_are_frozen_and_have_the_constructors_defaults() -> None:
    parameters = inspect.signature(VIPosterior.__init__).parameters
    for field in dataclasses.fields(VIPosteriorParameters):
        assert field.default == parameters[field.name].default
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(VIPosteriorParameters(), field.name, field.default)
        with pytest.raises(ValueError, match=field.name):
            VIPosteriorParameters(**{field.name: "no such thing"})


@shows("train_amortized", "embedding_net")
@LATER
def test_embedding_net(later: bool) -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x[:, 1:]

    net, posterior = Second(), ready(later)
    if later:
        with pytest.warns(UserWarning, match="built anew, because of another embedding_net"):
            fitted(posterior, **GOOD, embedding_net=net)
    else:
        fitted(posterior, **GOOD, embedding_net=net)
    with torch.no_grad():
        shifted = X_O + torch.tensor([1.0, 0.0])  # what the network does not see
        assert torch.equal(posterior.log_prob(X_O, X_O), posterior.log_prob(X_O, shifted))
        assert not torch.equal(posterior.log_prob(X_O, X_O), posterior.log_prob(X_O, X_O.flip(1)))
    assert net.scale.item() == 1.0 != posterior.q.embedding.scale.item()  # a copy is trained


# using it


@shows("sample", "sample_shape", "x", "show_progress_bars")
@shows("sample_batched", "sample_shape", "x", "show_progress_bars")
@LATER
def test_draws(later: bool, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = fitted(ready(later), **GOOD)
    x = torch.tensor([[0.6, -0.4], [-1.0, 1.0], [0.0, 0.5]])
    capsys.readouterr()
    for draw in (posterior.sample, posterior.sample_batched):
        torch.manual_seed(1)
        theta = draw((40, 5), x)
        assert theta.shape == (40, 5, 3, 2) and not theta.requires_grad
        assert (theta.mean((0, 1)) - x).abs().max() < 0.2
        torch.manual_seed(1)
        assert torch.equal(theta, draw(sample_shape=(40, 5), x=x, show_progress_bars=False))
        assert draw((), x).shape == (3, 2) and draw((0,), x).shape == (0, 3, 2)
        for wrong in (torch.zeros(3, 3), torch.zeros(2, 3, 2), x * torch.nan):
            with pytest.raises(ValueError, match="`x`"):
                draw((2,), wrong)
        with pytest.raises(TypeError, match="`sample_shape`"):
            draw(3, x)
    assert posterior.sample((4,), x[:1]).shape == (4, 2)
    assert posterior.sample_batched((4,), x[:1]).shape == (4, 1, 2)
    assert capsys.readouterr().err == ""


@shows("sample_batched", "max_sampling_batch_size")
@LATER
@pytest.mark.parametrize("at_once", [1, 3, 7, 10_000])
def test_max_sampling_batch_size(at_once: int, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, sizes, draw = fitted(ready(later)), [], ConditionalFamily.draw

    def counted(self: ConditionalFamily, x: Tensor, n: int, **options: Any) -> Any:
        sizes.append(n * len(x))
        return draw(self, x, n, **options)

    monkeypatch.setattr(ConditionalFamily, "draw", counted)
    theta = posterior.sample_batched((6,), simulations(5)[1], max_sampling_batch_size=at_once)
    assert theta.shape == (6, 5, 2) and sum(sizes) == 30 and max(sizes) <= at_once
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="`max_sampling_batch_size`"):
            posterior.sample_batched((2,), X_O, max_sampling_batch_size=wrong)


@shows("weighted_sample", "n", "x")
@shows("log_prob", "normalized")
@LATER
def test_weights_belong_to_fits_to_one_observation(later: bool) -> None:
    posterior = fitted(ready(later))
    assert posterior.log_prob(torch.zeros(1, 2), X_O, normalized="q").shape == (1,)
    for name, ask in {
        "weighted_sample": lambda: posterior.weighted_sample(n=100, x=X_O),
        "normalized": lambda: posterior.log_prob(torch.zeros(1, 2), X_O, normalized="potential"),
    }.items():
        with pytest.raises(
            ValueError, match=f"`{name}`: expected a fit to one observation; got an amortised"
        ):
            ask()


@shows("sample", "correct")
@shows("sample_batched", "correct")
@LATER
def test_correct(later: bool) -> None:
    """An untrained q is the prior: raw draws are its, corrected ones are the posterior's at each x."""
    x = torch.tensor([[0.6, -0.4], [-1.0, 1.0], [0.0, 0.5]])
    posterior = fitted(ready(later), max_num_iters=1, learning_rate=1e-12, retrain_from_scratch=later)
    for draw in (posterior.sample, posterior.sample_batched):
        raw, corrected = draw((4000,), x, correct=False), draw((4000,), x, correct=True)
        assert raw.shape == corrected.shape == (4000, 3, 2)
        assert raw.mean(0).abs().max() < 0.15
        assert (corrected.mean(0) - x).abs().max() < 0.03 and (corrected.std(0) - 0.3).abs().max() < 0.02
        assert draw((2, 3), x, correct=True).shape == (2, 3, 3, 2)
    assert posterior.sample((4000,), x).mean(0).abs().max() < 0.15  # raw unless asked for
    assert posterior.sample_batched((4000,), x).mean(0).abs().max() < 0.15
    assert posterior.sample((5,), X_O, correct=True).shape == (5, 2)
    assert posterior.sample((), X_O, correct=True).shape == (2,)
    assert posterior.sample_batched((5,), X_O, correct=True).shape == (5, 1, 2)


@shows("certify", "x", "n_draws")
@LATER
def test_certify(later: bool) -> None:
    potential = Seen()
    posterior = fitted(ready(later, potential), **GOOD)
    x = torch.cat([X_O, -X_O, X_O + 10])  # the last one far from all simulations
    potential.x.clear()
    reports = posterior.certify(x, n_draws=4000)
    assert sum(potential.sizes) == 3 * 4000 and len(potential.sizes) == 1
    assert [report.n_draws for report in reports] == [4000] * 3
    assert {report.status for report in reports[:2]} <= {"ok", "corrected"}
    assert reports[2].status in ("suspect", "failed")
    assert [report.n_draws for report in posterior.certify(X_O[0])] == [16_384]
    alone = posterior.set_default_x(X_O).certify()[0]
    assert alone.log_evidence == pytest.approx(reports[0].log_evidence, abs=0.05)
    for wrong in (24, 0, 1.5):
        with pytest.raises(ValueError, match="`n_draws`"):
            posterior.certify(x, n_draws=wrong)
    with pytest.raises(ValueError, match="`x`"):
        posterior.certify(torch.zeros(2, 3))


@shows("stack", "theta", "x", "n_draws")
@LATER
def test_stack(later: bool) -> None:
    potential = Seen()
    posterior = fitted(ready(later, potential), **GOOD)
    with seeded(7):
        theta = box().sample((300,))
        x = theta + 0.3 * torch.randn(300, 2)
    potential.x.clear()
    assert posterior.stack(theta, x, n_draws=100) == 1.0  # the potential is exact
    assert sum(potential.sizes) == 300 * 101
    for wrong in (24, 1.5):
        with pytest.raises(ValueError, match="`n_draws`"):
            posterior.stack(theta, x, n_draws=wrong)
    for theta_, x_ in ((theta[:, :1], x), (theta[:9], x), (theta, x[:, :1]), (theta * torch.nan, x)):
        with pytest.raises(ValueError, match=r"`theta`|`x`"):
            posterior.stack(theta_, x_)
    with pytest.raises(ValueError, match="`stack`: expected an amortised fit"):
        posterior.refine(X_O, seed=3).stack(theta, x)


@shows("refine", "x", "train")
@LATER
def test_refine(later: bool) -> None:
    posterior = fitted(ready(later))
    weights_before = weights(posterior)
    refined = posterior.refine(X_O, seed=3)
    assert torch.equal(weights(posterior), weights_before) and posterior.default_x is None
    assert refined.report.status == "ok" and refined.report.seed == 3
    assert (refined.sample((4000,)).mean(0) - X_O[0]).abs().max() < 0.03
    assert torch.equal(refined.default_x, X_O)
    again = posterior.set_default_x(X_O[0]).refine(seed=3)
    assert again.report == refined.report
    torch.manual_seed(0)
    first = refined.sample((10,))
    torch.manual_seed(0)
    assert torch.equal(again.sample((10,)), first)
    with pytest.raises(TypeError, match="`init`"):
        posterior.refine(X_O, init="match")
    with pytest.raises(TypeError, match="`sed`"):
        posterior.refine(X_O, sed=3)
    with pytest.raises(ValueError, match="`x`: expected a single observation"):
        posterior.refine(torch.cat([X_O, X_O]))
    with pytest.raises(ValueError, match="`refine`: expected an amortised fit"):
        refined.refine()


@shows("log_prob", "theta", "x", "track_gradients")
@LATER
def test_log_prob(later: bool) -> None:
    posterior = fitted(ready(later), **GOOD)
    theta, x = simulations(5)
    paired = posterior.log_prob(theta, x)
    assert paired.shape == (5,) and not paired.requires_grad
    by_x = torch.stack([posterior.log_prob(theta[i : i + 1], x) for i in range(5)])
    by_theta = torch.stack([posterior.log_prob(theta, x[i : i + 1]) for i in range(5)], 1)
    assert by_x.shape == by_theta.shape == (5, 5)
    torch.testing.assert_close(by_x, by_theta)
    torch.testing.assert_close(by_x.diagonal(), paired)
    torch.testing.assert_close(posterior.log_prob(theta, x[1]), by_x[:, 1])
    torch.testing.assert_close(posterior.log_prob(theta[1], x), by_x[1])
    assert posterior.set_default_x(x[1]).log_prob(theta).shape == (5,)
    assert posterior.log_prob(theta[:0], x[:1]).shape == (0,)
    for a, b in ((2, 5), (5, 2), (0, 5)):
        with pytest.raises(ValueError, match="equally many rows"):
            posterior.log_prob(theta[:a], x[:b])
    leaf, seen = theta.clone().requires_grad_(), x.clone().requires_grad_()
    assert not posterior.log_prob(leaf, seen).requires_grad
    with torch.no_grad():
        tracked = posterior.log_prob(leaf, seen, track_gradients=True)
    tracked.sum().backward()
    assert bool((leaf.grad != 0).all()) and bool((seen.grad != 0).all())
    posterior._x = None
    with pytest.raises(ValueError, match="`x`: expected an observation"):
        posterior.log_prob(theta)


@shows("potential", "theta", "x", "track_gradients")
def test_potential() -> None:
    posterior = fitted().set_default_x(X_O)
    theta = simulations(5)[0].requires_grad_()
    plain = posterior.potential(theta)
    assert plain.shape == (5,) and not plain.requires_grad
    assert torch.equal(posterior.potential(theta, X_O[0]), plain)
    assert not torch.equal(posterior.potential(theta, X_O + 1), plain)
    posterior.potential(theta, track_gradients=True).sum().backward()
    assert bool((theta.grad != 0).all())


@shows("map", "x", "num_iter", "num_to_optimize", "num_init_samples", "learning_rate", "init_method")
@shows("map", "save_best_every", "show_progress_bars", "force_update")
def test_map(capsys: pytest.CaptureFixture[str]) -> None:
    budget = [10**9]

    class Stopping(Seen):
        def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
            budget[0] -= 1
            if budget[0] < 0:
                raise KeyboardInterrupt
            return super().__call__(theta, x)

    potential = Stopping()
    posterior = fitted(made(potential), **GOOD).set_default_x(X_O)
    potential.x.clear()

    def sizes(**options: Any) -> list[int]:
        """How many thetas each call of the potential brought: counted by what comes back."""
        counts: list[int] = []
        original = posterior.potential_fn.evaluate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                posterior.potential_fn,
                "evaluate",
                lambda theta, *rest: (counts.append(len(theta)), original(theta, *rest))[1],
            )
            posterior.map(**options)
        return counts

    assert sizes(num_iter=4, num_to_optimize=5, num_init_samples=33)[:5] == [33, 5, 5, 5, 5]
    assert sizes(num_iter=4) == []  # it is kept
    assert sizes(num_iter=1, force_update=True)[0] == 10_000
    best = posterior.map(num_iter=300, force_update=True)
    assert (best - X_O).abs().max() < 0.01
    assert (posterior.map(X_O + 0.5, num_iter=300) - X_O - 0.5).abs().max() < 0.01
    assert posterior.map() is best
    start = torch.tensor([[1.5, 1.5]])
    short = dict(num_iter=1, force_update=True, save_best_every=1)
    assert (posterior.map(init_method=start, learning_rate=1e-9, **short) - start).abs().max() < 1e-5
    assert (posterior.map(init_method=start, learning_rate=1e-2, **short) - start).abs().max() > 1e-3
    one = dict(num_init_samples=400, num_to_optimize=400, learning_rate=1e-9)
    starts = []
    for init in ("posterior", "proposal", "prior"):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "visbi.posterior.ascend", lambda log_p, coords, starts_, **_: (starts_.clone(), 0.0)
            )
            starts.append(posterior.map(init_method=init, force_update=True, **one)[0])
    assert starts[0].std() < 0.8 < 1.0 < starts[2].std() and torch.equal(starts[0], starts[1])

    def after(calls: int, every: int) -> float:
        budget[0] = calls
        found = posterior.map(init_method=start, save_best_every=every, force_update=True)
        budget[0] = 10**9
        return float(posterior.potential(found))

    assert after(30, 1) > after(30, 20) > after(30, 1000)  # Ctrl-C keeps the best that was looked at
    assert capsys.readouterr().err == ""
    posterior.map(num_iter=2, show_progress_bars=True, force_update=True)
    assert "Climbing" in capsys.readouterr().err


@shows("evaluate", "quality_control_metric", "N")
@LATER
def test_evaluate(later: bool, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = fitted(ready(later), **GOOD).set_default_x(X_O)
    capsys.readouterr()
    for metric, start in (("psis", "k-hat "), ("prop", "prop r^2 "), ("prop_prior", "prop_prior r^2 ")):
        report = posterior.evaluate(quality_control_metric=metric, N=300)
        assert report.n_draws == 300 and capsys.readouterr().out.startswith(start)
        assert (report.proportionality is None) is (metric == "psis")
    other = posterior.set_default_x(X_O + 10).evaluate(N=300)  # far from all simulations
    assert other.khat != report.khat and other.status != "ok"


# from one mode to the other


def test_an_amortised_posterior_lends_no_start() -> None:
    with pytest.raises(ValueError, match="`q`: expected a posterior that was not amortised"):
        made(q=fitted())


def test_nothing_of_one_mode_is_left_in_the_other() -> None:
    """Single, amortised and single again: the last fit is as one that came first."""
    single = dict(max_num_iters=20, quality_control=False, show_progress_bar=False, seed=3)
    plain = made().train(X_O, **single)
    posterior = made().train(-X_O, **single)
    posterior.report, posterior.map(num_iter=2)
    with pytest.warns(UserWarning, match="replaces the fit to a single observation"):
        fitted(posterior)
    assert posterior._map is None and posterior.sample((2,), X_O).shape == (2, 2)
    amortised = fitted()
    assert torch.equal(posterior.q.encoder.entry.weight, amortised.q.encoder.entry.weight)
    posterior.set_default_x(X_O).report, posterior.map(num_iter=2)
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        posterior.train(**single)
    theta = simulations(4)[0]
    assert torch.equal(posterior.log_prob(theta), plain.log_prob(theta))
    assert posterior.trace == plain.trace and posterior._state.report is None and posterior._map is None
    assert posterior._state.optimizer.param_groups[0]["lr"] == plain._state.optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="fitted to"):
        posterior.sample((2,), -X_O)


def test_a_family_of_ones_own_can_be_amortised_by_name() -> None:
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    posterior = VIPosterior(Seen(), prior, q=named_family("gaussian_diag", coordinates(prior)))
    config = posterior.train_amortized(*simulations(), **{**QUICK, "flow_type": None}).q.config
    assert config.flow_type == "gaussian_diag"


def test_a_family_without_a_name_has_no_amortised_form() -> None:
    coords = coordinates(box())
    posterior = made(q=LinkedFamily(GaussianBody(2), coords, lambda dim: GaussianBody(dim)))
    with pytest.raises(
        ValueError, match=r"`flow_type`: expected one of .* no conditional form; got NoneType"
    ):
        fitted(posterior, flow_type=None)
    assert fitted(posterior, flow_type="gf").q.config.flow_type == "gf"
