"""Families that are a user's own."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    ExpTransform,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    constraints,
)

from family_cases import box_prior, real_prior, simplex_prior
from visbi.families import DistributionFamily, family_from, named_family
from visbi.families.custom import trainable_tensors
from visbi.priors import coordinates

REAL = coordinates(real_prior(2))
BOX = coordinates(box_prior(2))


def leaf(*shape, value=0.0):
    return torch.full(shape, value, dtype=torch.float64, requires_grad=True)


def normal(dim=2):
    loc, scale = leaf(dim, value=0.3), leaf(dim, value=0.8)
    return Independent(Normal(loc, scale), 1), [loc, scale]


class Unscored(Normal):
    """A normal that does not let gradients through its draws."""

    has_rsample = False


class Wave(nn.Module):
    """A distribution that is a module, and builds its parts in every call."""

    event_shape = torch.Size([2])
    has_rsample = True

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def _now(self):
        return Independent(Normal(self.loc, self.log_scale.exp()), 1)

    def rsample(self, shape=()):
        return self._now().rsample(torch.Size(shape))

    def sample(self, shape=()):
        with torch.no_grad():
            return self.rsample(shape)

    def log_prob(self, value):
        return self._now().log_prob(value)


def build(event_shape, link_transform, device):
    loc = torch.zeros(event_shape, dtype=torch.float64, device=device, requires_grad=True)
    scale = torch.ones(event_shape, dtype=torch.float64, device=device, requires_grad=True)
    base = Independent(Normal(loc, scale), 1)
    return TransformedDistribution(base, [link_transform])


def identities(tensors):
    return {id(t) for t in tensors}


# what trains


def test_parameters_and_modules_are_taken_as_given():
    q, (loc, scale) = normal()
    assert identities(family_from(q, REAL, parameters=[loc]).trainable()) == {id(loc)}
    network = nn.Linear(2, 3)
    family = family_from(q, REAL, parameters=iter([scale, scale]), modules=[network])
    assert identities(family.trainable()) == identities([scale, *network.parameters()])
    assert len(family.trainable()) == 3


def test_tensors_of_a_distribution_and_its_parts_are_found():
    q, leaves = normal()
    assert identities(trainable_tensors(q)) == identities(leaves)
    assert identities(trainable_tensors(Independent(Normal(leaves[0], torch.ones(2)), 1))) == {id(leaves[0])}
    loc, tril, shift = leaf(2), torch.eye(2, dtype=torch.float64).requires_grad_(), leaf(2)
    assert identities(trainable_tensors(MultivariateNormal(loc, scale_tril=tril))) == identities([loc, tril])
    transformed = TransformedDistribution(q, [ExpTransform(), AffineTransform(shift, torch.ones(2))])
    assert identities(trainable_tensors(transformed)) == identities([*leaves, shift])
    weights = Categorical(probs=torch.ones(3, dtype=torch.float64))
    mixture = MixtureSameFamily(weights, Independent(Normal(means := leaf(3, 2), leaf(3, 2, value=1.0)), 1))
    assert id(means) in identities(trainable_tensors(mixture)) and len(trainable_tensors(mixture)) == 2


def test_broadcast_arguments_are_found_as_the_tensors_they_came_from():
    loc, scale = leaf(2), leaf(value=1.0)
    assert identities(trainable_tensors(Independent(Normal(loc, scale), 1))) == identities([loc, scale])


def test_module_and_parameters_method():
    wave = Wave()
    assert identities(trainable_tensors(wave)) == identities(wave.parameters())
    q, (_, scale) = normal()
    q.parameters = lambda: iter([scale])
    assert identities(trainable_tensors(q)) == {id(scale)}


def test_nothing_to_train_is_an_error():
    constant = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    with pytest.raises(ValueError, match=r"`q`: expected trainable parameters .*`parameters=`.*Independent"):
        family_from(constant, REAL)
    with pytest.raises(ValueError, match="`q`: expected trainable"):
        family_from(constant, REAL, parameters=[torch.zeros(2)])
    with pytest.raises(TypeError, match="`parameters`: expected tensors; got Linear"):
        family_from(constant, REAL, parameters=[nn.Linear(2, 2)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "q",
    [
        Independent(Normal(leaf(2), leaf(2).exp()), 1),
        Independent(Beta(leaf(2, value=1.0), leaf(2, value=1.0)), 1),
        MultivariateNormal(leaf(2), torch.eye(2, dtype=torch.float64).requires_grad_()),
    ],
)
def test_tensors_computed_from_trainable_ones_are_an_error(q):
    with pytest.raises(ValueError, match="not computed from others"):
        trainable_tensors(q)


# what q may be


@pytest.mark.parametrize("shape", [(3,), (1,)])
def test_wrong_event_shape(shape):
    q = Independent(Normal(leaf(*shape), leaf(*shape, value=1.0)), 1)
    with pytest.raises(ValueError, match=rf"`q`: expected event_shape \(2,\).*\({shape[0]},\)"):
        family_from(q, REAL)


def test_batches_and_scalars_are_errors():
    for q in (Normal(leaf(2), leaf(2, value=1.0)), Normal(leaf(), leaf(value=1.0))):
        with pytest.raises(ValueError, match=r"`q`: expected event_shape \(D,\) and batch_shape \(\)"):
            family_from(q, REAL)


def test_no_event_shape_is_an_error():
    class Bare:
        def sample(self, shape=()):
            return torch.zeros(*shape, 2)

        def log_prob(self, value):
            return value.sum(-1)

    with pytest.raises(ValueError, match=r"`q`: expected event_shape \(D,\)"):
        family_from(Bare(), REAL)


@pytest.mark.parametrize("q", [3, None, torch.zeros(2)])
def test_neither_distribution_nor_callable(q):
    with pytest.raises(TypeError, match="`q`: expected a family's name, a Distribution"):
        family_from(q, REAL)


def test_a_family_passes_unchanged():
    family = named_family("gaussian", REAL)
    assert family_from(family, REAL) is family


# the link


def test_unbounded_q_is_carried_into_a_bounded_support():
    family = family_from(normal()[0], BOX)
    draws = family.draw(500)
    assert family.coords is BOX
    assert bool(box_prior(2).support.check(draws.theta).all())
    with torch.no_grad():
        torch.testing.assert_close(family.log_prob(draws.theta), draws.log_q, rtol=1e-6, atol=1e-6)


def test_q_inside_the_support_is_used_as_it_is():
    rate = leaf(2, value=1.5)
    positive = coordinates(Independent(LogNormal(torch.zeros(2).double(), torch.ones(2).double()), 1))
    q = Independent(LogNormal(leaf(2), rate), 1)
    family = family_from(q, positive)
    assert family.coords is None
    theta = torch.tensor([[0.5, 2.0], [1.0, -1.0], [math.nan, 1.0], [math.inf, 1.0]], dtype=torch.float64)
    log_q = family.log_prob(theta)
    torch.testing.assert_close(log_q[0], q.log_prob(theta[0]))
    assert bool((log_q[1:] == -math.inf).all())
    assert family_from(normal()[0], REAL).coords is None


def test_simplex_takes_a_dirichlet_or_a_normal_of_one_dimension_less():
    coords = coordinates(simplex_prior(3))
    direct = family_from(Dirichlet(leaf(3, value=2.0)), coords)
    carried = family_from(normal(2)[0], coords)
    assert direct.coords is None and carried.coords is coords
    for family in (direct, carried):
        theta = family.sample((20,))
        assert theta.shape == (20, 3) and bool(constraints.simplex.check(theta).all())
        assert bool(family.log_prob(theta).isfinite().all())
        assert bool((family.log_prob(theta - 0.1) == -math.inf).all())


@pytest.mark.parametrize("coords", [REAL, BOX])
def test_log_prob_is_nowhere_nan(coords):
    family = family_from(normal()[0], coords)
    rows = [[0.5, 0.5], [math.nan, 0.5], [math.inf, 0.5], [-math.inf, math.inf], [1e30, 0.5]]
    theta = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    log_q = family.log_prob(theta)
    assert (
        bool(log_q[0].isfinite()) and bool((log_q[1:4] == -math.inf).all()) and not bool(log_q.isnan().any())
    )
    (gradient,) = torch.autograd.grad(log_q[0], theta)
    assert bool(gradient.isfinite().all())
    assert family.log_prob(theta[1:2]).tolist() == [-math.inf]


def test_a_distribution_that_does_not_tell_its_support():
    class Silent(Distribution):
        arg_constraints = {}
        has_rsample = True

        def __init__(self):
            self.loc = leaf(2)
            super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

        def rsample(self, sample_shape=()):
            return self.loc + torch.randn(*sample_shape, 2, dtype=torch.float64)

        def log_prob(self, value):
            return -0.5 * (value - self.loc).square().sum(-1)

    family = family_from(Silent(), BOX)
    assert family.coords is BOX and bool(family.draw(5).log_q.isfinite().all())


# gradients


def by_hand(leaves, draws):
    """Path gradient of the log-density at the draws, by a copy of the distribution with constants."""
    frozen = Independent(Normal(*(t.detach() for t in leaves)), 1)
    return torch.autograd.grad(frozen.log_prob(draws.theta).sum(), leaves, retain_graph=True)


def test_path_and_score_parts():
    q, leaves = normal()
    draws = family_from(q, REAL).draw(20)
    assert draws.log_q_path is not None and draws.theta.requires_grad
    path = torch.autograd.grad(draws.log_q_path.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(path, by_hand(leaves, draws))
    score = torch.autograd.grad(draws.log_q_score.sum(), leaves)
    fixed = torch.autograd.grad(q.log_prob(draws.theta.detach()).sum(), leaves)
    torch.testing.assert_close(score, fixed)


def test_a_module_builds_its_density_anew():
    wave = Wave()
    family = family_from(wave, BOX)
    for _ in range(2):
        draws = family.draw(8)
        draws.log_q_score.sum().backward()  # a graph built only once would fail at the second
    assert family.reparameterised and all(p.grad is not None for p in family.trainable())
    with torch.no_grad():
        wave.log_scale.fill_(-5.0)
    assert float(family.coords.to_z(family.sample((200,)))[0].std()) < 0.02  # type: ignore[union-attr]


def test_not_reparameterised():
    loc = leaf(2)
    family = family_from(Independent(Unscored(loc, torch.ones(2, dtype=torch.float64)), 1), BOX)
    assert not family.reparameterised
    draws = family.draw(50)
    assert draws.log_q_path is None and not draws.theta.requires_grad
    (score,) = torch.autograd.grad(draws.log_q_score.sum(), loc)
    z = BOX.to_z(draws.theta)[0]
    torch.testing.assert_close(score, z.sum(0), rtol=1e-6, atol=1e-6)


# callables


def test_callable_gets_shape_link_and_device():
    family = family_from(build, BOX)
    assert isinstance(family, DistributionFamily) and family.coords is None
    assert len(family.trainable()) == 2
    theta = family.sample((100,))
    assert bool(box_prior(2).support.check(theta).all())
    with torch.no_grad():
        named = named_family("gaussian", BOX)
        torch.testing.assert_close(family.log_prob(theta), named.log_prob(theta), rtol=1e-5, atol=1e-5)


def test_callable_is_called_again_for_fresh_weights():
    family = family_from(build, BOX)
    with torch.no_grad():
        family.trainable()[0].add_(3.0)
    for fresh in (family.fresh(), family.fresh().fresh()):
        assert fresh is not family and fresh.trainable()[0].tolist() == [0.0, 0.0]
    assert family.trainable()[0].tolist() == [3.0, 3.0]


def test_an_object_goes_back_to_its_snapshot():
    q, (loc, scale) = normal()
    family = family_from(q, REAL)
    with torch.no_grad():
        loc.add_(3.0)
        scale.mul_(2.0)
    assert family.fresh() is family
    assert loc.tolist() == [0.3, 0.3] and scale.tolist() == [0.8, 0.8]


# copies


def broadcast():
    loc, tril = leaf(2), torch.eye(2, dtype=torch.float64).requires_grad_()
    return MultivariateNormal(loc, scale_tril=tril)  # holds a view of loc


def scalar_scale():
    return Independent(Normal(leaf(2), leaf(value=1.0)), 1)


def saved(family):
    buffer = io.BytesIO()
    torch.save(family, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f)), saved])
@pytest.mark.parametrize("q", [broadcast, scalar_scale, lambda: normal()[0], Wave, lambda: build])
@pytest.mark.parametrize("coords", [REAL, BOX])
def test_a_copy_is_trained_by_its_own_tensors(q, copied, coords):
    family = family_from(q(), coords)
    other = copied(family)
    theta = family.sample((5,))
    before = family.log_prob(theta).detach()
    torch.testing.assert_close(other.log_prob(theta).detach(), before)
    with torch.no_grad():
        for tensor in other.trainable():
            tensor.add_(0.7)
    assert torch.equal(family.log_prob(theta).detach(), before)
    assert not torch.allclose(other.log_prob(theta).detach(), before)
    found = torch.autograd.grad(other.draw(6).log_q_score.sum(), other.trainable())
    assert all(bool((g != 0).any()) for g in found)
    restarted = other.fresh()
    torch.testing.assert_close(restarted.log_prob(theta).detach(), before)


@pytest.mark.parametrize("q", [broadcast, scalar_scale, lambda: normal()[0], Wave])
def test_moved_to_another_type_it_still_trains(q):
    family = family_from(q(), REAL)
    tensors = family.trainable()
    moved = family.float()
    assert moved is family and all(a is b for a, b in zip(family.trainable(), tensors, strict=True))
    assert family.sample((3,)).dtype == torch.float32
    before = family.log_prob(torch.zeros(1, 2))
    found = torch.autograd.grad(family.draw(6).log_q_score.sum(), family.trainable())
    assert all(g.dtype == torch.float32 and bool((g != 0).any()) for g in found)
    with torch.no_grad():
        for tensor in family.trainable():
            tensor.add_(0.7)
    assert not torch.equal(family.log_prob(torch.zeros(1, 2)), before)


def test_a_move_to_where_it_is_changes_nothing():
    q = broadcast()
    family = family_from(q, REAL)
    assert family.to("cpu").double().distribution is q


def test_results_computed_from_trainable_tensors_cannot_be_copied():
    log_scale = leaf(2)
    family = family_from(Independent(Normal(leaf(2), log_scale.exp()), 1), REAL, parameters=[log_scale])
    with pytest.raises(ValueError, match="`q`: expected a distribution that holds its trainable tensors"):
        copy.deepcopy(family)
