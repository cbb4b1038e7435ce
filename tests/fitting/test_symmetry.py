"""Labels that can be exchanged and signs that can be turned: what is found, and what follows from it."""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Distribution,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
)

from ascent_cases import target_of
from visbi import BoxUniform, MultipleIndependent, VIPosterior
from visbi.families.gaussians import Mixture
from visbi.fitting.budget import Budget
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.pool import Pool
from visbi.fitting.symmetry import Map, completed, symmetries
from visbi.fitting.target import Target
from visbi.fitting.witnesses import mirrored
from visbi.priors import coordinates

QUIET = {"show_progress_bar": False}
LABELS = BoxUniform(torch.tensor([-9.0, -9.0, -9.0, 0.0]), torch.tensor([9.0, 9.0, 9.0, 5.0]))
Y = torch.cat([centre + 0.3 * torch.linspace(-1.6, 1.6, 20).double() for centre in (-4.0, 1.0, 6.0)])


def three_groups(theta: Tensor) -> Tensor:
    """log p(y | three means, one sd), equal shares: nothing says which mean is which."""
    means, sd = theta[:, :3].double(), theta[:, 3:].double()
    each = -0.5 * ((Y[None, :, None] - means[:, None]) / sd[..., None]).square() - sd.log()[..., None]
    return torch.logsumexp(each, -1).sum(-1)


def seen(target: Target) -> list[tuple[list[int], list[float]]]:
    torch.manual_seed(0)
    found = symmetries(target, torch.randn(1, 4, target.dim).double())
    return [(each.index.tolist(), each.sign.tolist()) for each in found]


def test_labels_of_three_by_two_exchanges() -> None:
    one = [1.0] * 4
    assert seen(Target(three_groups, coordinates(LABELS))) == [([1, 0, 2, 3], one), ([2, 1, 0, 3], one)]


def test_single_precision_does_not_hide_them() -> None:
    rounded = Target(lambda theta: three_groups(theta).float(), coordinates(LABELS))
    assert len(seen(rounded)) == 2


def test_signs() -> None:
    target = target_of(lambda z: -z[:, 0].abs() - (z[:, 1] * z[:, 2] - 1).square() - z[:, 1].square(), 3)
    assert seen(target) == [([0, 1, 2], [-1.0, 1.0, 1.0]), ([0, 1, 2], [1.0, -1.0, -1.0])]


def test_means_scales_and_the_share_at_once() -> None:
    """Of a mixture of two: exchanged means and scales leave it as it is only with share -> 1 - share."""
    box = BoxUniform(torch.tensor([-9.0, -9.0, 0.0, 0.0, 0.0]), torch.tensor([9.0, 9.0, 5.0, 5.0, 1.0]))

    def log_p(theta: Tensor) -> Tensor:
        one, other, wide, narrow, share = theta.double()[..., None].unbind(-2)
        parts = [
            share.log() - wide.log() - 0.5 * ((Y - one) / wide).square(),
            (1 - share).log() - narrow.log() - 0.5 * ((Y - other) / narrow).square(),
        ]
        return torch.logaddexp(*parts).sum(-1)

    assert seen(Target(log_p, coordinates(box))) == [([1, 0, 3, 2, 4], [1.0, 1.0, 1.0, 1.0, -1.0])]


def test_none() -> None:
    assert seen(target_of(lambda z: -(z * torch.tensor([1.0, 2.0, 3.0]) - 1).square().sum(-1), 3)) == []


def test_entries_whose_priors_differ_are_not_exchanged() -> None:
    prior = MultipleIndependent([Normal(torch.zeros(2), 1.0), Normal(torch.ones(1), 1.0)])
    target = Target(lambda theta: -(theta - 0.5).pow(4).sum(-1), coordinates(prior))
    assert target.alike() == [(0, 1)]


def test_images_of_components() -> None:
    """All orders of three unlike means, each with its own covariance."""
    loc = torch.tensor([[[1.0, 2.0, 3.0]]]).double()
    cov = torch.tensor([[0.04, 0.01, 0.0], [0.01, 0.02, 0.0], [0.0, 0.0, 0.01]]).double()
    one = torch.ones(3).double()
    swaps = [Map(torch.tensor(order), one) for order in ([1, 0, 2], [0, 2, 1])]
    q = completed(Mixture.of(torch.zeros(1, 1).double(), loc, cov[None, None]), swaps)
    assert sorted(map(tuple, q.loc[0].tolist())) == sorted(permutations((1.0, 2.0, 3.0)))
    torch.testing.assert_close(q.log_weights, torch.full((1, 6), -math.log(6)).double())
    for where, spread in zip(q.loc[0], q.cov[0], strict=True):
        order = (where - 1).long()
        torch.testing.assert_close(spread, cov[order][:, order])
    assert completed(q, swaps).loc.shape[1] == 6


def test_there_is_an_end_to_components() -> None:
    """2^12 orthants, of which 213 are kept; a first component that is like its own images is one."""
    eye, one = torch.eye(12).double(), torch.ones(12).double()
    flips = [Map(torch.arange(12), one - 2 * eye[i]) for i in range(12)]

    def at(where: float) -> Mixture:
        return Mixture.of(torch.zeros(1, 1).double(), where * one[None, None], 0.01 * eye[None, None])

    assert completed(at(1.0), flips).loc.shape[1] == 2560 // 12
    assert completed(at(0.0), flips).loc.shape[1] == 1


def group(log_p: Callable[[Tensor], Tensor], budget: Budget | None = None) -> Group:
    target = target_of(log_p, 2, budget)
    return Group(target, [Record()], ALONE, Pool(target))


