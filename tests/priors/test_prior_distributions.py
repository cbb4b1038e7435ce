"""Boxes, products, and the door for priors."""

import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Dirichlet,
    Gamma,
    HalfCauchy,
    Independent,
    MultivariateNormal,
    Normal,
    Uniform,
)

from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal, as_prior


class TestBoxUniform:
    LOW, HIGH = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0])

    def test_density_and_support(self):
        prior = BoxUniform(self.LOW, self.HIGH)
        assert (prior.batch_shape, prior.event_shape) == ((), (2,))
        theta = torch.tensor([[0.0, 3.0], [-1.0, 2.0], [-1.1, 3.0], [0.0, 5.5]])
        expected = [-math.log(6), -math.log(6), -math.inf, -math.inf]
        torch.testing.assert_close(prior.log_prob(theta), torch.tensor(expected))
        assert prior.support.check(theta).tolist() == [True, True, False, False]
        torch.testing.assert_close(prior.mean, torch.tensor([0.0, 3.5]))

    def test_draws_fill_the_box(self):
        theta = BoxUniform(self.LOW, self.HIGH).sample((4000,))
        assert ((theta >= self.LOW) & (theta < self.HIGH)).all()
        torch.testing.assert_close(theta.mean(0), torch.tensor([0.0, 3.5]), atol=0.1, rtol=0)
        torch.testing.assert_close(theta.var(0), torch.tensor([4 / 12, 9 / 12]), atol=0.05, rtol=0)

    @pytest.mark.parametrize(
        ("low", "high", "dtype"),
        [
            (0, 1, torch.float32),
            (0.0, torch.ones(1), torch.float32),
            (torch.zeros(1), torch.ones(1, dtype=torch.float64), torch.float64),
            (torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), torch.float32),
        ],
    )
    def test_numbers_and_dtypes(self, low, high, dtype):
        prior = BoxUniform(low, high)
        assert prior.event_shape == (1,)
        assert prior.sample((3,)).dtype is dtype
        assert prior.log_prob(torch.full((1,), 0.5, dtype=dtype)) == 0

    def test_a_number_stands_for_every_entry(self):
        assert BoxUniform(0.0, torch.ones(3)).event_shape == (3,)

    @pytest.mark.parametrize(
        ("low", "high"),
        [
            (torch.ones(2), torch.ones(2)),
            (torch.tensor([0.0, 2.0]), torch.ones(2)),
            (torch.zeros(2), torch.tensor([1.0, math.inf])),
            (torch.tensor([-math.inf, 0.0]), torch.ones(2)),
            (torch.tensor([math.nan, 0.0]), torch.ones(2)),
        ],
    )
    def test_corners_that_make_no_box(self, low, high):
        with pytest.raises(
            ValueError, match=r"^`low`, `high`: expected finite corners, low < high in every entry; got"
        ):
            BoxUniform(low, high)

    def test_corners_of_unlike_length(self):
        with pytest.raises(
            ValueError, match=r"^`low`, `high`: expected corners of one shape; got \(2,\) and \(3,\)$"
        ):
            BoxUniform(torch.zeros(2), torch.ones(3))

    def test_batches_expand(self):
        many = BoxUniform(self.LOW, self.HIGH).expand((7,))
        assert (many.batch_shape, many.event_shape) == ((7,), (2,))
        assert many.sample((3,)).shape == (3, 7, 2)
        assert BoxUniform(torch.zeros(7, 2), torch.ones(7, 2)).batch_shape == (7,)
        assert BoxUniform(torch.zeros(7, 2), torch.ones(7, 2), reinterpreted_batch_ndims=2).event_shape == (
            7,
            2,
        )

    def test_device(self):
        assert BoxUniform(self.LOW, self.HIGH, device="meta").sample((3,)).device.type == "meta"


FACTORS = {
    "univariate": lambda: Normal(0.0, 1.0),
    "batch": lambda: HalfCauchy(torch.ones(2)),
    "joint": lambda: MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "box": lambda: BoxUniform(torch.zeros(2), torch.ones(2)),
    "simplex": lambda: Dirichlet(torch.ones(3)),
    "truncated": lambda: TruncatedNormal(torch.ones(2), 0.5),
    "product": lambda: MultipleIndependent([Gamma(torch.ones(1), torch.ones(1)), Beta(torch.ones(1), 2.0)]),
}
SIZES = {"univariate": 1, "batch": 2, "joint": 2, "box": 2, "simplex": 3, "truncated": 2, "product": 2}


