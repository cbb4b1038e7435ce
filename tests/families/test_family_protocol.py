"""What every named family promises, at every dimension."""

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Independent, LogNormal

from family_cases import (
    AUTOREGRESSIVE,
    DIMS,
    PRIORS,
    box_prior,
    gradients,
    mixed_prior,
    positive_prior,
    real_prior,
    rough_family,
    roughened,
    simplex_prior,
)
from visbi.families import FAMILY_NAMES, named_body, named_family
from visbi.priors import BoxUniform, coordinates

EVERY_NAME = pytest.mark.parametrize("name", FAMILY_NAMES)
EVERY_DIM = pytest.mark.parametrize("dim", DIMS)
BISECTING = ("naf", "unaf", "sospf")  # log_prob is right to about 1e-6
CORNERS = {
    "mixed": mixed_prior(),
    "simplex": simplex_prior(),
    "wide simplex": simplex_prior(8),
}


def draws_to_invert(name, dim):
    """How many draws a test can afford to invert: some bisect, once per entry and layer."""
    return 2 if (name, dim) == ("unaf", 20) else 16


@EVERY_DIM
@EVERY_NAME
def test_draws(name, dim):
    prior = box_prior(dim, torch.float32)
    family = roughened(named_family(name, coordinates(prior), num_transforms=2, hidden_features=8))
    draws = family.draw(64)
    assert family.event_shape == (dim,)
    assert draws.theta.shape == (64, dim) and draws.theta.dtype == torch.float32
    assert draws.log_q_path is not None
    for log_q in (draws.log_q, draws.log_q_path, draws.log_q_score):
        assert log_q.shape == (64,) and log_q.dtype == torch.float64
        assert torch.equal(log_q, draws.log_q)
    assert bool(draws.log_q.isfinite().all() and prior.support.check(draws.theta).all())
    assert family.draw(3, path=False).log_q_path is None
    for shape in ((), (5,), (2, 3), (0,)):
        sample = family.sample(shape)
        assert sample.shape == (*shape, dim) and not sample.requires_grad
    assert family.rsample((4,)).requires_grad


@EVERY_DIM
@EVERY_NAME
def test_log_prob_at_own_draws_is_their_log_q(name, dim):
    family = rough_family(name, box_prior(dim), num_transforms=1 if dim == 20 else 2)
    with torch.no_grad():
        draws = family.draw(draws_to_invert(name, dim))
        log_q = family.log_prob(draws.theta)
    assert log_q.dtype == torch.float64
    torch.testing.assert_close(log_q, draws.log_q, rtol=1e-4, atol=1e-4)
    assert float(log_q.std()) > 1e-3  # weights that do something


@EVERY_NAME
def test_log_prob_takes_any_leading_shape(name):
    family = rough_family(name, box_prior(2))
    theta = family.sample((2, 3))
    flat = family.log_prob(theta.reshape(6, 2))
    assert flat.shape == (6,)
    torch.testing.assert_close(family.log_prob(theta), flat.reshape(2, 3))
    torch.testing.assert_close(family.log_prob(theta[0, 0]), flat[0])


@EVERY_NAME
def test_nowhere_nan_and_minus_infinity_outside(name):
    nan, inf = math.nan, math.inf
    never = [[nan, 0.5], [0.5, nan], [inf, 0.5], [0.5, -inf], [nan, inf]]
    outside = {
        "box": [[-1.1, 0.5], [0.5, 2.1], [1e30, 0.5]],
        "positive": [[-1e-3, 0.5], [0.5, -1e30]],
        "real": [],
    }
    edge = {
        "box": [[-1.0, 2.0], [1.0, -1.0], [1.0 - 1e-12, 0.0]],
        "positive": [[0.0, 1.0], [1e-300, 1.0], [1e4, 1e6]],
        "real": [[50.0, 50.0], [1e6, -1e6], [1e30, 0.0]],
    }
    for kind, prior in PRIORS.items():
        family = rough_family(name, prior(2))
        rows = torch.tensor([*never, *outside[kind], *edge[kind], [0.5, 0.7]], dtype=torch.float64)
        log_q = family.log_prob(rows.requires_grad_())
        excluded = len(never) + len(outside[kind])
        assert bool((log_q[:excluded] == -inf).all()), kind
        assert not bool(log_q.isnan().any()) and bool(log_q[-1].isfinite()), kind
        (slope,) = torch.autograd.grad(log_q[-1], rows)
        assert bool((slope[:excluded] == 0).all() and (slope[-1] != 0).all() and slope[-1].isfinite().all())


@EVERY_DIM
@EVERY_NAME
def test_gradient_reaches_every_parameter(name, dim):
    family = rough_family(name, box_prior(dim))
    draws = family.draw(64)
    reached = gradients((draws.theta * torch.arange(1.0, dim + 1)).sum() + draws.log_q.sum(), family)
    names = [n for n, _ in family.named_parameters()]
    assert len(names) == len(reached) > 0
    for parameter, gradient in zip(names, reached, strict=True):
        idle = gradient.numel() == 0 or (dim == 1 and parameter.endswith(".A"))  # a rotation of one axis
        assert bool(gradient.isfinite().all() and (gradient != 0).any()) or idle, parameter