def modes(*weights: float) -> Mixture:
    loc = torch.tensor([[[1.0, 0.5], [-1.0, 0.5]]]).double()[:, : len(weights)]
    cov = (0.01 * torch.eye(2).double()).expand(1, len(weights), 2, 2)
    return Mixture.of(torch.tensor([weights]).double().log(), loc, cov)


def both(*weights: float) -> Callable[[Tensor], Tensor]:
    return lambda z: 3.0 + modes(*weights).log_prob(z[None])[0]


def test_what_a_q_lacks_in_its_own_image() -> None:
    """As much as it has, where it has one of two equal modes; and it is completed."""
    now = group(both(0.5, 0.5))
    lacks = mirrored(now, modes(1.0), torch.tensor([3.0 - math.log(2)]).double())
    assert float(lacks) == pytest.approx(1.0, abs=0.05)
    assert now.elsewhere is not None
    assert sorted(now.elsewhere.loc[0, :, 0].tolist()) == [-1.0, 1.0]
    assert float(mirrored(now, now.elsewhere, torch.tensor([3.0]).double())) == 0.0


def test_a_map_need_not_be_a_symmetry() -> None:
    """The image weighs what it weighs: .3 against .7, or nothing."""
    turn = [Map(torch.arange(2), torch.tensor([-1.0, 1.0]).double())]
    now = group(both(0.7, 0.3))
    now.maps = turn
    lacks = mirrored(now, modes(1.0), torch.tensor([3.0 + math.log(0.7)]).double())
    assert float(lacks) == pytest.approx(3 / 7, abs=0.03)
    alone = group(both(1.0))
    alone.maps = turn
    assert float(mirrored(alone, modes(1.0), torch.tensor([3.0]).double())) == 0.0
    assert alone.elsewhere is None


def test_a_small_budget_is_not_spent_on_them() -> None:
    now = group(both(0.5, 0.5), Budget(10_000, None))
    assert float(mirrored(now, modes(1.0), torch.tensor([3.0]).double())) == 0.0
    assert now.target.n_values == 0 and now.maps is None


@pytest.mark.parametrize("wide", [9.0, 90.0])
def test_six_orders_of_three_labels(wide: float) -> None:
    """Particles and ascents meet some of them; three that were left out were nobody's loss, "corrected"."""

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return three_groups(theta).to(theta)

    prior = BoxUniform(torch.tensor([-wide, -wide, -wide, 0.0]), torch.full((4,), wide))
    report = VIPosterior(potential, prior, q="auto").train(torch.zeros(1, 1), seed=1, **QUIET).report
    assert report.status in ("ok", "corrected") and len(report.modes) == 6
    assert [mode.weight for mode in report.modes] == pytest.approx([1 / 6] * 6, abs=0.02)


@pytest.mark.parametrize("dim", [6, 8])
def test_all_signs(dim: int) -> None:
    """64 and 256 modes."""

    def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
        each = [-0.5 * ((theta.double() - side) / 0.3).square() for side in (1.5, -1.5)]
        return (torch.logaddexp(*each) - math.log(0.6 * math.sqrt(2 * math.pi))).sum(-1)

    prior = Independent(Normal(torch.zeros(dim), 3.0), 1)
    posterior = VIPosterior(log_p, prior, q="auto").train(torch.zeros(1, 1), seed=0, **QUIET)
    assert abs(posterior.report.log_evidence) < 0.02 and posterior.report.status in ("ok", "corrected")
    orthant = (posterior.sample((20_000,)) > 0).double() @ 2.0 ** torch.arange(dim).double()
    assert len(orthant.unique()) == 2**dim


def positive(kind: Callable[..., Distribution], *numbers: float) -> Distribution:
    return kind(*(torch.tensor([number]) for number in numbers))


def test_which_scales_are_open() -> None:
    prior = MultipleIndependent(
        [
            positive(Uniform, 0.0, 1e5),
            positive(HalfNormal, 1e3),
            positive(HalfCauchy, 1.0),
            positive(Uniform, -1.0, 1.0),
            positive(Uniform, 1.0, 2.0),
            positive(Normal, 0.0, 1.0),
            positive(LogNormal, 0.0, 1.0),
            positive(Gamma, 2.0, 1.0),
            positive(Beta, 2.0, 2.0),
        ]
    )
    target = Target(lambda theta: theta.sum(-1), coordinates(prior))
    assert target.scales() == [True, True, True] + [False] * 6
    joint = coordinates(MultivariateNormal(torch.zeros(2), torch.eye(2)))
    assert Target(lambda theta: theta.sum(-1), joint).scales() == [False, False]


@pytest.mark.parametrize("seed", [2, 3])
def test_a_curve_that_saturates_under_flat_priors(seed: int) -> None:
    """Where height and rate are both huge it is a line, which is most of the prior; it was "corrected"."""
    x = torch.linspace(1.0, 60.0, 30).double()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        y = 500 * (1 - (-x / 15).exp()) + 20 * torch.randn(30).double()
    prior = BoxUniform(torch.zeros(3), torch.tensor([1e5, 1e5, 1e4]))

    def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
        height, rate, sd = theta.double()[..., None].unbind(-2)
        away = (y + height * torch.expm1(-x / rate)) / sd
        return (-0.5 * away.square() - sd.log()).sum(-1)

    posterior = VIPosterior(log_p, prior, q="auto").train(torch.zeros(1, 1), seed=seed, **QUIET)
    assert posterior.report.status in ("ok", "corrected")
    height, rate, sd = posterior.sample((2000,)).double().median(0).values.tolist()
    assert height == pytest.approx(500, rel=0.1) and rate == pytest.approx(15, rel=0.2) and 12 < sd < 30
