"""Newton's ascents: where quasi-Newton ones come to rest on their way, these arrive."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import HalfCauchy, Normal

from ascent_cases import stretched, target_of
from visbi import BoxUniform, MultipleIndependent, VIPosterior
from visbi.fitting.budget import Budget, BudgetReached
from visbi.fitting.newton import newton
from visbi.fitting.summits import Summits
from visbi.fitting.target import ManyTargets, Target, is_usable
from visbi.priors import coordinates

YEAR = torch.arange(1952.0, 2014.0).double()


def from_(target: Target, z: Tensor) -> Summits:
    """Ascents that nobody has begun."""
    eye = torch.eye(z.shape[-1]).to(z)
    none = torch.zeros(z.shape[:2], dtype=torch.bool)
    return Summits(z, target.value(z), eye.expand(*z.shape, z.shape[-1]), none)


@pytest.mark.parametrize("dim", [1, 2, 10, 40])
def test_the_top_of_a_gaussian_and_its_covariance(dim: int) -> None:
    mean, cov = stretched(dim)
    precision = torch.linalg.inv(cov)
    target = target_of(lambda z: -0.5 * ((z - mean) @ precision * (z - mean)).sum(-1), dim)
    found = newton(target, from_(target, torch.randn(1, 3, dim).double()))
    assert float(found.ell.abs().max()) < 1e-6
    off = torch.linalg.eigvals(torch.linalg.solve(cov, found.cov[0])).real.log().abs()
    assert float(off.max()) < 1e-3


def test_off_a_saddle_and_up() -> None:
    """Half way between two tops all slopes are zero but for a trace."""

    def log_p(z: Tensor) -> Tensor:
        return torch.logaddexp(*(-50 * (z - side).square().sum(-1) for side in (0.7, -0.7)))

    target = target_of(log_p, 3)
    found = newton(target, from_(target, torch.tensor([[[1e-6, 0.0, 0.0], [-1e-6, 0.0, 0.0]]]).double()))
    torch.testing.assert_close(found.z[0], 0.7 * torch.tensor([[1.0], [-1.0]]).double().expand(2, 3))
    torch.testing.assert_close(
        found.cov, 0.01 * torch.eye(3).double().expand(1, 2, 3, 3), rtol=1e-3, atol=1e-7
    )


def test_posteriors_side_by_side_each_until_it_is_there() -> None:
    prior = coordinates(MultipleIndependent([Normal(torch.zeros(2).double(), torch.ones(2).double())]))
    centres = torch.tensor([[0.5, 0.0], [0.0, -1.0]], dtype=torch.float64)

    def log_p(theta: Tensor, which: Tensor) -> Tensor:
        return -50 * (theta - centres[which][:, None]).square().sum(-1)

    target = ManyTargets(log_p, prior, 2)
    z = torch.cat([centres[:, None], torch.zeros(2, 1, 2)], 1)
    found = newton(target, from_(target, z))
    torch.testing.assert_close(found.z, centres[:, None].expand(2, 2, 2))
    # to begin with; two steps of both ascents, of two columns and two lengths; one more of the one that rose
    assert target.tally.gradients.tolist() == [2 + 2 * 2 * 4 + 4] * 2


def test_where_a_curvature_is_none_scales_stay_within_the_prior_s() -> None:
    target = target_of(lambda z: z[..., 0], 2)
    found = newton(target, from_(target, torch.zeros(1, 1, 2).double()), steps=5)
    assert bool((found.cov.diagonal(dim1=-2, dim2=-1) <= 9.0 + 1e-9).all()) and bool(found.z.isfinite().all())


def test_starts_of_no_use_stay() -> None:
    def log_p(z: Tensor) -> Tensor:
        return torch.where(z[..., 0] > 0, -z.square().sum(-1), -torch.inf)

    target = target_of(log_p, 2)
    z = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]]).double()
    found = newton(target, from_(target, z))
    assert is_usable(found.ell).tolist() == [[True, False]] and torch.equal(found.z[:, 1], z[:, 1])
    assert bool(found.cov.isfinite().all())


def test_a_budget_ends_it() -> None:
    target = target_of(lambda z: -z.square().sum(-1), 3, Budget(100))
    with pytest.raises(BudgetReached):
        newton(target, from_(target, torch.ones(1, 8, 3).double()))


@pytest.mark.parametrize("box", [True, False])
def test_a_regression_on_raw_years(box: bool) -> None:
    """Slope and intercept are all but one, and slopes of the prior say nothing of where the noise is small.

    Ascents came to rest hundreds of nats below the posterior, and so did particles; `suspect`.
    """
    torch.manual_seed(1)
    y = 9.3 + 0.02 * (YEAR - 1982) + 1.1 * torch.randn(62).double()
    one = torch.ones(1)
    wide = (
        [BoxUniform(torch.tensor([-1e4, -1e3, 0.0]), torch.tensor([1e4, 1e3, 1e3]))]
        if box
        else [Normal(torch.zeros(2), torch.tensor([1e4, 1e2])), HalfCauchy(25 * one)]
    )
    prior = MultipleIndependent(wide)

    def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
        intercept, slope, sd = theta.double().unbind(-1)
        off = (y - intercept[:, None] - slope[:, None] * YEAR).square().sum(-1)
        return prior.log_prob(theta) - 62 * sd.log() - 0.5 * off / sd.square()

    posterior = VIPosterior(log_p, prior, q="auto").train(torch.zeros(1, 1), seed=0, show_progress_bar=False)
    assert posterior.report.status in ("ok", "corrected")
    design = torch.stack([torch.ones_like(YEAR), YEAR], 1)
    least_squares = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    rest = (y - design @ least_squares).square().sum()
    # flat in both and in the noise's sd, whose square is then an inverse gamma of (62 - 3) / 2
    spread = (rest / 57 * torch.linalg.inv(design.T @ design).diagonal()).sqrt()
    draws = posterior.sample((4000,)).double()
    assert bool(((draws[:, :2].mean(0) - least_squares) / spread).abs().max() < 0.1)
    assert bool((draws[:, :2].std(0) / spread).log().abs().max() < 0.08)
    assert math.isclose(float(draws[:, 2].square().mean()), float(rest / 57), rel_tol=0.03)
