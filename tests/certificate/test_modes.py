"""Modes among draws whose modes are known."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from visbi.certificate import Mode, find_modes
from visbi.certificate import modes as module
from visbi.certificate.modes import _joined, _nearest


def gaussians(centres: list[list[float]], shares: list[float], sd: float = 1.0) -> MixtureSameFamily:
    loc = torch.tensor(centres, dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(torch.tensor(shares, dtype=torch.float64)), Independent(Normal(loc, sd), 1)
    )


def banana(z: Tensor) -> Tensor:
    bent = (z[:, 1] - 0.5 * z[:, 0].square()) / 0.3
    return -0.5 * (z[:, 0] / 3).square() - 0.5 * bent.square() - 0.5 * z[:, 2:].square().sum(-1)


def funnel(z: Tensor) -> Tensor:
    d = z.shape[1]
    inside = z[:, 1:].square().sum(-1) / z[:, 0].exp() + (d - 1) * z[:, 0]
    return -0.5 * (z[:, 0] / 3).square() - 0.5 * inside


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dim", [1, 2])
def test_two_modes_with_draws_in_the_valley_between(dim, seed):
    torch.manual_seed(seed)
    p = gaussians([[-3.0] * dim, [3.0] + [-3.0] * (dim - 1)], [0.3, 0.7])
    z = p.sample((2000,))
    left, right = sorted(find_modes(z, p.log_prob), key=lambda mode: mode.place[0])
    assert left.weight == pytest.approx(float((z[:, 0] < 0).double().mean()), abs=0.005)
    assert left.weight + right.weight == pytest.approx(1.0)
    assert left.place[0] == pytest.approx(-3.0, abs=0.5) and right.place[0] == pytest.approx(3.0, abs=0.5)


def test_many_modes_come_heaviest_first():
    shares = [0.05, 0.4, 0.25, 0.3]
    p = gaussians([[-6.0, -6.0], [-5.0, 6.0], [6.0, 5.0], [3.0, -7.0]], shares, 0.5)
    found = find_modes(p.sample((4000,)), p.log_prob)
    assert [mode.weight for mode in found] == pytest.approx(sorted(shares, reverse=True), abs=0.03)
    places = torch.tensor([mode.place for mode in found], dtype=torch.float64)
    expected = p.component_distribution.base_dist.loc[[1, 3, 2, 0]]
    torch.testing.assert_close(places, expected, atol=0.5, rtol=0)


def test_modes_in_many_dimensions():
    p = gaussians([[-4.0] * 20, [4.0] * 20], [0.5, 0.5])
    found = find_modes(p.sample((2000,)), p.log_prob)
    assert [mode.weight for mode in found] == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize("dim", [1, 2, 10, 30])
def test_a_gaussian_is_one(dim):
    z = torch.randn(2000, dim, dtype=torch.float64)
    (only,) = find_modes(z, lambda z: -0.5 * z.square().sum(-1) + 1e4)
    assert only.weight == 1.0
    assert math.hypot(*only.place) == pytest.approx(float(z[:600].norm(dim=-1).min()))


@pytest.mark.parametrize("dim", [2, 5, 10])
def test_bent_and_funnel_shaped_modes_stay_whole(dim):
    z = torch.randn(2000, dim, dtype=torch.float64)
    bent = z.clone()
    bent[:, 0] *= 3
    bent[:, 1] = 0.3 * z[:, 1] + 0.5 * bent[:, 0].square()
    assert [mode.weight for mode in find_modes(bent, banana)] == [1.0]
    narrow = z.clone()
    narrow[:, 0] *= 3
    narrow[:, 1:] *= (narrow[:, :1] / 2).exp()
    assert [mode.weight for mode in find_modes(narrow, funnel)] == [1.0]


def test_a_ring_is_one():
    z = torch.randn(2000, 2, dtype=torch.float64)
    z = z / z.norm(dim=-1, keepdim=True) * (4 + 0.1 * torch.randn(2000, 1, dtype=torch.float64))
    found = find_modes(z, lambda z: -0.5 * ((z.norm(dim=-1) - 4) / 0.1).square())
    assert [mode.weight for mode in found] == [1.0]


def test_no_mode_of_a_few_stray_draws():
    p = gaussians([[0.0], [50.0]], [0.5, 0.5])
    z = torch.randn(600, 1, dtype=torch.float64)
    z[:3] += 50.0
    assert [mode.weight for mode in find_modes(z, p.log_prob)] == [1.0]


def test_places_are_reported_as_asked():
    z = torch.randn(600, 2, dtype=torch.float64)
    (mode,) = find_modes(z, lambda z: -0.5 * z.square().sum(-1), lambda z: z[:, :1].exp())
    assert isinstance(mode, Mode) and len(mode.place) == 1
    top = z[z.square().sum(-1).argmin()]
    assert mode.place[0] == pytest.approx(math.exp(top[0]))


def test_draws_that_do_not_move_along_an_axis():
    z = torch.randn(600, 2, dtype=torch.float64)
    z[:, 1] = 2.0
    assert [mode.weight for mode in find_modes(z, lambda z: -0.5 * z[:, 0].square())] == [1.0]


def test_scales_of_the_axes_do_not_matter():
    p = gaussians([[-4.0, 0.0], [4.0, 0.0]], [0.5, 0.5])
    scale = torch.tensor([1e-3, 1e4], dtype=torch.float64)
    z = p.sample((2000,))
    plain = find_modes(z, p.log_prob)
    scaled = find_modes(z * scale, lambda y: p.log_prob(y / scale))
    assert [mode.weight for mode in scaled] == [mode.weight for mode in plain] and len(plain) == 2


@pytest.mark.parametrize("seed", range(20))
def test_what_hangs_together_is_what_scipy_says(seed: int):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    torch.manual_seed(seed)
    n, links = int(torch.randint(2, 300, ())), int(torch.randint(0, 400, ()))
    i, j = torch.randint(n, (2, links))
    graph = coo_array((torch.ones(links).numpy(), (i.numpy(), j.numpy())), shape=(n, n))
    count, theirs = connected_components(graph, directed=False)
    pairs = torch.stack([_joined(torch.arange(n), i, j), torch.as_tensor(theirs).long()])
    assert pairs.unique(dim=1).shape[1] == count == len(pairs[0].unique())


@pytest.mark.parametrize("at_once", [1, 700, 10**9])
def test_nearest_in_pieces(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    z, places = torch.randn(50, 3).double(), torch.randn(20, 3).double()
    assert torch.equal(_nearest(z, places), torch.cdist(z, places).argmin(1))
