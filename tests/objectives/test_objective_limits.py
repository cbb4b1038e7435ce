"""What the objectives share, where they differ, and what must not matter to them."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from family_cases import real_prior, rough_family
from visbi.families import LinkedFamily, family_from, named_family
from visbi.objectives import Loss, forward_kl, importance_weighted, renyi, reverse_kl
from visbi.objectives.particles import draw_particles
from visbi.priors import coordinates

ALL = {
    "rKL": reverse_kl,
    "rKL total": partial(reverse_kl, stick_the_landing=False),
    "fKL": forward_kl,
    "IW": partial(importance_weighted, K=8),
    "IW total": partial(importance_weighted, K=8, dreg=False),
    "IW sticking": partial(importance_weighted, K=8, dreg=False, stick_the_landing=True),
    "alpha": renyi,
    "alpha total": partial(renyi, dreg=False),
    "alpha sticking": partial(renyi, alpha=2.0, dreg=False, stick_the_landing=True),
}
EVERY = pytest.mark.parametrize("objective", ALL.values(), ids=ALL)


def log_p(theta):
    """A banana: no family here can be exact."""
    return -0.5 * theta[:, 0].square() - 2.0 * (theta[:, 1] - 0.3 * theta[:, 0].square()).square()


def family(name="gaussian", dim=2):
    standard = MultivariateNormal(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    q = named_family(name, coordinates(standard), num_transforms=2, hidden_features=8).double()
    if name == "gaussian":
        q.body.set_(torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.8, 0.0], [0.3, 0.6]]).double())
    return q


def step(objective, q, n, potential=log_p, seed=1):
    """Value and gradient under one seed."""
    torch.manual_seed(seed)
    loss = objective(q, potential, n)
    found = torch.autograd.grad(loss.surrogate, q.trainable(), allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, q.trainable(), strict=True)]
    return loss.value, torch.cat([g.flatten() for g in flat]), loss


def assert_same(a, b, tolerance=1e-9):
    assert a[0] == pytest.approx(b[0], abs=tolerance, rel=tolerance)
    torch.testing.assert_close(a[1], b[1], atol=tolerance, rtol=tolerance)


# where they are the same

ESTIMATORS = [dict(dreg=False), dict(dreg=False, stick_the_landing=True), dict(dreg=True)]
ESTIMATE = pytest.mark.parametrize("options", ESTIMATORS)


def sticks(options):
    return options != dict(dreg=False)


@ESTIMATE
@pytest.mark.parametrize("name", ["gaussian", "maf"])
def test_groups_of_one_are_the_reverse_kl(options, name):
    q = family(name)
    reverse = partial(reverse_kl, stick_the_landing=sticks(options))
    assert_same(step(partial(importance_weighted, K=1, **options), q, 200), step(reverse, q, 200))


@ESTIMATE
@pytest.mark.parametrize("alpha", [1.0 - 1e-6, 1.0, 1.0 + 1e-6])
def test_alpha_to_one_is_the_reverse_kl(options, alpha):
    q = family()
    reverse = partial(reverse_kl, stick_the_landing=sticks(options))
    tolerance = 1e-9 if alpha == 1.0 else 1e-4
    assert_same(step(partial(renyi, alpha=alpha, **options), q, 200), step(reverse, q, 200), tolerance)


@pytest.mark.parametrize("alpha", [1.0 - 1e-6, 1.0 - 1e-10, 1.0 + 1e-15])
def test_value_near_alpha_one_is_not_lost_to_rounding(alpha):
    q = family()
    near, exact = (step(partial(renyi, alpha=a), q, 200)[0] for a in (alpha, 1.0))
    assert near == pytest.approx(exact, abs=1e-4)


@ESTIMATE
@pytest.mark.parametrize("n", [2, 16])
def test_alpha_zero_is_one_importance_weighted_group(options, n):
    q = family()
    one_group = step(lambda f, p, _: importance_weighted(f, p, 1, K=n, **options), q, 1)
    assert_same(step(partial(renyi, alpha=0.0, **options), q, n), one_group)


def test_dreg_has_precedence():
    q = family()
    for objective in (partial(importance_weighted, K=4), renyi):
        both = step(partial(objective, dreg=True, stick_the_landing=True), q, 64)
        assert_same(both, step(partial(objective, dreg=True), q, 64))


def test_defaults():
    q = family()
    assert_same(step(reverse_kl, q, 64), step(partial(reverse_kl, stick_the_landing=True), q, 64))
    with_defaults = step(partial(importance_weighted, K=8, dreg=True), q, 64)
    assert_same(step(importance_weighted, q, 64), with_defaults)
    assert_same(step(renyi, q, 64), step(partial(renyi, alpha=0.5, dreg=True), q, 64))


# where they differ


@pytest.mark.parametrize("name", ["gaussian", "maf"])
def test_pairwise_different_gradients(name):
    q = family(name)
    methods = {
        "rKL": partial(reverse_kl, n=4000),
        "fKL": partial(forward_kl, n=4000),
        "IW": partial(importance_weighted, n=500, K=8),
        "alpha": partial(renyi, n=4000, alpha=0.5),
    }
    found = {}
    for method, objective in methods.items():
        found[method] = step(lambda f, p, _, objective=objective: objective(f, p), q, 4000)[1]
    for a, b in itertools.combinations(found, 2):
        x, y = found[a], found[b]
        scale = float(x @ y / (y @ y))  # the best multiple of one is still not the other
        assert float((x - scale * y).norm() / x.norm()) > 0.05, (a, b)
        assert float((x - y).norm() / x.norm()) > 0.1, (a, b)


def test_estimators_of_one_objective_differ_draw_by_draw():
    q = family()
    for objective in (partial(importance_weighted, K=4), renyi):
        found = [step(partial(objective, **options), q, 64)[1] for options in ESTIMATORS]
        for x, y in itertools.combinations(found, 2):
            assert float((x - y).norm() / x.norm()) > 0.01
    total, path = (step(partial(reverse_kl, stick_the_landing=s), q, 64)[1] for s in (False, True))
    assert float((total - path).norm() / total.norm()) > 0.01


# where q is right


@pytest.mark.parametrize("name", ["gaussian", "maf", "nsf", "nice", "gf"])
def test_path_gradients_vanish_where_q_is_exact(name):
    q = rough_family(name, real_prior(2))
    exact = copy.deepcopy(q).requires_grad_(False)
    tolerance = 1e-9 if name in ("gaussian", "maf", "nsf", "nice") else 1e-4
    for key in ("rKL", "IW", "IW sticking", "alpha", "alpha sticking"):
        value, gradient, _ = step(ALL[key], q, 32, exact.log_prob)
        assert abs(value) < tolerance and float(gradient.abs().max()) < tolerance, key
    for key in ("rKL total", "IW total", "alpha total"):
        assert float(step(ALL[key], q, 32, exact.log_prob)[1].abs().max()) > 1e-2, key


# what must not matter


@EVERY
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_the_potential_changes_no_gradient(objective, shift):
    q = family()
    value, gradient, _ = step(objective, q, 64)
    shifted_value, shifted_gradient, _ = step(objective, q, 64, lambda theta: log_p(theta) + shift)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-7, atol=1e-8)
    expected = value if objective is forward_kl else value - shift
    assert shifted_value == pytest.approx(expected, abs=1e-7)


@EVERY
def test_weights_that_would_overflow(objective):
    q = family()
    value, gradient, loss = step(objective, q, 64, lambda theta: 1e6 * log_p(theta))
    assert math.isfinite(value) and bool(gradient.isfinite().all()) and loss.excluded == 0


@EVERY
def test_a_potential_in_float32(objective):
    q = family()
    _, gradient, loss = step(objective, q, 64, lambda theta: log_p(theta).float())
    torch.testing.assert_close(gradient, step(objective, q, 64)[1], rtol=1e-3, atol=1e-3)
    assert loss.surrogate.dtype == torch.float64


# potentials that are not finite

BAD = {
    "nan": lambda t: torch.where(t[:, 0] > 0.5, torch.nan, log_p(t)),
    "inf": lambda t: torch.where(t[:, 0] > 0.5, torch.inf, log_p(t)),
    "-inf": lambda t: torch.where(t[:, 0] > 0.5, -torch.inf, log_p(t)),
    # its derivative is NaN, too
    "root": lambda t: log_p(t) + (0.5 - t[:, 0]).sqrt() * 0.0,
    "log of zero": lambda t: log_p(t) + 0.0 * (0.5 - t[:, 0]).clamp_min(0.0).log(),
}


@EVERY
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_left_out_and_counted(objective, bad):
    q = family()
    value, gradient, loss = step(objective, q, 100, BAD[bad])
    assert math.isfinite(value) and bool(gradient.isfinite().all() and (gradient != 0).any())
    torch.manual_seed(1)
    draws = 800 if "importance" in str(objective) else 100
    expected = int((q.draw(draws).theta[:, 0] > 0.5).sum())
    assert 0 < loss.excluded == expected < draws
    # whatever is written there, the gradient is the same
    torch.testing.assert_close(gradient, step(objective, q, 100, BAD["nan"])[1], rtol=1e-6, atol=1e-6)


def test_a_single_particle_counts_in_full():
    q = family()
    torch.manual_seed(1)
    draws = q.draw(1)
    assert draws.log_q_path is not None
    by_hand = torch.autograd.grad(-(log_p(draws.theta) - draws.log_q_path).sum(), q.trainable())
    expected = torch.cat([g.flatten() for g in by_hand])
    torch.testing.assert_close(step(reverse_kl, q, 1)[1], expected)


def test_excluded_particles_send_no_gradient():
    q = family()
    torch.manual_seed(1)
    draws = q.draw(100)
    kept = draws.theta[:, 0] <= 0.5
    assert draws.log_q_path is not None
    by_hand = -(log_p(draws.theta) - draws.log_q_path)[kept].mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand, q.trainable())])
    value, gradient, _ = step(reverse_kl, q, 100, BAD["nan"])
    torch.testing.assert_close(gradient, expected)
    assert value == pytest.approx(float(by_hand.detach()))


@EVERY
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_finite_is_nan_without_a_step(objective, value):
    q = family()
    got, gradient, loss = step(objective, q, 10, lambda theta: value + 0 * theta[:, 0])
    assert math.isnan(got) and bool((gradient == 0).all()) and bool(loss.surrogate == 0)
    assert loss.excluded in (10, 80)


def test_groups_that_are_gone_do_not_count():
    q = family()
    torch.manual_seed(1)
    draws = q.draw(40)
    alive = (draws.theta[:, 0] <= 0.5).reshape(20, 2)
    assert int((~alive.any(1)).sum()) > 0
    log_w = torch.where(alive, (log_p(draws.theta) - draws.log_q).detach().reshape(20, 2), -torch.inf)
    expected = -(torch.logsumexp(log_w[alive.any(1)], 1) - math.log(2)).mean()
    value, gradient, loss = step(partial(importance_weighted, K=2), q, 20, BAD["-inf"])
    assert value == pytest.approx(float(expected)) and loss.excluded == int((~alive).sum())
    assert draws.log_q_path is not None
    through = torch.where(alive, (log_p(draws.theta) - draws.log_q_path).reshape(20, 2), 0.0)
    shares = torch.softmax(log_w[alive.any(1)], 1).square()
    by_hand = -(shares * through[alive.any(1)]).sum() / int(alive.any(1).sum())
    found = torch.autograd.grad(by_hand, q.trainable())
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in found]))


# what the objectives ask of a family and of a potential


class Unscored(Normal):
    has_rsample = False


def unscored():
    loc, scale = (torch.full((2,), v, dtype=torch.float64, requires_grad=True) for v in (0.0, 1.0))
    return family_from(Independent(Unscored(loc, scale), 1), coordinates(real_prior(2)))


@pytest.mark.parametrize("objective", [importance_weighted, renyi])
def test_bounds_of_weights_need_reparameterisation(objective):
    with pytest.raises(
        ValueError,
        match=r"^`q`: expected a reparameterised family for vi_method '(IW|alpha)'; got one without rsample$",
    ):
        objective(unscored(), log_p, 10)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_reverse_kl_without_reparameterisation(n):
    for potential, finite in ((log_p, True), (lambda t: torch.full((len(t),), torch.nan), False)):
        value, gradient, loss = step(reverse_kl, unscored(), n, potential)
        assert math.isfinite(value) is finite and bool(gradient.isfinite().all())
        assert bool(loss.surrogate.isfinite()) and loss.excluded == (0 if finite else n)
        assert bool((gradient != 0).any()) is (finite and n > 1)


@pytest.mark.parametrize("case", ["forward", "score"])
def test_potentials_without_gradient_serve_where_none_is_needed(case):
    def numpy_potential(theta):
        return torch.as_tensor(-0.5 * (theta.numpy() ** 2).sum(-1))

    objective, q = (forward_kl, family()) if case == "forward" else (reverse_kl, unscored())
    assert bool((step(objective, q, 50, numpy_potential)[1] != 0).any())


def test_a_potential_keeps_out_of_the_gradient_where_it_is_not_needed():
    own = torch.ones(1, requires_grad=True)  # such as the weights of a network
    loss = reverse_kl(unscored(), lambda theta: own * log_p(theta), 50)
    loss.surrogate.backward()
    assert own.grad is None


@pytest.mark.parametrize("key", ["rKL", "rKL total", "IW", "IW total", "alpha", "alpha total"])
def test_the_path_part_is_drawn_where_it_is_needed(key):
    class Watched(LinkedFamily):
        def draw(self, n, *, path=True):
            asked.append(path)
            return super().draw(n, path=path)

    asked = []
    q = family()
    step(ALL[key], Watched(q.body, q.coords, q.build), 10)
    assert asked == ["total" not in key]


def test_particles_say_what_does_not_count():
    torch.manual_seed(1)
    particles = draw_particles(family(), BAD["nan"], 100, path=False)
    outside = particles.draws.theta[:, 0] > 0.5
    assert 0 < particles.excluded < 100 and torch.equal(particles.valid, ~outside)
    assert bool((particles.log_p[outside] == 0).all()) and bool(
        (particles.log_w()[outside] == -math.inf).all()
    )
    assert Loss(torch.zeros(()), 0.0).excluded == 0
    with pytest.raises(ValueError, match=r"^path gradients need .* draws with path=True$"):
        particles.through_path()


@EVERY
def test_a_finite_potential_is_evaluated_once(objective):
    calls = []

    def counted(theta):
        calls.append(len(theta))
        return log_p(theta)

    step(objective, family(), 10, counted)
    assert len(calls) == 1


def test_weight_transform():
    q = family()
    seen = []

    def clip(weights):
        seen.append(weights)
        return weights.clamp(max=1.5)

    clipped = step(partial(forward_kl, weight_transform=clip), q, 200)
    (weights,) = seen
    assert (
        weights.shape == (200,) and float(weights.mean()) == pytest.approx(1.0) and float(weights.max()) > 1.5
    )
    torch.manual_seed(1)
    draws = q.draw(200)
    capped = weights.clamp(max=1.5) / weights.clamp(max=1.5).sum()
    by_hand = torch.autograd.grad(-(capped * q.log_prob(draws.theta.detach())).sum(), q.trainable())
    torch.testing.assert_close(clipped[1], torch.cat([g.flatten() for g in by_hand]), rtol=1e-6, atol=1e-9)
    plain = step(forward_kl, q, 200)
    assert clipped[0] == plain[0] and not torch.allclose(clipped[1], plain[1], rtol=1e-2)


def test_forward_value_is_never_negative():
    q = family()
    for seed in range(20):
        assert step(forward_kl, q, 5, seed=seed)[0] >= 0
