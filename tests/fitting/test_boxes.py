"""Modes hidden in a box: found in theta, where Gaussians stay Gaussian up to the sides."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal, Uniform

from visbi.families.gaussians import Mixture
from visbi.fitting.boxes import in_boxes
from visbi.fitting.budget import BudgetReached
from visbi.fitting.hidden import of_slopes, with_hidden
from visbi.fitting.ladder import climb
from visbi.fitting.target import FlatTarget, Target
from visbi.priors import BoxUniform, MultipleIndependent, coordinates

D = 6
ONES = torch.ones(D, dtype=torch.float64)


def box(dim: int = D) -> BoxUniform:
    return BoxUniform(torch.zeros(dim).double(), torch.ones(dim).double())


def modes(loc: Tensor, sds: list[float], weights: list[float]) -> Callable[[Tensor], Tensor]:
    """Truncated Gaussians in a unit box, each of so much mass; loc (K, D) may lie outside."""
    sd = torch.tensor(sds).double()[:, None]
    inside = torch.special.ndtr((1 - loc) / sd) - torch.special.ndtr(-loc / sd)
    scale = torch.tensor(weights).double().log() - (sd * inside).log().sum(1)

    def log_p(theta: Tensor) -> Tensor:
        each = -0.5 * ((theta[:, None] - loc) / sd).square().sum(-1) - loc.shape[1] / 2 * math.log(
            2 * math.pi
        )
        return torch.logsumexp(each + scale, 1)

    return log_p


def flat_of(target: Target) -> FlatTarget:
    flat = FlatTarget.of(target)
    assert flat is not None
    return flat


MIXED = MultipleIndependent(
    [
        Independent(Normal(torch.zeros(1).double(), 2.0), 1),
        Uniform(torch.tensor([-3.0]).double(), torch.tensor([5.0]).double()),
        Independent(LogNormal(torch.zeros(1).double(), 1.0), 1),
    ],
    validate_args=False,
)


def test_only_what_is_uniform_is_flat():
    target = Target(lambda theta: theta.sum(-1), coordinates(MIXED))
    flat, z = flat_of(target), torch.randn(1, 50, 3).double()
    y = flat.from_z(z)
    torch.testing.assert_close(y[..., [0, 2]], z[..., [0, 2]])
    theta = coordinates(MIXED).to_theta(z)[0]
    torch.testing.assert_close(y[..., 1], (theta[..., 1] - 1.0) / (8 / 12**0.5))
    torch.testing.assert_close(flat.to_z(y), z)
    torch.testing.assert_close(flat.value(y), flat.value_from_z(z, target.value(z)))
    normal = Independent(Normal(torch.zeros(3).double(), 1.0), 1)
    assert FlatTarget.of(Target(normal.log_prob, coordinates(normal))) is None


def test_over_theta_it_is_the_potential():
    log_p = modes(torch.full((1, D), 0.3).double(), [0.2], [1.0])
    target = Target(log_p, coordinates(box()))
    flat, theta = flat_of(target), torch.rand(1, 40, D).double()
    y = (theta - 0.5) * 12**0.5
    value, gradient = flat.value_and_gradient(y)
    constant = -D * math.log(12**0.5)
    torch.testing.assert_close(value[0], log_p(theta[0]) + constant)
    torch.testing.assert_close(gradient, (0.3 - theta) / 0.04 / 12**0.5)
    assert target.n_gradients == 40 and flat.budget is target.budget


def test_outside_it_is_nothing_and_that_is_not_counted():
    target = Target(lambda theta: theta.sum(-1), coordinates(box(1)))
    value, gradient = flat_of(target).value_and_gradient(torch.tensor([[[0.0], [1.8], [-1e9]]]).double())
    assert value[0, 1:].tolist() == [-1e30, -1e30] and float(value[0, 0]) > -10
    assert gradient[0, 1:].tolist() == [[0.0], [0.0]]
    assert target.n_nonfinite == 0


def test_covariances_are_stretched_as_the_map_is():
    flat = flat_of(Target(lambda theta: theta.sum(-1), coordinates(MIXED)))
    z, cov = torch.randn(4, 3).double(), torch.eye(3).double() + 0.5
    small = 1e-4 * torch.randn(4, 20_000, 3).double() @ torch.linalg.cholesky(cov).mT
    moved = (flat.from_z(z[:, None] + small) - flat.from_z(z)[:, None]) * 1e4
    stretched = flat.cov_from_z(z, cov.expand(4, 3, 3))
    torch.testing.assert_close(moved.mT @ moved / 20_000, stretched, rtol=0.05, atol=0.02)
    torch.testing.assert_close(flat.cov_to_z(flat.from_z(z), stretched), cov.expand(4, 3, 3))


def test_half_a_gaussian_has_the_slopes_of_the_whole():
    """Its middle is outside the box, and nothing there says so but the slopes inside."""
    loc = torch.full((1, D), 0.5).double()
    loc[0, 0] = 1.05
    flat = flat_of(Target(modes(loc, [0.1], [1.0]), coordinates(box())))
    torch.manual_seed(0)
    start = torch.zeros(1, 1, D).double()
    start[..., 0] = 1.2
    top, cov, curved = of_slopes(flat, start, 0.05 * torch.eye(D).double()[None, None])
    assert bool(curved.all())
    torch.testing.assert_close(top[0, 0], (loc[0] - 0.5) * 12**0.5, atol=1e-6, rtol=0)
    torch.testing.assert_close(cov[0, 0], 0.12 * torch.eye(D).double(), atol=1e-6, rtol=0)


def near(flat: FlatTarget, theta: Tensor, sd: float) -> Mixture:
    """A Gaussian about there, in z."""
    y = ((theta - 0.5) * 12**0.5)[None, None]
    cov = flat.cov_to_z(y, 12 * sd**2 * torch.eye(len(theta)).double()[None, None])
    return Mixture.of(torch.zeros(1, 1).double(), flat.to_z(y), cov)


@pytest.mark.parametrize("cut", [False, True])
def test_a_narrow_mode_beside_a_wide_one(cut: bool):
    loc = torch.stack([0.3 * ONES, 0.6 * ONES])
    if cut:
        loc[0, :3], loc[1, 3] = 0.02, 1.01
    target = Target(modes(loc, [0.1, 0.03], [0.5, 0.5]), coordinates(box()))
    wide = near(flat_of(target), loc[0].clamp(0.1, 0.9), 0.1)
    torch.manual_seed(0)
    z = torch.randn(1, 4096, D).double()
    ell = target.value(z)
    assert with_hidden(target, wide, z, ell, by=3.0) is None  # in z nothing fits
    found = in_boxes(target, wide, z, ell, by=3.0)
    assert found is not None and found.loc.shape[1] == 1
    torch.testing.assert_close(
        torch.special.ndtr(found.loc[0, 0]), loc[1].clamp_max(0.985), atol=0.02, rtol=0
    )


def test_nothing_is_found_where_nothing_is_left():
    target = Target(modes(0.4 * ONES[None], [0.1], [1.0]), coordinates(box()))
    torch.manual_seed(0)
    z = torch.randn(1, 4096, D).double()
    assert in_boxes(target, near(flat_of(target), 0.4 * ONES, 0.1), z, target.value(z), by=3.0) is None
    normal = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
    free = Target(normal.log_prob, coordinates(normal))
    assert in_boxes(free, near(flat_of(target), 0.4 * ONES, 0.1), z, free.value(z), by=3.0) is None


def test_no_precision_no_gaussian():
    """A slope that grows outwards belongs to none."""
    target = Target(lambda theta: 50 * (theta - 0.5).square().sum(-1), coordinates(box()))
    torch.manual_seed(0)
    z = torch.randn(1, 512, D).double()
    assert in_boxes(target, near(flat_of(target), 0.5 * ONES, 0.1), z, target.value(z), by=3.0) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_an_automatic_fit_has_both(seed: int):
    """In eight dimensions no particle and no draw of the prior meets the narrow one."""
    torch.manual_seed(seed)
    loc = 0.25 + 0.5 * torch.rand(2, 8).double()
    answer = climb(Target(modes(loc, [0.08, 0.03], [0.5, 0.5]), coordinates(box(8))))
    assert answer.report.status in ("ok", "corrected")
    assert answer.report.log_evidence == pytest.approx(0.0, abs=0.05)


def test_a_budget_that_ends_while_modes_are_looked_for_keeps_the_mixture(monkeypatch: pytest.MonkeyPatch):
    """A Gaussian had one of two modes; what has both is kept, though its weights are worse."""

    def used_up(*_: object, **__: object) -> Tensor:
        raise BudgetReached("max_seconds")

    monkeypatch.setattr("visbi.fitting.mixing.missing_at_tops", used_up)
    torch.manual_seed(0)
    loc = torch.stack([0.3 * ONES, 0.7 * ONES])
    report = climb(Target(modes(loc, [0.05, 0.05], [0.5, 0.5]), coordinates(box()))).report
    assert report.status == "suspect" and "max_seconds" in report.sentence
    assert report.log_evidence == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_ten_narrow_modes_that_sides_cut(seed: int):
    """A thousand particles lose some of them; one in six of the mass was, and the answer was `corrected`."""
    generator = torch.Generator().manual_seed(3)
    loc = 0.2 + 0.6 * torch.rand(10, 10, generator=generator).double()
    loc[torch.arange(10), torch.arange(10)] = torch.tensor([-0.02, 1.03] * 5).double()
    sds = (0.03 + 0.02 * torch.rand(10, generator=generator)).tolist()
    torch.manual_seed(seed)
    answer = climb(Target(modes(loc, sds, [0.1] * 10), coordinates(box(10))))
    assert answer.report.status in ("ok", "corrected")
    assert answer.report.log_evidence == pytest.approx(0.0, abs=0.05)
