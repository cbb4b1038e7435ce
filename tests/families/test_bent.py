"""The map that bends, against autograd, and the body that it makes of a mixture."""

import pytest
import torch
from torch import Tensor

from visbi.families.bent import Bend, BentBody, features
from visbi.families.mixture import MixtureBody


def bend(d: int = 4, *, crossed: bool = True, order: list[int] | None = None) -> Bend:
    torch.manual_seed(d)
    i, _ = features(d, crossed=crossed)
    before = (i[:, None] <= torch.arange(d)).double()  # entry k has features of entries before it alone
    mean, log_scale = (0.3 * before * torch.randn(len(i), d).double() for _ in range(2))
    one = torch.ones(d).double()
    first = torch.arange(d) if order is None else torch.tensor(order)
    return Bend(0.5 * one, one + torch.rand(d), first, mean, log_scale, -0.4 * one, 0.7 * one, crossed)


@pytest.mark.parametrize("crossed", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_it_comes_back(order: list[int], crossed: bool):
    made = bend(order=order, crossed=crossed)
    u = torch.randn(3, 50, 4).double()
    z, log_det = made.push(u)
    back, log_det_back = made.pull(z)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(log_det_back, -log_det)
    assert bool(log_det.std() > 0.01)  # the bounds are not all that there is


@pytest.mark.parametrize("crossed", [True, False])
def test_its_determinant_is_that_of_its_jacobian(crossed: bool):
    made = bend(order=[1, 3, 0, 2], crossed=crossed)
    for u in torch.randn(5, 4).double():
        jacobian = torch.autograd.functional.jacobian(lambda u: made.push(u)[0], u)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], made.push(u)[1])  # type: ignore[arg-type]


def test_several_maps_at_once():
    both = bend(order=[0, 1, 2, 3]), bend(order=[2, 0, 3, 1])
    stacked = {name: torch.stack([each.tensors[name] for each in both]) for name in both[0].tensors}
    made = Bend(**stacked, crossed=True)
    u = torch.randn(2, 50, 4).double()
    z, log_det = made.push(u)
    back, log_det_back = made.pull(z)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(log_det_back, -log_det)
    for i, each in enumerate(both):
        torch.testing.assert_close(z[i], each.push(u[i])[0])
        torch.testing.assert_close(made.of_fits(i).push(u[i])[0], z[i])
    first = made.better(made.of_fits(torch.tensor([1, 0])), torch.tensor([True, False]))
    torch.testing.assert_close(first.push(u)[0][0], both[1].push(u[0])[0])


def test_entries_come_in_their_order():
    """The first of them follows its own noise alone."""
    made = bend(order=[2, 0, 3, 1])
    u = torch.randn(2, 4).double()
    other = u.clone()
    other[:, 1:] = 0.0
    assert torch.equal(made.push(u)[0][:, 2], made.push(other)[0][:, 2])
    assert not bool((made.push(u)[0][:, 0] == made.push(other)[0][:, 0]).any())


@pytest.mark.parametrize(("d", "crossed", "count"), [(1, True, 3), (10, True, 66), (10, False, 21)])
def test_features(d: int, crossed: bool, count: int):
    i, j = features(d, crossed=crossed)
    assert len(i) == count and bool((i.diff() >= 0).all()) and bool((j <= i).all())
    assert len(torch.stack([i, j]).unique(dim=1).T) == count


def body() -> BentBody:
    with torch.random.fork_rng():
        return BentBody(MixtureBody(4, 3), bend())


def test_draws_have_the_density_that_they_say():
    made = body()
    z, log_q = made.rsample_and_log_prob(500)
    torch.testing.assert_close(made.log_prob(z), log_q)
    assert z.dtype == log_q.dtype == made.dtype == torch.float64


def test_the_density_adds_up_to_one():
    """Against draws of a wide normal: a number that a wrong determinant does not give."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = BentBody(MixtureBody(2, 2), bend(2))
        centre, scale = made.rsample_and_log_prob(4000)[0].detach(), 3.0
        wide = torch.distributions.Normal(centre.mean(0), scale * centre.std(0))
        z = wide.sample(torch.Size([100_000]))
        ratio = (made.log_prob(z) - wide.log_prob(z).sum(-1)).exp()
    assert float(ratio.detach().mean()) == pytest.approx(1.0, abs=0.03)


def test_the_score_is_the_slope_of_the_density():
    made = body()
    z = made.rsample_and_log_prob(20)[0].detach()

    def total(z: Tensor) -> Tensor:
        return made.log_prob(z).sum()

    torch.testing.assert_close(made.score_at_draws(z), torch.autograd.functional.jacobian(total, z))


def test_another_dimension():
    with pytest.raises(ValueError, match="`bend`: expected a map of 3 entries; got 4"):
        BentBody(MixtureBody(3), bend())
