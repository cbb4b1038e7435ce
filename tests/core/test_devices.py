"""Moving distributions, transforms and constraints, entry by entry."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    ComposeTransform,
    ExpTransform,
    Gumbel,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    Transform,
    TransformedDistribution,
    biject_to,
    constraints,
)

from visbi.core.devices import map_tensors, move
from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal, coordinates

DISTRIBUTIONS = {
    "Normal": lambda: Normal(torch.zeros(2), torch.ones(2)),
    "Independent": lambda: Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
    "MultivariateNormal": lambda: MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "TransformedDistribution": lambda: TransformedDistribution(
        Normal(torch.zeros(2), torch.ones(2)),
        [AffineTransform(torch.ones(2), torch.ones(2)), SigmoidTransform()],
    ),
    "Gumbel": lambda: Independent(Gumbel(torch.zeros(2), torch.ones(2)), 1),
    "MixtureSameFamily": lambda: MixtureSameFamily(
        Categorical(torch.ones(3)), Independent(Normal(torch.zeros(3, 2), torch.ones(3, 2)), 1)
    ),
    "BoxUniform": lambda: BoxUniform(torch.zeros(2), torch.ones(2)),
    "TruncatedNormal": lambda: TruncatedNormal(torch.zeros(2), 1.0),
    "MultipleIndependent": lambda: MultipleIndependent(
        [Normal(torch.zeros(1), torch.ones(1)), BoxUniform(torch.zeros(1), torch.ones(1))]
    ),
}


def tensors_of(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda t: (found.append(t), t)[1])
    return found


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_every_tensor_of_a_distribution_moves_and_the_original_stays(make):
    original = make()
    moved = move(original, "meta")
    assert type(moved) is type(original)
    assert len(tensors_of(moved)) == len(tensors_of(original)) > 0
    assert {t.device.type for t in tensors_of(moved)} == {"meta"}
    assert {t.device.type for t in tensors_of(original)} == {"cpu"}
    assert moved.sample((5,)).device.type == "meta"
    assert moved.sample((5,)).shape == original.sample((5,)).shape
    assert original.log_prob(original.sample((5,))).isfinite().all()


TRANSFORMS = {
    "affine": lambda: AffineTransform(torch.ones(2), 2 * torch.ones(2)),
    "inverse": lambda: AffineTransform(torch.ones(2), 2 * torch.ones(2)).inv,
    "composed": lambda: ComposeTransform(
        [ExpTransform(), AffineTransform(torch.ones(2), 2 * torch.ones(2)).inv]
    ),
    "of a box": lambda: biject_to(BoxUniform(torch.zeros(2), torch.ones(2)).support),
    "of a product": lambda: biject_to(DISTRIBUTIONS["MultipleIndependent"]().support),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_move_with_their_inverses(make):
    original: Transform = make()
    x = torch.full((3, 2), 0.25)
    y = original(x)
    assert torch.allclose(original.inv(y), x)  # the inverse exists, and could be left behind
    moved = move(original, "meta")
    assert moved(x.to("meta")).device.type == "meta"
    assert moved.inv(y.to("meta")).device.type == "meta"
    assert {t.device.type for t in tensors_of(moved)} <= {"meta"}
    assert torch.equal(original(x), y)


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.interval(torch.zeros(2), torch.ones(2)),
        constraints.independent(constraints.greater_than(torch.zeros(2)), 1),
        constraints.cat(
            [constraints.less_than(torch.zeros(1)), constraints.interval(torch.zeros(1), 1.0)], -1
        ),
    ],
    ids=repr,
)
def test_constraints_move(constraint):
    moved = move(constraint, "meta")
    assert {t.device.type for t in tensors_of(moved)} == {"meta"}
    assert {t.device.type for t in tensors_of(constraint)} == {"cpu"}


def test_a_moved_distribution_computes_the_same():
    for make in DISTRIBUTIONS.values():
        original = make()
        doubled = map_tensors(original, lambda t: t.double() if t.is_floating_point() else t)
        theta = original.sample((20,))
        assert doubled.log_prob(theta.double()).dtype is torch.float64
        torch.testing.assert_close(doubled.log_prob(theta.double()).float(), original.log_prob(theta))


def test_containers_keep_their_kind_and_shared_parts_stay_shared():
    shared = Normal(torch.zeros(1), torch.ones(1))
    moved = move({"a": [shared, shared], "b": (torch.ones(1), 3, "text", None)}, "meta")
    assert moved["a"][0] is moved["a"][1]
    assert moved["a"][0].loc.device.type == "meta"
    assert isinstance(moved["b"], tuple)
    assert moved["b"][0].device.type == "meta"
    assert moved["b"][1:] == (3, "text", None)
    assert shared.loc.device.type == "cpu"


def test_a_list_that_holds_itself():
    ring: list = [torch.ones(1)]
    ring.append(ring)
    moved = move(ring, "meta")
    assert moved[1] is moved
    assert moved[0].device.type == "meta"


def test_modules_move_in_place_as_torch_does():
    module = nn.Linear(2, 2)
    assert move(module, "meta") is module
    assert module.weight.device.type == "meta"


def test_coordinates_move_with_their_support():
    coords = coordinates(DISTRIBUTIONS["MultipleIndependent"]()).to("meta")
    assert coords.to_theta(torch.zeros(3, 2, device="meta"))[0].device.type == "meta"
    assert coords.to_z(torch.zeros(3, 2, device="meta"))[0].device.type == "meta"
    assert {t.device.type for t in tensors_of(coords.support)} == {"meta"}


def test_what_holds_no_tensor_comes_back_as_it_is():
    class Opaque:
        pass

    thing = Opaque()
    assert move(thing, "meta") is thing
