"""Coordinates and their transforms work on after pickle, deepcopy and torch.save."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Gumbel,
    Independent,
    LogNormal,
    TransformedDistribution,
    Uniform,
    biject_to,
)

from prior_cases import PRIORS
from visbi.priors import BoxUniform, coordinates, mcmc_transform
from visbi.priors.inverse import Inverted, lasting


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def moved(value):
    return value.to("cpu") if hasattr(value, "to") else through_pickle(copy.deepcopy(value))


EVERY_WAY = pytest.mark.parametrize(
    "copied", [through_pickle, through_torch, copy.deepcopy, copy.copy, moved]
)
BOX = BoxUniform(torch.zeros(2), torch.ones(2))
POSITIVE = Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1)


@EVERY_WAY
@pytest.mark.parametrize("case", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("z_score", ["none", "structured"])
def test_coordinates(copied, case, z_score):
    coords = coordinates(case.prior, z_score=z_score)
    theta = case.prior.sample((20,))
    z, ladj = coords.to_z(theta)
    again = copied(coords)
    assert torch.equal(again.to_z(theta)[0], z)
    assert torch.equal(again.to_z(theta)[1], ladj)
    assert torch.equal(again.to_theta(z)[0], coords.to_theta(z)[0])
    assert torch.equal(again.contains(theta), torch.ones(20, dtype=torch.bool))


@EVERY_WAY
@pytest.mark.parametrize("case", PRIORS.values(), ids=PRIORS)
def test_transforms_and_their_inverses(copied, case):
    transform = mcmc_transform(case.prior)
    theta = case.prior.sample((20,))
    z = transform(theta)
    back = transform.inv(z)
    again = copied(transform)
    assert torch.equal(again(theta), z)
    assert torch.equal(again.inv(z), back)
    inverse = copied(transform.inv)
    assert torch.equal(inverse(z), back)
    assert torch.equal(inverse.inv(theta), z)
    assert torch.equal(inverse.log_abs_det_jacobian(z, theta), transform.inv.log_abs_det_jacobian(z, theta))
    twice = copied(copied(transform).inv)
    assert torch.equal(twice(z), back)


OWN = {
    "an .inv at the start": (POSITIVE, ComposeTransform([ExpTransform().inv, AffineTransform(1.0, 3.0)])),
    "an .inv": (BOX, biject_to(BOX.support).inv),
    "an .inv in the middle": (
        POSITIVE,
        ComposeTransform([ExpTransform().inv, AffineTransform(torch.ones(2), 3.0).inv]),
    ),
    "our own .inv.inv": (BOX, mcmc_transform(BOX).inv.inv),
}


@EVERY_WAY
@pytest.mark.parametrize(("prior", "transform"), OWN.values(), ids=OWN)
def test_coordinates_with_a_map_of_ones_own(copied, prior, transform):
    coords = coordinates(prior, theta_transform=transform)
    theta = prior.sample((20,))
    z = coords.to_z(theta)[0]
    again = copied(coords)
    assert torch.equal(again.to_z(theta)[0], z)
    assert torch.equal(again.to_theta(z)[0], coords.to_theta(z)[0])
    inverse = copied(coords.transform().inv)
    assert torch.equal(inverse(z), coords.to_theta(z)[0])


def test_a_copy_shares_nothing_with_the_original():
    coords = coordinates(PRIORS["beta"].prior)
    z = torch.zeros(1, 2)
    before = coords.to_theta(z)[0]
    other = copy.deepcopy(coords)
    other.blocks[0].loc += 1
    assert torch.equal(coords.to_theta(z)[0], before)
    assert not torch.equal(other.to_theta(z)[0], before)


@EVERY_WAY
def test_lasting_repairs_inverses_wherever_they_are(copied):
    # a Gumbel is a uniform sent through two inverses
    base = Uniform(torch.full((2,), 0.01), torch.full((2,), 0.99))
    y = torch.tensor([[0.2, 0.9]])
    for made in (Gumbel(torch.zeros(2), torch.ones(2)), TransformedDistribution(base, [ExpTransform().inv])):
        expected = made.cdf(y if isinstance(made, Gumbel) else -y)
        again = copied(lasting(made))
        assert torch.equal(again.cdf(y if isinstance(made, Gumbel) else -y), expected)
    nested = ComposeTransform([AffineTransform(1.0, 2.0).inv, ComposeTransform([ExpTransform().inv])])
    assert torch.equal(copied(lasting(nested))(y + 1), nested(y + 1))


def test_lasting_leaves_the_original_alone():
    original = ComposeTransform([ExpTransform().inv])
    part = original.parts[0]
    made = lasting(original)
    assert original.parts[0] is part
    assert isinstance(made.parts[0], Inverted)


def test_an_inverted_transform_is_what_torch_calls_inverse():
    forward = biject_to(BOX.support)
    ours, theirs = Inverted(forward), forward.inv
    theta = BOX.sample((4,))
    z = theirs(theta)
    assert torch.equal(ours(theta), z)
    assert torch.equal(ours.log_abs_det_jacobian(theta, z), theirs.log_abs_det_jacobian(theta, z))
    assert ours.inv is forward
    assert repr(ours.domain) == repr(theirs.domain)
    assert repr(ours.codomain) == repr(theirs.codomain)
    assert ours.bijective
    assert ours.forward_shape(torch.Size([4, 2])) == theirs.forward_shape(torch.Size([4, 2]))
    assert Inverted(AffineTransform(0.0, -1.0)).sign == -1
    cached = Inverted(ExpTransform()).with_cache()
    x = torch.ones(2)
    assert cached(x) is cached(x)
