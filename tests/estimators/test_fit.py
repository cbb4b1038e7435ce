"""What `fit_likelihood` and `fit_ratio` share: the door, seeds, ensembles, starts."""

import math

import pytest
import torch
from torch.distributions import Distribution

from visbi.core.random import seeded
from visbi.estimators import TrainingOptions, fit_likelihood, fit_ratio

SHORT = TrainingOptions(max_epochs=2)


def simulations(n=300, seed=0):
    with seeded(seed):
        theta = torch.randn(n, 2)
        return theta, theta @ torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]) + torch.randn(n, 3)


def likelihood(theta, x, **options):
    keywords = dict(num_transforms=2, hidden_features=10, options=SHORT, seed=0, show_progress_bar=False)
    return fit_likelihood(theta, x, **{**keywords, **options})


def ratio(theta, x, **options):
    keywords = dict(hidden_features=10, options=SHORT, seed=0, show_progress_bar=False)
    return fit_ratio(theta, x, **{**keywords, **options})


def values(fitted, theta, x):
    estimator = fitted.estimator
    return (
        estimator.log_prob(x, theta) if hasattr(estimator, "log_prob") else estimator.log_ratio(theta, x)
    ).detach()


def members(fitted, theta, x):
    estimator = fitted.estimator
    if hasattr(estimator, "log_prob"):
        return (
            estimator.members_log_prob(x, theta),
            estimator.members_log_prob_iid(x, theta),
            estimator.log_prob_iid(x, theta),
        )
    return (
        estimator.members_log_ratio(theta, x),
        estimator.members_log_ratio_iid(theta, x),
        estimator.log_ratio_iid(theta, x),
    )


both = pytest.mark.parametrize("fit", [likelihood, ratio])


@both
@pytest.mark.parametrize(
    ("theta", "x", "message"),
    [
        (torch.zeros(3, 2), torch.randn(4, 3), "`theta` and `x`: expected equally many rows; got 3 and 4"),
        (torch.zeros(4), torch.randn(4, 3), r"`theta`: expected shape \(N, D\); got \(4,\)"),
        (torch.randn(4, 2), torch.randn(4), r"`x`: expected shape \(N, \.\.\.\)"),
        (torch.randn(4, 2), torch.randn(4, 0), r"`x`: expected shape \(N, \.\.\.\)"),
        (torch.randn(0, 2), torch.randn(0, 3), "at least one simulation"),
        (torch.tensor([[math.nan, 0.0]]), torch.randn(1, 3), "`theta`: expected finite numbers; got 1 of 2"),
        (
            torch.randn(1, 2),
            torch.tensor([[math.inf, math.nan, 0.0]]),
            "`x`: expected finite numbers; got 2 of 3",
        ),
    ],
)
def test_bad_simulations(fit, theta, x, message):
    with pytest.raises(ValueError, match=message):
        fit(theta, x)


@both
def test_unknown_keyword(fit):
    with pytest.raises(TypeError, match="learning_rate"):
        fit(*simulations(), learning_rate=1e-3)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"flow": "glow"}, "`flow`: expected one of 'maf', 'nsf'; got 'glow'"),
        ({"num_transforms": 0}, "`num_transforms`"),
        ({"hidden_features": -1}, "`hidden_features`"),
        ({"z_score_x": "yes"}, "`z_score_x`: expected one of 'none'"),
        ({"z_score_theta": "yes"}, "`z_score_theta`: expected one of 'none'"),
        ({"ensemble": 0}, "`ensemble`"),
        (
            {"embedding_net": torch.nn.Linear(3, 2)},
            "`embedding_net`: expected None.*invertible in x; got Linear",
        ),
        ({"weights": torch.ones(3)}, r"`weights`: expected shape \(300,\)"),
        ({"weights": -torch.ones(300)}, "`weights`: expected non-negative"),
        ({"weights": torch.zeros(300)}, "`weights`: expected non-negative"),
    ],
)
def test_bad_options_of_a_likelihood(keywords, message):
    with pytest.raises(ValueError, match=message):
        likelihood(*simulations(), **keywords)


def counts(x):
    return x.round()


def one_count(x):
    return torch.cat([x, x[:, :1].round()], 1)


