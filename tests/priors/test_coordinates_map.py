"""The map between theta and z: there and back, its Jacobian, its ends, for every prior and every scale."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Independent, LogNormal

from prior_cases import PRIORS, Z_SCORES
from visbi.core.devices import map_tensors
from visbi.priors import BoxUniform, coordinates

EVERY_PRIOR = pytest.mark.parametrize("case", PRIORS.values(), ids=PRIORS)
EVERY_SCALE = pytest.mark.parametrize("z_score", Z_SCORES)
EXACT = [
    pytest.param(case.prior, z_score, id=f"{name}-{z_score}")
    for name, case in PRIORS.items()
    for z_score in case.exact
]


@EVERY_PRIOR
@EVERY_SCALE
def test_theta_comes_back(case, z_score):
    coords = coordinates(case.prior, z_score=z_score)
    theta = case.prior.sample((100_000,))
    z, ladj = coords.to_z(theta)
    again, ladj_again = coords.to_theta(z)
    assert z.shape == (100_000, coords.dim_z)
    assert again.dtype == theta.dtype
    for values in (z, ladj, again, ladj_again):
        assert values.isfinite().all()
    eps = torch.finfo(theta.dtype).eps
    # entries that the prior draws on the bound itself come back just inside
    error = (again - theta).abs() / (theta.abs() + 1e-30)
    assert error.max() < (2 * eps if theta.dtype is torch.float32 else 1e-6)
    torch.testing.assert_close(ladj_again, ladj, rtol=1e-6, atol=1e-6)


@EVERY_PRIOR
@EVERY_SCALE
def test_z_comes_back(case, z_score):
    coords = coordinates(in_double(case.prior), z_score=z_score)
    assert coords.dtype is torch.float64
    z = torch.randn(2000, coords.dim_z, dtype=torch.float64).clamp(-3, 3)
    theta, ladj = coords.to_theta(z)
    again, ladj_again = coords.to_z(theta)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(ladj_again, ladj, rtol=0, atol=1e-5)


def in_double(prior):
    return map_tensors(prior, lambda t: t.double() if t.is_floating_point() else t)


@EVERY_PRIOR
@EVERY_SCALE
def test_log_jacobian_is_that_of_autograd(case, z_score):
    coords = coordinates(in_double(case.prior), z_score=z_score)
    z = torch.randn(8, coords.dim_z, dtype=torch.float64).clamp(-2, 2)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda y: coords.to_theta(y)[0], y) for y in z]
    )
    free = free_entries(coords)  # on a simplex the last entry follows from the others
    expected = torch.linalg.slogdet(jacobian[:, free])[1]
    torch.testing.assert_close(coords.to_theta(z)[1], expected, rtol=1e-6, atol=1e-6)


def free_entries(coords) -> list[int]:
    free, start = [], 0
    for dim_theta, dim_z in zip(coords.dims_theta, coords.dims_z, strict=True):
        free += range(start, start + dim_z)
        start += dim_theta
    return free


@pytest.mark.parametrize(("prior", "z_score"), EXACT)
def test_z_is_standard_normal_under_the_prior(prior, z_score):
    coords = coordinates(prior, z_score=z_score)
    z = coords.to_z(prior.sample((4000,)))[0]
    worst = min(stats.kstest(column.numpy(), "norm").pvalue for column in z.mT)
    assert worst > 1e-4
    assert (torch.corrcoef(z.mT) - torch.eye(coords.dim_z)).abs().max() < 0.08


@EVERY_PRIOR
def test_z_has_the_scale_of_a_standard_normal_without_a_closed_form_too(case):
    coords = coordinates(case.prior)
    z = coords.to_z(case.prior.sample((4000,)))[0]
    q16, q50, q84 = torch.quantile(z, torch.tensor([0.16, 0.5, 0.84], dtype=z.dtype), dim=0)
    assert q50.abs().max() < 0.15
    assert ((q84 - q16) / 2 - 1).abs().max() < 0.15


@EVERY_PRIOR
def test_structured_takes_correlations_out(case):
    coords = coordinates(case.prior, z_score="structured")
    z = coords.to_z(case.prior.sample((4000,)))[0]
    correlation = torch.corrcoef(z.clamp(-4, 4).mT).reshape(coords.dim_z, coords.dim_z)
    assert (correlation - torch.eye(coords.dim_z)).abs().max() < 0.1


@EVERY_PRIOR
@EVERY_SCALE
@pytest.mark.parametrize("end", [-40.0, 40.0])
def test_far_out_z_stays_strictly_inside(case, z_score, end):
    coords = coordinates(case.prior, z_score=z_score)
    z = torch.full((1, coords.dim_z), end, dtype=torch.float64, requires_grad=True)
    theta, ladj = coords.to_theta(z)
    assert theta.isfinite().all()
    assert ladj.isfinite().all()
    assert coords.contains(theta).all()
    assert case.prior.support.check(theta).all()
    assert ((coords.low <= theta) & (theta <= coords.high)).all()
    (gradient,) = torch.autograd.grad(theta.sum() + ladj.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["box", "beta", "dirichlet", "truncated normal", "pareto", "gamma"])
@pytest.mark.parametrize("end", [-40.0, 40.0])
def test_the_prior_density_is_finite_there_although_it_is_not_on_the_bound(name, end):
    prior = PRIORS[name].prior
    coords = coordinates(prior)
    theta = coords.to_theta(torch.full((1, coords.dim_z), end))[0]
    assert prior.log_prob(theta).isfinite().all()


def test_a_log_normal_so_wide_that_it_overflows():
    prior = Independent(LogNormal(torch.zeros(2).double(), 30.0), 1)
    coords = coordinates(prior)
    z = torch.tensor([[40.0, 1.0]], dtype=torch.float64, requires_grad=True)  # exp(1200)
    theta, ladj = coords.to_theta(z)
    assert theta.isfinite().all()
    (gradient,) = torch.autograd.grad(theta.log().sum() + ladj.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("z_score", ["independent", "structured"])
def test_a_multivariate_normal_keeps_its_correlations_unless_they_are_asked_out(z_score):
    prior = PRIORS["multivariate normal"].prior
    z = coordinates(prior, z_score=z_score).to_z(prior.sample((20_000,)))[0]
    torch.testing.assert_close(z.std(0), torch.ones(3).double(), rtol=0, atol=0.03)
    scale = prior.variance.sqrt()
    own = prior.covariance_matrix / (scale[:, None] * scale)
    expected = own if z_score == "independent" else torch.eye(3)
    torch.testing.assert_close(torch.corrcoef(z.mT), expected.double(), rtol=0, atol=0.03)


@EVERY_PRIOR
@EVERY_SCALE
def test_the_very_bounds_and_beyond_give_numbers(case, z_score):
    coords = coordinates(case.prior, z_score=z_score)
    for corner in (
        coords.low,
        coords.high,
        torch.full_like(coords.low, -math.inf),
        torch.zeros_like(coords.low),
    ):
        z, ladj = coords.to_z(corner[None])
        assert z.isfinite().all()
        assert ladj > -math.inf  # +inf is log q = -inf, where a density underflows
        assert coords.contains(coords.to_theta(z)[0]).all()


def test_the_corners_of_a_box_and_a_simplex_give_numbers():
    box = coordinates(PRIORS["box"].prior)
    simplex = coordinates(PRIORS["dirichlet"].prior)
    for coords, corners in ((box, torch.stack([box.low, box.high])), (simplex, torch.eye(3))):
        z, ladj = coords.to_z(corners)
        assert z.isfinite().all()
        assert ladj.isfinite().all()
        torch.testing.assert_close(coords.to_theta(z)[0], corners, rtol=0, atol=1e-6)


@EVERY_PRIOR
def test_contains_agrees_with_the_support(case):
    coords = coordinates(case.prior)
    theta = case.prior.sample((100,))
    assert coords.contains(theta).all()
    broken = theta[:3].clone()
    broken[0, 0], broken[1, -1], broken[2, 0] = math.nan, math.inf, -math.inf
    assert not coords.contains(broken).any()


def test_contains_knows_what_is_outside():
    coords = coordinates(PRIORS["mixed with a simplex"].prior)
    theta = torch.tensor([[1.0, 1, 0.2, 0.3, 0.5, 0], [-1, 1, 0.2, 0.3, 0.5, 0], [1, 1, 0.2, 0.3, 0.6, 0]])
    assert coords.contains(theta).tolist() == [True, False, False]


@EVERY_PRIOR
def test_any_leading_shape(case):
    coords = coordinates(case.prior)
    theta = case.prior.sample((2, 3))
    z, ladj = coords.to_z(theta)
    assert z.shape == (2, 3, coords.dim_z)
    assert ladj.shape == (2, 3)
    torch.testing.assert_close(coords.to_z(theta[1, 2])[0], z[1, 2])
    assert coords.to_theta(z[0, 0])[0].shape == (coords.dim_theta,)


def test_pushing_z_forward_gives_the_prior_density():
    # log p(theta) = log N(z) - log|dtheta/dz| wherever the coordinates are exact
    for name in ("half-cauchy", "box", "log-normal", "truncated normal", "multivariate normal"):
        prior = in_double(PRIORS[name].prior)
        coords = coordinates(prior, z_score="structured")
        z = torch.randn(50, coords.dim_z, dtype=torch.float64)
        theta, ladj = coords.to_theta(z)
        log_z = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        torch.testing.assert_close(log_z - ladj, prior.log_prob(theta), rtol=1e-6, atol=1e-6)


def test_construction_leaves_the_global_generator_alone_and_is_repeatable():
    before = torch.get_rng_state()
    first = coordinates(PRIORS["beta"].prior)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = coordinates(PRIORS["beta"].prior)
    assert torch.equal(first.blocks[0].loc, second.blocks[0].loc)


def test_theta_of_another_length():
    coords = coordinates(PRIORS["box"].prior)
    for theta in (torch.zeros(4, 1), torch.zeros(4, 2), torch.zeros(())):
        with pytest.raises(ValueError, match=r"^`theta`: expected shape \(\.\.\., 3\); got "):
            coords.to_z(theta)


def test_a_box_s_lower_corner_is_as_near_as_numbers_are():
    """Phi(-20) is 3e-89: a density with a pole at the corner has mass there, and theta must follow z."""
    coords = coordinates(BoxUniform(torch.zeros(1).double(), torch.ones(1).double()))
    z = torch.linspace(-37, 5, 500).double()[:, None]
    theta, _ = coords.to_theta(z)
    torch.testing.assert_close(theta[:, 0].log(), torch.special.log_ndtr(z[:, 0]), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(coords.to_z(theta)[0], z, rtol=1e-7, atol=0)
