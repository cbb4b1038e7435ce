"""The maximum a posteriori, in the interior and on the bounds."""

import math

import pytest
import torch
from torch.distributions import Gamma, Independent, Normal

from family_cases import mixed_prior, simplex_prior
from visbi.fitting.maximum import ascend
from visbi.priors import BoxUniform, coordinates


def box(dim=3, dtype=torch.float64):
    return BoxUniform(-torch.ones(dim, dtype=dtype), torch.arange(1.0, dim + 1, dtype=dtype))


def climbed(prior, log_p, n=200, **options):
    torch.manual_seed(0)
    coords = coordinates(prior)
    return ascend(log_p, coords, prior.sample((n,)), **options)


def hill(peak, width=0.3):
    def log_p(theta):
        return -0.5 * ((theta - torch.as_tensor(peak, dtype=theta.dtype)) / width).square().sum(-1)

    return log_p


@pytest.mark.parametrize("peak", [[0.0, 0.5, 1.0], [0.97, -0.98, 2.5]])
def test_interior_of_a_box(peak):
    best, value = climbed(box(), hill(peak))
    assert best.shape == (3,) and not best.requires_grad
    torch.testing.assert_close(best, torch.tensor(peak).double(), atol=1e-3, rtol=0)
    assert value == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("signs", [[1, 1, 1], [-1, -1, -1], [1, -1, 1]])
@pytest.mark.parametrize("steepness", [0.05, 1.0, 100.0])
def test_optimum_in_a_corner(signs, steepness):
    slope = steepness * torch.tensor(signs, dtype=torch.float64)
    prior = box()
    best, value = climbed(prior, lambda theta: (theta * slope).sum(-1))
    corner = torch.where(slope > 0, torch.tensor([1.0, 2.0, 3.0]), torch.tensor(-1.0)).double()
    torch.testing.assert_close(best, corner, atol=1e-3, rtol=0)
    assert bool(prior.support.check(best).all())
    assert value == pytest.approx(float((corner * slope).sum()), abs=3e-3 * steepness)


def test_on_one_bound_and_inside_along_the_other():
    best, _ = climbed(box(2), hill([0.2, 5.0]))
    torch.testing.assert_close(best, torch.tensor([0.2, 2.0]).double(), atol=1e-3, rtol=0)


def test_corner_in_float32():
    prior = box(2, torch.float32)
    best, _ = climbed(prior, lambda theta: theta.sum(-1))
    torch.testing.assert_close(best, torch.tensor([1.0, 2.0]), atol=1e-3, rtol=0)
    assert best.dtype == torch.float32 and bool(prior.support.check(best).all())


def test_mixed_supports():
    prior = mixed_prior()
    best, _ = climbed(prior, hill([2.9, 0.4, 6.0]))
    torch.testing.assert_close(best, torch.tensor([2.9, 0.4, 6.0]).double(), atol=1e-3, rtol=0)
    best, _ = climbed(prior, hill([4.0, -1.0, 6.0]))
    torch.testing.assert_close(best, torch.tensor([3.0, 0.0, 6.0]).double(), atol=1e-3, rtol=0)


def test_on_the_simplex():
    best, _ = climbed(simplex_prior(3), hill([0.2, 0.5, 0.3]))
    torch.testing.assert_close(best, torch.tensor([0.2, 0.5, 0.3]).double(), atol=1e-3, rtol=0)
    best, _ = climbed(simplex_prior(3), lambda theta: theta[:, 1])
    torch.testing.assert_close(best, torch.tensor([0.0, 1.0, 0.0]).double(), atol=1e-3, rtol=0)


def test_the_density_is_that_of_theta_not_of_z():
    # the mode of Gamma(3, 1) is 2; that of its logarithm is log 3
    prior = Independent(Gamma(torch.full((1,), 3.0).double(), torch.ones(1).double()), 1)
    best, _ = climbed(prior, prior.log_prob)
    assert float(best) == pytest.approx(2.0, abs=1e-3)


def test_the_highest_of_several_peaks():
    centres = torch.tensor([[-0.5, -0.5], [0.7, 1.5]], dtype=torch.float64)

    def log_p(theta):
        each = -0.5 * ((theta[:, None] - centres) / 0.1).square().sum(-1)
        return torch.logsumexp(each + torch.tensor([0.0, 1.0]), 1)

    best, value = climbed(box(2), log_p)
    torch.testing.assert_close(best, centres[1], atol=1e-3, rtol=0)
    assert value == pytest.approx(1.0, abs=1e-3)


# starts


def test_starts_are_used_as_given():
    starts = torch.tensor([[0.4, 0.4], [0.5, 0.5]], dtype=torch.float64)
    best, value = ascend(hill([0.5, 0.6]), coordinates(box(2)), starts, num_iter=1, learning_rate=1e-6)
    torch.testing.assert_close(best, starts[1], atol=1e-5, rtol=0)
    assert value == pytest.approx(float(hill([0.5, 0.6])(starts).max()), abs=1e-4)


