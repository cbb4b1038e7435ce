"""Stick breaking against torch's transform, and where torch's has no digits left."""

import pytest
import torch
from torch.distributions import Dirichlet, StickBreakingTransform

from visbi.priors.simplex import StickBreaking


@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_is_the_same_map_as_torchs(size):
    y = torch.randn(100, size, dtype=torch.float64)
    ours, theirs = StickBreaking(), StickBreakingTransform()
    theta = theirs(y)
    torch.testing.assert_close(ours(y), theta)
    torch.testing.assert_close(ours.inv(theta), y)
    torch.testing.assert_close(ours.log_abs_det_jacobian(y, theta), theirs.log_abs_det_jacobian(y, theta))
    assert ours.forward_shape(y.shape) == theta.shape
    assert ours.inverse_shape(theta.shape) == y.shape


@pytest.mark.parametrize("size", [1, 2, 5])
def test_log_jacobian_is_that_of_the_free_entries(size):
    y = torch.randn(size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(StickBreaking(), y)[:-1]
    expected = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(StickBreaking().log_abs_det_jacobian(y, StickBreaking()(y)), expected)


def test_small_entries_keep_their_digits():
    theta = Dirichlet(torch.full((4,), 0.05)).sample((5000,))
    y = StickBreaking().inv(theta.double())
    again = StickBreaking()(y).float()
    tiny = theta < 1e-6
    assert tiny.double().mean() > 0.3  # the case at hand
    torch.testing.assert_close(again[tiny], theta[tiny], rtol=1e-5, atol=1e-40)


def test_far_out_the_log_jacobian_is_finite_where_theta_is_zero():
    y = torch.tensor([900.0, 900.0], dtype=torch.float64)
    assert StickBreaking()(y)[-1] == 0
    assert StickBreaking().log_abs_det_jacobian(y, StickBreaking()(y)).item() == pytest.approx(
        -2700, rel=1e-2
    )
