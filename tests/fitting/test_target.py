"""The target in coordinates."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import FisherSnedecor, Independent, LogNormal, MultivariateNormal

from family_cases import box_prior, mixed_prior, positive_prior, real_prior, simplex_prior
from visbi.fitting import target as module
from visbi.fitting.target import ManyTargets, Target, is_usable, log_standard_normal
from visbi.priors import coordinates


def standard(dim):
    return MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())


def test_log_standard_normal():
    z = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(log_standard_normal(z), standard(5).log_prob(z))


@pytest.mark.parametrize("prior", [box_prior(3), real_prior(3)])
def test_with_the_prior_as_potential_it_is_standard_normal(prior):
    target = Target(prior.log_prob, coordinates(prior, z_score="structured"))
    z = torch.randn(2, 7, 3, dtype=torch.float64)
    value, gradient = target.value_and_gradient(z)
    torch.testing.assert_close(value, log_standard_normal(z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, -z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.value(z), value)


@pytest.mark.parametrize("prior", [positive_prior(2), mixed_prior(), simplex_prior(3)])
def test_value_and_gradient_by_hand(prior):
    coords = coordinates(prior)
    target = Target(lambda theta: (3 * theta).sin().sum(-1), coords)
    z = torch.randn(6, coords.dim_z, dtype=torch.float64)
    value, gradient = target.value_and_gradient(z)
    theta, ladj = coords.to_theta(z)
    torch.testing.assert_close(value, (3 * theta).sin().sum(-1) + ladj)
    for i in range(coords.dim_z):
        step = torch.zeros_like(z)
        step[:, i] = 1e-5
        slope = (target.value(z + step) - target.value(z - step)) / 2e-5
        torch.testing.assert_close(gradient[:, i], slope, rtol=1e-5, atol=1e-5)


def test_counts_shapes_and_pieces(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 4)
    sizes = []

    def log_p(theta):
        sizes.append(len(theta))
        return -theta.square().sum(-1)

    target = Target(log_p, coordinates(standard(2)))
    z = torch.randn(3, 5, 2, dtype=torch.float64)
    value = target.value(z)
    assert sizes == [4, 4, 4, 3] and value.shape == (3, 5)
    torch.testing.assert_close(value, -z.square().sum(-1))
    value, gradient = target.value_and_gradient(z[0])
    assert sizes[4:] == [4, 1] and value.shape == (5,) and gradient.shape == (5, 2)
    torch.testing.assert_close(gradient, -2 * z[0])
    assert (target.n_values, target.n_gradients, target.n_nonfinite) == (15, 5, 0)
    assert target.dim == 2


def broken(theta):
    """NaN, with a gradient that is NaN, in one quadrant, infinity in another."""
    x, y = theta.unbind(-1)
    root = torch.where((x < 0) & (y > 0), x, 0.0 * x + 1.0).sqrt() - 1.0
    return torch.where((x < 0) & (y < 0), torch.inf, root - theta.square().sum(-1))


def test_what_is_not_finite_is_low_flat_and_counted():
    target = Target(broken, coordinates(standard(2)))
    z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [2.0, -1.0]], dtype=torch.float64)
    value, gradient = target.value_and_gradient(z)
    assert value.tolist() == [-2.0, -1e30, -1e30, -5.0] and target.n_nonfinite == 2
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, -2.0], [0, 0], [0, 0], [-4.0, 2.0]]).double())
    assert target.value(z).tolist() == value.tolist() and target.n_nonfinite == 4
    assert target.n_broken == 4  # NaN and +inf


def test_a_density_of_zero_is_not_broken():
    target = Target(lambda theta: torch.where(theta[:, 0] > 0, 0.0, -torch.inf), coordinates(standard(1)))
    assert target.value(torch.tensor([[1.0], [-1.0]]).double()).tolist() == [0.0, -1e30]
    assert (target.n_nonfinite, target.n_broken) == (1, 0)


def test_no_value_is_lower_than_what_is_not_finite():
    target = Target(lambda theta: -1e200 * theta[:, 0].square(), coordinates(standard(1)))
    assert target.value(torch.tensor([[1.0], [0.0]]).double()).tolist() == [-1e30, 0.0]
    assert target.n_nonfinite == 0


def test_what_is_usable():
    ell = torch.tensor([[0.0, -1e28, -1e30], [1e300, -1e5, -1e30]]).double()
    assert is_usable(ell).tolist() == [[True, True, False], [True, True, False]]


def test_plus_infinity_is_not_a_maximum():
    target = Target(lambda theta: torch.where(theta[:, 0] > 0, torch.inf, 0.0), coordinates(standard(1)))
    assert target.value(torch.tensor([[1.0], [-1.0]]).double()).tolist() == [-1e30, 0.0]


def test_a_finite_value_with_a_gradient_that_is_not():
    target = Target(lambda theta: theta[:, 0].abs().sqrt(), coordinates(standard(1)))
    value, gradient = target.value_and_gradient(torch.tensor([[0.0], [4.0]]).double())
    assert value.tolist() == [0.0, 2.0] and gradient.tolist() == [[0.0], [0.25]]


def test_gradients_are_found_even_where_they_are_switched_off():
    target = Target(lambda theta: -theta.square().sum(-1), coordinates(standard(2)))
    z = torch.ones(1, 2, dtype=torch.float64)
    with torch.no_grad():
        assert target.value_and_gradient(z)[1].tolist() == [[-2.0, -2.0]]
        assert not torch.is_grad_enabled()
    assert not z.requires_grad and not target.value(z.requires_grad_()).requires_grad


def test_a_potential_in_float32():
    target = Target(lambda theta: -theta.float().square().sum(-1), coordinates(standard(2)))
    value, gradient = target.value_and_gradient(torch.full((1, 2), 0.1).double())
    assert value.dtype == gradient.dtype == torch.float64
    assert math.isclose(float(value), -0.02, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dist", [LogNormal, FisherSnedecor])  # exp of a normal, and torch's map
def test_where_theta_is_larger_than_numbers_are_there_is_nothing(dtype, dist):
    """theta is the largest number there, whatever z, and log|dtheta/dz| alone would rise for ever."""
    coords = coordinates(Independent(dist(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype)), 1))
    target = Target(lambda theta: -theta.log().square().sum(-1), coords)
    many = ManyTargets(lambda theta, which: -theta.log().square().sum(-1), coords, 1)
    far = torch.tensor([[[1.0], [1e3], [1e6], [1e20]]]).double()
    for value in (target.value(far), many.value(far), target.value_and_gradient(far)[0]):
        assert is_usable(value).tolist() == [[True, False, False, False]]
    assert target.n_nonfinite == 0 and target.value_and_gradient(far)[1][0, 1:].eq(0).all()


def test_a_potential_is_never_asked_at_what_is_no_number():
    """Moves along a slope of 1e30 end at NaN, and priors that check their arguments raise there."""
    prior = box_prior(3)
    target = Target(prior.log_prob, coordinates(prior))
    z = torch.zeros(1, 4, 3).double()
    z[0, 1, 0], z[0, 2, 1] = torch.nan, torch.inf
    value, gradient = target.value_and_gradient(z)
    assert is_usable(value).tolist() == [[True, False, False, True]]
    assert (
        bool(gradient.isfinite().all()) and is_usable(target.value(z)).tolist() == is_usable(value).tolist()
    )


class TestRaising:
    """A potential that checks its arguments, as torch's distributions do."""

    def target(self, *, above: float) -> Target:
        def log_p(theta: Tensor) -> Tensor:
            if bool((theta[:, 0] > above).any()):
                raise ValueError("too large")
            return -theta.square().sum(-1)

        return Target(log_p, coordinates(standard(2)))

    def z(self, bad: int) -> Tensor:
        z = torch.rand(1, 100, 2).double()
        z[0, torch.randperm(100)[:bad], 0] = 5.0
        return z

    @pytest.mark.parametrize("bad", [1, 32])
    def test_a_few_points_are_nothing(self, bad: int):
        target, z = self.target(above=2.0), self.z(bad)
        for ell in (target.value(z), target.value_as_far(z, 25)[0], target.value_and_gradient(z)[0]):
            raised = z[..., 0] > 2.0
            assert torch.equal(is_usable(ell), ~raised)
            torch.testing.assert_close(ell[~raised], -z.square().sum(-1)[~raised])
        assert target.n_broken == 3 * bad and target.n_values == 200 and target.n_gradients == 100
        slope = target.value_and_gradient(z)[1]
        expected = torch.where((z[..., :1] > 2.0), 0.0, -2 * z)
        torch.testing.assert_close(slope, expected)

    @pytest.mark.parametrize("bad", [33, 100])
    def test_many_are_an_error(self, bad: int):
        with pytest.raises(ValueError, match="too large") as raised:
            self.target(above=2.0).value(self.z(bad))
        assert "`potential_fn` raised this at many points, as at theta = [5.0, " in raised.value.__notes__[0]

    @pytest.mark.parametrize("n", [1, 2])
    def test_all_are_an_error(self, n: int):
        with pytest.raises(ValueError, match="too large"):
            self.target(above=-1.0).value(self.z(0)[:, :n])