@pytest.mark.parametrize("start", [[-1.0, 2.0], [1.0, -1.0], [1.0, 2.0]])
def test_a_start_on_a_bound_is_not_stuck(start):
    best, _ = ascend(hill([0.1, 0.6]), coordinates(box(2)), torch.tensor([start]).double())
    torch.testing.assert_close(best, torch.tensor([0.1, 0.6]).double(), atol=2e-3, rtol=0)


def test_a_start_at_zero_of_a_half_line_is_not_stuck():
    prior = Independent(Gamma(torch.ones(1).double(), torch.ones(1).double()), 1)
    best, _ = ascend(hill([1.5]), coordinates(prior), torch.zeros(1, 1).double())
    assert float(best) == pytest.approx(1.5, abs=2e-3)


@pytest.mark.parametrize("z_score", ["none", "independent"])
def test_starts_far_out_on_an_unbounded_prior_stay_there(z_score):
    prior = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    coords = coordinates(prior, z_score=z_score)
    starts = torch.tensor([[39.5, -60.2]], dtype=torch.float64)
    best, _ = ascend(hill([40.0, -60.0]), coords, starts)
    torch.testing.assert_close(best, torch.tensor([40.0, -60.0]).double(), atol=1e-3, rtol=0)


def test_only_the_best_starts_are_followed():
    seen = []

    def log_p(theta):
        seen.append(theta.detach())
        return hill([0.2, 0.3])(theta)

    starts = box(2).sample((50,))
    ascend(log_p, coordinates(box(2)), starts, num_iter=3, num_to_optimize=5)
    assert [len(theta) for theta in seen[:5]] == [50, 5, 5, 5, 5]
    order = hill([0.2, 0.3])(starts).argsort(descending=True)[:5]
    torch.testing.assert_close(seen[1], starts[order])


def test_never_worse_than_the_best_start():
    starts = torch.tensor([[0.2, 0.3]], dtype=torch.float64)
    best, value = ascend(hill([0.2, 0.3], 1e-3), coordinates(box(2)), starts, num_iter=5, learning_rate=1.0)
    torch.testing.assert_close(best, starts[0])
    assert value == 0.0


# what goes wrong


@pytest.mark.parametrize("at", [0, 1, 2, 35, 100])
def test_ctrl_c_keeps_the_best(at):
    values = []

    def log_p(theta):
        if len(values) > at:
            raise KeyboardInterrupt
        result = hill([0.1, 0.2])(theta)
        values.append(float(result.detach().max()))
        return result

    starts = torch.tensor([[-0.9, 1.9], [0.9, -0.9]], dtype=torch.float64)
    best, value = ascend(log_p, coordinates(box(2)), starts, save_best_every=1)
    assert value == pytest.approx(max(values), abs=1e-9)
    assert value == pytest.approx(float(hill([0.1, 0.2])(best[None])), abs=1e-6)


def test_how_often_the_best_is_kept():
    def interrupted_after(calls, every):
        count = 0

        def log_p(theta):
            nonlocal count
            count += 1
            if count > calls:
                raise KeyboardInterrupt
            return hill([0.1, 0.2])(theta)

        starts = torch.tensor([[-0.9, 1.9]], dtype=torch.float64)
        return ascend(log_p, coordinates(box(2)), starts, save_best_every=every)[1]

    assert interrupted_after(60, 1) > interrupted_after(60, 50) == interrupted_after(52, 50)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_without_a_finite_potential(bad):
    def log_p(theta):
        root = torch.where(
            theta[:, 0] > 0, theta[:, 0], 0.0 * theta[:, 0] - 1.0
        ).sqrt()  # NaN, and its gradient
        return torch.where(theta[:, 0] > 0.3, bad, hill([0.2, 0.3])(theta)) + 0.0 * root

    best, value = climbed(box(2), log_p)
    torch.testing.assert_close(best, torch.tensor([0.2, 0.3]).double(), atol=1e-3, rtol=0)
    assert value == pytest.approx(0.0, abs=1e-3)


def test_nowhere_finite():
    starts = box(2).sample((4,))
    best, value = ascend(lambda theta: theta[:, 0] * math.nan, coordinates(box(2)), starts, num_iter=3)
    assert value == -math.inf and bool((best == starts).all(1).any())


@pytest.mark.parametrize("name", ["num_iter", "num_to_optimize", "save_best_every", "learning_rate"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        climbed(box(2), hill([0.0, 0.0]), **{name: value})


def test_progress_bar(monkeypatch):
    shown = []

    class Bar(list):
        def __init__(self, steps, **_):
            super().__init__(steps)
            shown.append(len(steps))

        def close(self):
            shown.append("closed")

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    climbed(box(2), hill([0.0, 0.0]), num_iter=7)
    assert shown == []
    climbed(box(2), hill([0.0, 0.0]), num_iter=7, show_progress_bars=True)
    assert shown == [7, "closed"]
