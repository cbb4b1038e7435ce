"""The amortised loop: every option acts, held-out loss decides, best weights are kept."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.families import ZukoFlowType, named_family
from visbi.families.conditional import ConditionalFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.fitting import amortized_loop
from visbi.fitting.amortized import fit_amortized
from visbi.fitting.amortized_config import AmortizedOptions, Choice, check_simulations, chosen_config
from visbi.fitting.amortized_objectives import Pairs
from visbi.fitting.parameters import VIPosteriorParameters
from visbi.potentials import CustomPotential
from visbi.priors import coordinates

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
SMALL = dict(show_progress_bar=False, n_particles=4, max_num_iters=5, seed=None)


def potential(seen=None):
    def log_p(theta, x):
        if seen is not None:
            seen.append((theta.detach(), x))
        return PRIOR.log_prob(theta) - 2 * (theta - x).square().sum(-1)

    return CustomPotential(log_p, PRIOR)


def family(name="gaussian"):
    config = ConditionalConfig(
        flow_type=name, num_transforms=2, hidden_features=8, z_score_theta="none", z_score_x="none"
    )
    return ConditionalFamily(coordinates(PRIOR), (2,), config)


def pairs(x):
    return Pairs(x, x)


def fit(seen=None, q=None, n=40, **changes):
    torch.manual_seed(1)
    x = torch.randn(n, 2)
    return fit_amortized(
        family() if q is None else q, potential(seen), pairs(x), AmortizedOptions(**SMALL | changes)
    )


def test_pairs_each_x_with_its_own_draws():
    seen = []
    result = fit(seen, n_particles=3, batch_size=4, validation_batch_size=2, validation_n_particles=5)
    assert {len(theta) for theta, _ in seen} == {3 * 4, 5 * 2}
    assert all(len(theta) == len(x) for theta, x in seen)
    step = next(x for theta, x in seen if len(theta) == 12)
    assert torch.equal(step[:4], step[4:8]) and len(step[:4].unique(dim=0)) == 4
    assert result.trace.num_iters == 5


def test_held_out_x_are_not_trained_on_and_have_the_same_noise():
    seen = []
    fit(seen, batch_size=8, n_particles=2, validation_batch_size=10, validation_fraction=0.25)
    rows = [(len(theta) == 20, x) for theta, x in seen]
    held_out = torch.cat([x for is_held_out, x in rows if is_held_out]).unique(dim=0)
    trained = torch.cat([x for is_held_out, x in rows if not is_held_out]).unique(dim=0)
    assert len(held_out) == 10
    assert not (held_out[:, None] == trained).all(-1).any()


def test_held_out_loss_does_not_depend_on_the_seed():
    losses = set()
    for seed in (1, 2):
        torch.manual_seed(0)
        q = family()
        torch.manual_seed(seed)
        options = AmortizedOptions(**SMALL)
        x = torch.arange(80.0).reshape(40, 2) / 40
        losses.add(fit_amortized(q, potential(), pairs(x), options).trace.validation_loss[0])
    assert len(losses) == 1


def test_best_weights_are_kept():
    torch.manual_seed(0)
    result = fit(learning_rate=3.0, clip_value=1e6, max_num_iters=15, stop_after_iters=100)
    trace = result.trace
    best = min(trace.validation_loss)
    assert trace.validation_loss[trace.best_iter] == best < trace.validation_loss[-1]
    torch.manual_seed(1)
    again = fit_amortized(
        result.conditional,
        potential(),
        pairs(torch.randn(40, 2)),
        AmortizedOptions(**SMALL | {"max_num_iters": 1}),
    )
    assert again.trace.validation_loss[0] == pytest.approx(best, rel=1e-6)


def test_stops_early_and_says_why():
    trace = fit(learning_rate=3.0, clip_value=1e6, max_num_iters=200, stop_after_iters=3).trace
    assert trace.num_iters == trace.best_iter + 3 < 200
    assert "stop_after_iters = 3" in trace.stop_reason
    assert "max_num_iters = 5" in fit().trace.stop_reason


def test_ctrl_c_keeps_the_best(monkeypatch):
    calls = []
    step = amortized_loop._step

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(amortized_loop, "_step", interrupted)
    result = fit(max_num_iters=50)
    assert result.trace.num_iters == 3 and result.trace.stop_reason == "interrupted"
    assert not result.conditional.training


def test_potential_without_finite_values_ends_the_fit():
    nowhere = CustomPotential(lambda theta, x: theta.sum(-1) * torch.nan, PRIOR)
    options = AmortizedOptions(**SMALL | {"max_num_iters": 200, "stop_after_iters": 200})
    trace = fit_amortized(family(), nowhere, pairs(torch.randn(10, 2)), options).trace
    assert trace.num_iters == trace.skipped == 50 and "finite" in trace.stop_reason
    assert trace.excluded == 50 * 9 * 4


def test_particles_without_a_finite_potential_are_left_out():
    def log_p(theta, x):
        return torch.where(theta[:, 0] > 1, torch.nan, -(theta - x).square().sum(-1))

    result = fit_amortized(
        family(), CustomPotential(log_p, PRIOR), pairs(torch.randn(40, 2)), AmortizedOptions(**SMALL)
    )
    assert result.trace.excluded > 0 and result.trace.skipped == 0
    assert all(p.isfinite().all() for p in result.conditional.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"n_particles": 5},
        {"learning_rate": 0.1},
        {"gamma": 0.5},
        {"clip_value": 1e-12},
        {"batch_size": 3},
        {"validation_fraction": 0.5},
        {"validation_batch_size": 1},
        {"validation_n_particles": 7},
    ],
)
def test_option_has_an_effect(change):
    def run(**options):
        torch.manual_seed(0)
        return fit(q=family(), **options).trace

    assert run() == run()
    assert run(**change) != run()


@pytest.mark.parametrize("name", ["n_particles", "max_num_iters", "batch_size", "stop_after_iters"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_sizes_are_positive_whole_numbers(name, value):
    with pytest.raises(ValueError, match=name):
        AmortizedOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("clip_value", -1.0),
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("validation_batch_size", 0),
        ("validation_n_particles", -3),
    ],
)
def test_bad_numbers(name, value):
    with pytest.raises(ValueError, match=name):
        AmortizedOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("show_progress_bar", "yes"), ("seed", "x"), ("retrain_from_scratch", 1)]
)
def test_bad_kinds(name, value):
    with pytest.raises(TypeError, match=name):
        AmortizedOptions(**{name: value})


def test_precedence_of_choices():
    instance = Choice(named_family("nice", coordinates(PRIOR)), 3, 4, "none", "none")
    params = VIPosteriorParameters(q="naf", num_transforms=7)
    assert chosen_config(Choice(), None, instance).flow_type == "nice"
    assert chosen_config(Choice(), params, instance).flow_type == "naf"
    chosen = chosen_config(Choice(ZukoFlowType.NSF, hidden_features=9), params, instance)
    assert (chosen.flow_type, chosen.num_transforms, chosen.hidden_features) == ("nsf", 7, 9)
    assert chosen.z_score_x == "independent"
    with pytest.raises(TypeError, match="params"):
        chosen_config(Choice(), {"q": "maf"}, instance)
    with pytest.raises(ValueError, match="flow_type"):
        chosen_config(Choice("mdn"), None, instance)
    with pytest.raises(ValueError, match="flow_type"):
        chosen_config(Choice(), VIPosteriorParameters(q=PRIOR), instance)


@pytest.mark.parametrize(
    ("name", "value"),
    [("q", "mdn"), ("vi_method", "KL"), ("num_transforms", 0), ("hidden_features", 0.5), ("z_score_x", 1)],
)
def test_parameters_check_themselves(name, value):
    with pytest.raises(ValueError, match=name):
        VIPosteriorParameters(**{name: value})


def test_parameters_are_frozen():
    with pytest.raises(AttributeError):
        VIPosteriorParameters().q = "nsf"


def test_simulations_of_one_number_get_an_axis():
    theta, x = check_simulations(torch.zeros(3, 2), torch.arange(3), 2, "cpu")
    assert x.shape == (3, 1) and x.dtype == theta.dtype
