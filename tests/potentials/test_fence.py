"""The fence: what lies inside, what it costs outside, and that nothing else of the potential changes."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.potentials import as_potential
from visbi.potentials.fence import Fence, FencedPotential
from visbi.priors import BoxUniform, coordinates

PRIOR = Independent(Normal(torch.zeros(2), 2 * torch.ones(2)), 1)


def fence_around(theta: Tensor, share: float = 0.99) -> Fence:
    return Fence(coordinates(PRIOR), theta, share=share)


@pytest.fixture
def theta() -> Tensor:
    return torch.tensor([1.0, -1.0]) + torch.randn(4000, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])


def toy(theta: Tensor, x_o: Tensor | None) -> Tensor:
    x_o = torch.zeros(1, 2) if x_o is None else x_o
    return -0.5 * (theta - x_o).square().sum(-1)


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_share_of_the_training_set_inside(theta: Tensor, share: float) -> None:
    assert fence_around(theta, share).inside(theta).double().mean() == pytest.approx(share, abs=1e-3)


def test_follows_the_correlation(theta: Tensor) -> None:
    fence = fence_around(theta)
    along, across = torch.tensor([[2.5, 0.5]]), torch.tensor([[2.5, -2.5]])  # equally far from the centre
    assert bool(fence.inside(along)) and not bool(fence.inside(across))


def test_distance_does_not_depend_on_the_units(theta: Tensor) -> None:
    wide = Independent(Normal(torch.zeros(2), torch.tensor([2.0, 2e3])), 1)
    scale = torch.tensor([1.0, 1e3])
    scaled = Fence(coordinates(wide), theta * scale)
    torch.testing.assert_close(
        scaled.distance(theta * scale), fence_around(theta).distance(theta), rtol=1e-4, atol=1e-4
    )


def test_works_in_the_prior_s_coordinates() -> None:
    prior = BoxUniform(torch.zeros(1), torch.ones(1))
    fence = Fence(coordinates(prior), 0.001 * torch.rand(500, 1), share=1.0)
    assert fence.distance(torch.tensor([[1e-7], [0.999]])).isfinite().all()
    assert fence.inside(torch.tensor([[0.0005], [0.9]])).tolist() == [True, False]


def test_penalty_is_zero_inside_and_quadratic_outside(theta: Tensor) -> None:
    fence = fence_around(theta)
    assert (fence.penalty(theta)[fence.inside(theta)] == 0).all()
    outside = torch.tensor([[30.0, -40.0], [300.0, -400.0]])
    beyond = fence.distance(outside) - fence.radius
    torch.testing.assert_close(fence.penalty(outside), 200 * beyond.square())


def test_gradient_points_back_inside(theta: Tensor) -> None:
    fence, far = fence_around(theta), torch.tensor([[9.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(-fence.penalty(far).sum(), far)
    assert gradient[0, 0] < 0 and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [(2, 0.99, "`theta`: expected more than 2 rows; got 2"), (10, 0.0, "`share`"), (10, 1.1, "`share`")],
)
def test_refuses(rows: int, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fence_around(torch.randn(rows, 2), share)


def test_potential_changes_only_outside(theta: Tensor) -> None:
    inner = as_potential(toy, PRIOR)
    fenced = FencedPotential(inner, fence_around(theta))
    x = torch.ones(1, 2)
    near, far = theta[:1] * 0 + fence_around(theta).loc.float(), torch.tensor([[30.0, 30.0]])
    assert torch.equal(fenced.evaluate(near, x), inner.evaluate(near, x))
    expected = inner.evaluate(far, x) - fenced.fence.penalty(far).float()
    assert torch.equal(fenced.evaluate(far, x), expected) and expected < inner.evaluate(far, x) - 100
    assert fenced.evaluate(near, x).dtype == inner.evaluate(near, x).dtype


def test_potential_uses_its_own_observation(theta: Tensor) -> None:
    inner = as_potential(toy, PRIOR)
    inner.set_x(torch.zeros(1, 2))
    fenced = FencedPotential(inner, fence_around(theta))
    assert torch.equal(fenced.x_o, inner.x_o)
    fenced.set_x(torch.ones(1, 2))
    near = fenced.fence.loc.float()[None]
    assert torch.equal(fenced(near), inner.evaluate(near, torch.ones(1, 2)))
    assert torch.equal(fenced.evaluate(near, None), fenced(near))
    assert torch.equal(inner.x_o, torch.zeros(1, 2))


def test_moves_with_coordinates_of_its_own(theta: Tensor) -> None:
    coords = coordinates(PRIOR)
    fenced = FencedPotential(as_potential(toy, PRIOR), Fence(coords, theta)).to("meta")
    assert fenced.fence.loc.device.type == fenced.fence.tril.device.type == "meta"
    assert fenced.inner.device == fenced.device == "meta"
    assert coords.low.device.type == "cpu"