class TestMultipleIndependent:
    def make(self):
        return MultipleIndependent([make() for make in FACTORS.values()])

    def test_log_prob_is_the_sum_over_factors(self):
        prior = self.make()
        theta = prior.sample((3, 50))
        assert theta.shape == (3, 50, 14)
        parts = dict(zip(FACTORS, theta.split(list(SIZES.values()), -1), strict=True))
        expected = torch.zeros(3, 50)
        for name, make in FACTORS.items():
            factor = make()
            value = parts[name][..., 0] if name == "univariate" else parts[name]
            log_p = factor.log_prob(value)
            expected = expected + (log_p.sum(-1) if log_p.ndim == 3 else log_p)
        torch.testing.assert_close(prior.log_prob(theta), expected)

    def test_support_is_the_product(self):
        prior = self.make()
        theta = prior.sample((10,))
        assert prior.support.event_dim == 1
        assert prior.support.check(theta).all()
        outside = theta.clone()
        outside[:, 1] = -1.0  # half-Cauchy
        assert not prior.support.check(outside).any()
        outside = theta.clone()
        outside[:, 7] += 0.5  # on no simplex
        assert not prior.support.check(outside).any()

    def test_factors_are_independent_and_keep_their_moments(self):
        prior = MultipleIndependent([Normal(torch.ones(1), 2.0), BoxUniform(torch.zeros(2), torch.ones(2))])
        theta = prior.sample((4000,))
        torch.testing.assert_close(prior.mean, torch.tensor([1.0, 0.5, 0.5]))
        torch.testing.assert_close(prior.variance, torch.tensor([4.0, 1 / 12, 1 / 12]))
        torch.testing.assert_close(theta.mean(0), prior.mean, atol=0.15, rtol=0)
        assert (torch.corrcoef(theta.mT) - torch.eye(3)).abs().max() < 0.08

    def test_draws_carry_no_gradient(self):
        loc = torch.zeros(1, requires_grad=True)
        prior = MultipleIndependent([Normal(loc, 1.0)])
        assert not prior.sample((2,)).requires_grad
        assert prior.log_prob(torch.ones(2, 1)).requires_grad

    def test_double_stays_double(self):
        prior = MultipleIndependent([Normal(torch.zeros(2, dtype=torch.float64), 1.0)])
        assert prior.sample((3,)).dtype is torch.float64

    def test_device_moves_copies_of_the_factors(self):
        factor = Normal(torch.zeros(1), torch.ones(1))
        assert MultipleIndependent([factor], device="meta").sample((2,)).device.type == "meta"
        assert factor.loc.device.type == "cpu"

    def test_no_factor(self):
        with pytest.raises(ValueError, match=r"^`dists`: expected at least one Distribution; got none$"):
            MultipleIndependent([])

    def test_factors_that_are_not_in_a_list(self):
        one = Normal(torch.zeros(1), torch.ones(1))
        with pytest.raises(TypeError, match=r"^`dists`: expected a list of Distributions; got Normal$"):
            MultipleIndependent(one, one)

    def test_something_else_as_a_factor(self):
        with pytest.raises(TypeError, match=r"^`dists\[1\]`: expected a torch Distribution; got float$"):
            MultipleIndependent([Normal(0.0, 1.0), 3.0])

    @pytest.mark.parametrize(
        "factor",
        [
            Normal(torch.zeros(2, 2), torch.ones(2, 2)),
            MultivariateNormal(torch.zeros(1, 2), torch.eye(2)),
            MultivariateNormal(torch.zeros(3, 2), torch.eye(2)),
        ],
    )
    def test_a_factor_with_two_axes(self, factor):
        with pytest.raises(
            ValueError, match=r"^`dists\[0\]`: expected one axis in all .*; got batch_shape \("
        ):
            MultipleIndependent([factor])

    def test_theta_of_another_length(self):
        with pytest.raises(ValueError, match=r"^`value`: expected shape \(\.\.\., 14\); got \(4, 3\)$"):
            self.make().log_prob(torch.zeros(4, 3))


class TestAsPrior:
    @pytest.mark.parametrize(
        ("given", "size"),
        [
            (Normal(0.0, 1.0), 1),
            (Normal(torch.zeros(1), 1.0), 1),
            (BoxUniform(0.0, 1.0), 1),
            (FACTORS["simplex"](), 3),
        ],
    )
    def test_a_joint_distribution_comes_out(self, given, size):
        prior = as_prior(given)
        assert (prior.batch_shape, prior.event_shape) == ((), (size,))
        theta = prior.sample((4,))
        assert theta.shape == (4, size)
        assert prior.log_prob(theta).shape == (4,)

    def test_what_fits_passes_unchanged(self):
        prior = BoxUniform(torch.zeros(2), torch.ones(2))
        assert as_prior(prior) is prior

    @pytest.mark.parametrize("given", [None, 3, "normal", Normal])
    def test_no_distribution(self, given):
        with pytest.raises(TypeError, match=r"^`prior`: expected a "):
            as_prior(given)

    def test_a_distribution_without_event_shape(self):
        class Sampler:
            sample = log_prob = len

        with pytest.raises(
            TypeError, match=r"^`prior`: expected a Distribution with `event_shape`; got Sampler$"
        ):
            as_prior(Sampler())

    def test_a_batch_where_one_joint_distribution_is_meant(self):
        with pytest.raises(
            ValueError, match=r"Independent\(prior, 1\), or use BoxUniform; got batch_shape \(3,\)$"
        ):
            as_prior(Uniform(torch.zeros(3), torch.ones(3)))
        assert as_prior(Independent(Uniform(torch.zeros(3), torch.ones(3)), 1)).event_shape == (3,)

    def test_a_batch_of_joint_distributions(self):
        with pytest.raises(
            ValueError, match=r"^`proposal`: expected batch_shape \(\) and event_shape \(D,\); got"
        ):
            as_prior(MultivariateNormal(torch.zeros(3, 2), torch.eye(2)), "proposal")