@EVERY_DIM
@EVERY_NAME
def test_path_part_is_log_q_with_frozen_parameters(name, dim):
    family = rough_family(name, positive_prior(dim), num_transforms=1 if dim == 20 else 2)
    draws = family.draw(draws_to_invert(name, dim))
    frozen = copy.deepcopy(family).requires_grad_(False)
    weight = torch.linspace(0.5, 1.5, len(draws.theta), dtype=torch.float64)
    expected = gradients((weight * frozen.log_prob(draws.theta)).sum(), family)
    assert draws.log_q_path is not None
    assert max(float(g.abs().max()) for g in expected if g.numel()) > 1e-3
    for got, want in zip(gradients((weight * draws.log_q_path).sum(), family), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def along(direction, step, family, function):
    """Finite difference of `function()` in the parameters."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(family.trainable(), direction, strict=True):
                p.add_(sign * step * d)
            values.append(function())
            for p, d in zip(family.trainable(), direction, strict=True):
                p.sub_(sign * step * d)
    return float(values[0] - values[1]) / (2 * step)


@EVERY_NAME
def test_score_part_is_log_q_at_fixed_theta(name):
    family = rough_family(name, real_prior(3))
    draws = family.draw(16)
    weight = torch.linspace(-1.0, 2.0, 16, dtype=torch.float64)
    score = gradients((weight * draws.log_q_score).sum(), family)
    size = math.sqrt(sum(float(g.square().sum()) for g in score))
    step = 1e-2 if name in BISECTING else 1e-4
    theta = draws.theta.detach()
    for _ in range(3):
        direction = [torch.randn_like(g) for g in score]
        norm = math.sqrt(sum(float(d.square().sum()) for d in direction))
        direction = [d / norm for d in direction]
        got = sum(float((g * d).sum()) for g, d in zip(score, direction, strict=True))
        want = along(direction, step, family, lambda: (weight * family.log_prob(theta)).sum())
        assert abs(got - want) < 2e-3 * size


# zuko counts the weights of the networks inside twice when it differentiates an inverse found by bisection
BISECTED = pytest.mark.xfail(reason="gradient of log_prob by the weights of the networks inside is zuko's")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=BISECTED) if n in ("naf", "unaf") else n for n in FAMILY_NAMES]
)
def test_gradient_of_log_prob_is_the_score(name):
    family = rough_family(name, real_prior(3))
    draws = family.draw(16)
    score = gradients(draws.log_q_score.sum(), family)
    at_fixed_theta = gradients(family.log_prob(draws.theta.detach()).sum(), family)
    for got, want in zip(at_fixed_theta, score, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@EVERY_NAME
def test_score_has_mean_zero(name):
    family = rough_family(name, box_prior(2))
    batches = []
    for _ in range(24):
        score = gradients(family.draw(200).log_q_score.mean(), family)
        batches.append(torch.cat([g.flatten() for g in score]))
    values = torch.stack(batches)
    mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    assert bool((error > 0).any())
    assert bool((mean.abs() <= 6 * error + 1e-9).all())  # Student's t with 23 degrees of freedom


@EVERY_NAME
def test_no_path_without_gradients(name):
    family = rough_family(name, box_prior(2))
    with torch.no_grad():
        assert family.draw(4).log_q_path is None
    without = family.draw(4, path=False)
    with pytest.raises(ValueError, match="path=True"):
        _ = without.log_q_score


def equal_behaviour(a, b):
    theta = a.sample((5,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = a.sample((7,))
        torch.manual_seed(3)
        second = b.sample((7,))
    return torch.equal(first, second) and torch.equal(a.log_prob(theta), b.log_prob(theta))


@EVERY_NAME
@pytest.mark.parametrize("copied", [lambda q: pickle.loads(pickle.dumps(q)), copy.deepcopy])
def test_copies(name, copied):
    family = rough_family(name, mixed_prior())
    before = [p.detach().clone() for p in family.parameters()]
    other = copied(family)
    assert equal_behaviour(family, other)
    with torch.no_grad():
        for p in other.trainable():
            p.mul_(1.5).add_(0.01)
    assert not equal_behaviour(family, other)
    assert all(torch.equal(p, q) for p, q in zip(family.parameters(), before, strict=True))


@EVERY_NAME
def test_state_dict_and_fresh(name):
    family = rough_family(name, mixed_prior())
    before = copy.deepcopy(family.state_dict())
    fresh = family.fresh().double()
    assert type(fresh) is type(family) and fresh.event_shape == family.event_shape
    shared = {p.data_ptr() for p in family.parameters()} & {p.data_ptr() for p in fresh.parameters()}
    assert not shared and not equal_behaviour(family, fresh)
    assert all(torch.equal(family.state_dict()[k], v) for k, v in before.items())
    assert not fresh.load_state_dict(before).missing_keys
    assert equal_behaviour(family, fresh)


@EVERY_NAME
def test_fresh_weights_are_as_at_the_beginning(name):
    coords = coordinates(box_prior(2))
    start = named_family(name, coords, num_transforms=2, hidden_features=8).double()
    rough = roughened(copy.deepcopy(start))
    fresh = rough.fresh().double()
    assert [p.shape for p in start.trainable()] == [p.shape for p in fresh.trainable()]
    at_start, now = kl_to(start, box_prior(2)), kl_to(fresh, box_prior(2))
    if name in ("naf", "unaf", "sospf"):  # whose beginning is random
        assert now < 3 * at_start + 1
    else:
        assert abs(now - at_start) < 0.1 and kl_to(rough, box_prior(2)) > 0.02 + max(now, at_start)


def kl_to(family, prior, n=2000):
    with torch.no_grad():
        draws = family.draw(n)
        return float((draws.log_q - prior.log_prob(draws.theta)).mean())


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
@pytest.mark.parametrize("name", ["maf", "nsf", "nice", "gaussian", "gaussian_diag"])
def test_starts_as_the_prior(name, dim):
    ones = torch.ones(dim, dtype=torch.float64)
    for prior in (box_prior(dim), real_prior(dim), Independent(LogNormal(ones, 0.5 * ones), 1)):
        coords = coordinates(prior, z_score="structured")
        family = named_family(name, coords)
        assert -0.005 < kl_to(family, prior) < 0.02


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("num_transforms", [1, 3])
def test_an_autoregressive_flow_is_sampled_in_one_pass(name, num_transforms):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    for dim in (2, 6):
        body = named_body(name, num_transforms=num_transforms, hidden_features=8)(dim)
        networks = [layer.hyper for layer in body.layers if hasattr(layer, "hyper")]
        assert len(networks) == num_transforms
        for network in networks:
            network.register_forward_hook(count)
        calls = 0
        body.rsample_and_log_prob(4)
        assert calls == num_transforms


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("path", [False, True])
def test_work_of_a_draw_does_not_grow_with_dimension(name, path):
    counts = []
    for dim in (3, 7):
        family = rough_family(name, box_prior(dim))
        family.draw(4, path=path)
        with torch.profiler.profile() as record:
            family.draw(4, path=path)
        products = ("aten::addmm", "aten::mm", "aten::bmm")
        counts.append(sum(event.name in products for event in record.events()))
    assert counts[0] == counts[1] > 0


@EVERY_NAME
@pytest.mark.parametrize("corner", CORNERS)
def test_mixed_and_simplex_supports(name, corner):
    prior = CORNERS[corner]
    if name in ("naf", "unaf") and corner == "wide simplex":
        pytest.skip("nothing that the narrow one does not show, at many times the cost")
    family = rough_family(name, prior)
    draws = family.draw(200)
    assert draws.theta.shape == (200, *prior.event_shape)
    assert bool(prior.support.check(draws.theta).all())
    assert bool(prior.log_prob(draws.theta).isfinite().all())
    with torch.no_grad():
        torch.testing.assert_close(family.log_prob(draws.theta[:16]), draws.log_q[:16], rtol=1e-5, atol=1e-5)
        outside = draws.theta[:16].clone()
        outside[:, 1] = -0.1 - outside[:, 1]
        assert bool((family.log_prob(outside) == -math.inf).all())


@pytest.mark.parametrize("corner", CORNERS)
def test_simplex_and_mixed_start_near_the_prior(corner):
    # the simplex has no closed form: its coordinates are standardised, not Gaussian
    bound = 0.02 if corner == "mixed" else 0.3
    assert -0.02 < kl_to(named_family("gaussian", coordinates(CORNERS[corner])), CORNERS[corner]) < bound


def test_names_and_sizes_are_checked():
    coords = coordinates(BoxUniform(torch.zeros(2), torch.ones(2)))
    with pytest.raises(ValueError, match=r"`q`: expected one of 'maf'.*got 'MAF'"):
        named_family("MAF", coords)
    with pytest.raises(ValueError, match="`num_transforms`"):
        named_family("maf", coords, num_transforms=0)
    with pytest.raises(ValueError, match="`hidden_features`"):
        named_family("maf", coords, hidden_features=-3)
    with pytest.raises(ValueError, match="at least one free dimension"):
        named_body("gaussian")(0)


def test_number_and_width_of_layers_are_as_asked():
    narrow = named_body("maf", num_transforms=2, hidden_features=8)(3)
    wide = named_body("maf", num_transforms=4, hidden_features=16)(3)
    assert (len(narrow.layers), len(wide.layers)) == (2, 4)
    assert [layer.hyper[0].out_features for layer in wide.layers] == [16] * 4