def few_values(x):
    return (2 * x).round() / 2 + 0.1


def clipped(x):
    return x.clamp_min(0.3)


def constant(x):
    return torch.cat([x, torch.full_like(x[:, :1], 0.7)], 1)


@pytest.mark.parametrize("damage", [counts, one_count, few_values, clipped, constant])
def test_x_without_a_density(damage):
    theta, x = simulations()
    with pytest.raises(
        ValueError, match=r"`x`: expected columns with a density; .*Discrete and mixed x are not"
    ):
        likelihood(theta, damage(x))
    assert torch.isfinite(values(ratio(theta, damage(x)), theta, damage(x))).all()


def test_simulations_that_occur_twice_are_continuous():
    theta, x = simulations()
    twice = torch.arange(300) // 2
    assert len(likelihood(theta[twice], x[twice]).traces) == 1


@both
def test_seeds_and_global_state(fit):
    theta, x = simulations()
    state, validation = torch.random.get_rng_state(), Distribution._validate_args
    first, again, other = fit(theta, x), fit(theta, x), fit(theta, x, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert Distribution._validate_args is validation is True
    assert torch.equal(values(first, theta, x), values(again, theta, x))
    assert first.traces == again.traces
    assert not torch.equal(values(first, theta, x), values(other, theta, x))
    torch.manual_seed(3)
    free = fit(theta, x, seed=None)
    torch.manual_seed(3)
    assert torch.equal(values(free, theta, x), values(fit(theta, x, seed=None), theta, x))


@both
def test_ensembles_average_densities(fit):
    theta, x = simulations()
    fitted = fit(theta, x, ensemble=3)
    each, each_iid, iid = members(fitted, theta, x)
    assert each.shape == each_iid.shape == (3, 300)
    assert len(fitted.traces) == len(fitted.estimator) == 3
    assert bool((each.std(0) > 0).all())
    average = each.detach().double().exp().mean(0).log()
    torch.testing.assert_close(values(fitted, theta, x).double(), average, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(iid, each_iid.logsumexp(0) - math.log(3))
    # the first member is what a fit of one network gives, up to how processors round what is stacked
    torch.testing.assert_close(each[0], values(fit(theta, x), theta, x), rtol=1e-4, atol=1e-4)


def test_ensembles_draw_from_every_member():
    theta, x = simulations()
    ensemble = likelihood(theta, x, ensemble=2).estimator
    with torch.no_grad():
        ensemble.members[1].standardise_x.loc += 1000.0
    draws = ensemble.sample(theta[:2], 2000, seed=0)
    assert draws.shape == (2000, 2, 3)
    far = (draws[:, 0, 0] > 500).float()
    assert 0.45 < float(far.mean()) < 0.55
    assert 0.4 < float(far[:1000].mean()) < 0.6  # in random order
    assert torch.equal(draws, ensemble.sample(theta[:2], 2000, seed=0))
    one_each = ensemble.sample(theta[:1].expand(2000, -1), 1, seed=0)[0, :, 0] > 500
    assert 0.45 < float(one_each.float().mean()) < 0.55  # and for every theta by itself
    assert ensemble.sample(theta[:0], 3).shape == (3, 0, 3)


def test_ensembles_want_members_of_one_shape():
    theta, x = simulations()
    one, other = likelihood(theta, x).estimator, likelihood(theta, x[:, :2]).estimator
    with pytest.raises(ValueError, match="`members`: expected estimators of one shape"):
        type(one)([*one.members, *other.members])
    with pytest.raises(ValueError, match="`members`"):
        type(one)([])


@both
def test_workers_train_the_same_networks(fit):
    theta, x = simulations()
    alone, shared = fit(theta, x, ensemble=2), fit(theta, x, ensemble=2, workers=2)
    rounding = dict(rtol=1e-5, atol=1e-5)  # rows side by side end elsewhere in a vector instruction
    for a, b in zip(shared.traces, alone.traces, strict=True):
        assert a.validation == pytest.approx(b.validation, rel=1e-5)
    torch.testing.assert_close(values(shared, theta, x), values(alone, theta, x), **rounding)
    assert not any(member.training for member in shared.estimator.members)
    longer = TrainingOptions(max_epochs=4)
    further = [
        fit(theta, x, ensemble=2, options=longer, resume=early, workers=2) for early in (alone, shared)
    ]
    torch.testing.assert_close(*(values(fitted, theta, x) for fitted in further), **rounding)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_training_raises_is_raised_wherever_it_was(workers):
    theta, x = simulations()
    nothing = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(nothing.weight, math.nan)
    with pytest.raises(RuntimeError, match="finite"):
        likelihood(theta, x, ensemble=2, theta_embedding_net=nothing, workers=workers)


@both
def test_workers_are_checked(fit):
    theta, x = simulations()
    with pytest.raises(ValueError, match="`workers`"):
        fit(theta, x, workers=0)


@both
def test_resume_equals_uninterrupted_training(fit):
    theta, x = simulations()
    whole = fit(theta, x, ensemble=2, options=TrainingOptions(max_epochs=5))
    half = fit(theta, x, ensemble=2, options=TrainingOptions(max_epochs=2))
    before = values(half, theta, x)
    resumed = fit(theta, x, ensemble=2, options=TrainingOptions(max_epochs=5), resume=half, seed=None)
    assert resumed.traces == whole.traces
    assert torch.equal(values(resumed, theta, x), values(whole, theta, x))
    assert torch.equal(values(half, theta, x), before)


@both
def test_warm_start_begins_where_the_earlier_estimator_is(fit):
    theta, x = simulations()
    early = fit(theta, x, ensemble=2, options=TrainingOptions(max_epochs=30))
    before = values(early, theta, x)
    more_theta, more_x = simulations(600, seed=1)
    still = TrainingOptions(max_epochs=1, learning_rate=1e-12)
    frozen = fit(more_theta, more_x, ensemble=2, options=still, warm_start=early.estimator)
    torch.testing.assert_close(values(frozen, theta, x), before, rtol=1e-5, atol=1e-5)
    warm = fit(more_theta, more_x, ensemble=2, warm_start=early.estimator)
    assert not torch.equal(values(warm, theta, x), before)
    assert torch.equal(values(early, theta, x), before)
    cold = fit(more_theta, more_x, ensemble=2)
    assert warm.traces[0].validation[0] < cold.traces[0].validation[0]


@both
def test_starts_must_match(fit):
    theta, x = simulations()
    early = fit(theta, x)
    with pytest.raises(ValueError, match="ensemble = 2; got ensemble = 1"):
        fit(theta, x, ensemble=2, warm_start=early.estimator)
    with pytest.raises(ValueError, match="D = 1; got D = 2"):
        fit(theta[:, :1], x, warm_start=early.estimator)
    with pytest.raises(ValueError, match="the shape of x"):
        fit(theta, x[:, :2], warm_start=early.estimator)
    with pytest.raises(ValueError, match="hidden_features=11"):
        fit(theta, x, hidden_features=11, warm_start=early.estimator)
    with pytest.raises(ValueError, match="one of them at most"):
        fit(theta, x, warm_start=early.estimator, resume=early)
    with pytest.raises(ValueError, match="`resume`: expected a state of training on 299 rows"):
        fit(theta[1:], x[1:], resume=early)


@both
def test_device_and_precision_of_the_door(fit):
    theta, x = simulations()
    double = fit(theta.double(), x.double())
    single = fit(theta, x)
    torch.testing.assert_close(values(double, theta, x), values(single, theta, x), rtol=1e-2, atol=1e-2)
    moved = single.estimator.to("meta")
    assert values(type(single)(moved, ()), theta.to("meta"), x.to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("fit", "name"), [(fit_likelihood, "theta_embedding_net"), (fit_ratio, "embedding_net")]
)
def test_a_net_that_embeds_nothing_is_named(fit, name):
    theta, x = torch.randn(400, 2), torch.randn(400, 2)
    with pytest.raises(TypeError, match=f"`{name}`: expected an nn.Module or None; got int"):
        fit(theta, x, show_progress_bar=False, **{name: 3})
    with pytest.raises(ValueError, match=rf"`{name}`: expected one that takes \(M, 2\)"):
        fit(theta, x, show_progress_bar=False, **{name: torch.nn.Linear(3, 2)})
