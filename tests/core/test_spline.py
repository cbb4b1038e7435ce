"""Rational-quadratic splines: monotone, smooth to first order, invertible, and right by hand."""

import math

import pytest
import torch

from visbi.core.spline import RationalQuadraticSpline, spline_shapes


def random_spline(n=1, bins=6, scale=2.0):
    sizes, slopes = spline_shapes(bins)
    return RationalQuadraticSpline(
        scale * torch.randn(n, *sizes, dtype=torch.float64),
        scale * torch.randn(n, *slopes, dtype=torch.float64),
    )


X = torch.linspace(-7, 7, 2801, dtype=torch.float64)[:, None]


def test_monotone_continuous_and_identity_outside():
    spline = random_spline(5)
    y = spline(X.expand(-1, 5))
    outside = X[:, 0].abs() >= 5
    assert torch.equal(y[outside], X.expand(-1, 5)[outside])
    steps = y.diff(dim=0)
    assert bool((steps > 0).all()) and float(steps.max()) < 0.005 * 1e3
    near = torch.tensor([[-5 - 1e-9], [-5 + 1e-9], [5 - 1e-9], [5 + 1e-9]], dtype=torch.float64)
    torch.testing.assert_close(spline(near.expand(-1, 5)), near.expand(-1, 5), atol=1e-6, rtol=0)


def test_log_slope_is_the_derivative_and_continuous():
    spline = random_spline(5)
    x = X.expand(-1, 5).clone().requires_grad_()
    y, ladj = spline.call_and_ladj(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ladj, slope.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spline.log_abs_det_jacobian(x, y), ladj)
    knots = spline._knots[:, 0, 1:-1].mT
    below, above = (spline.call_and_ladj(knots + e)[1] for e in (-1e-9, 1e-9))
    torch.testing.assert_close(below, above, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.3, 2.0, 30.0])
def test_inverse(scale):
    spline = random_spline(5, scale=scale)
    y = spline(X.expand(-1, 5))
    torch.testing.assert_close(spline.inv(y), X.expand(-1, 5), atol=1e-6, rtol=0)


def test_zero_parameters_are_the_identity():
    sizes, slopes = spline_shapes(8)
    spline = RationalQuadraticSpline(torch.zeros(1, *sizes), torch.zeros(1, *slopes))
    y, ladj = spline.call_and_ladj(X.float())
    torch.testing.assert_close(y, X.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(ladj, torch.zeros_like(ladj), atol=2e-5, rtol=0)


def test_knots_are_where_widths_and_heights_put_them():
    # bins of widths 2:8 and heights 5:5, inner slope 1; clipped logs a / (1 + 2 |a| / c) are log-shares
    c = math.log(1e3)
    ratio = math.log(4.0)
    raw = ratio / (1 - 2 * ratio / c)
    sizes = torch.tensor([[[0.0, raw], [0.0, 0.0]]], dtype=torch.float64)
    spline = RationalQuadraticSpline(sizes, torch.zeros(1, 1, dtype=torch.float64))
    at_knot = torch.tensor([[-3.0]], dtype=torch.float64)
    torch.testing.assert_close(spline(at_knot), torch.zeros_like(at_knot), atol=1e-12, rtol=0)
    s, t = 5 / 2, 0.5  # the middle of the first bin
    expected = -5 + 5 * (s * t**2 + t * (1 - t)) / (s + (2 - 2 * s) * t * (1 - t))
    middle = torch.tensor([[-4.0]], dtype=torch.float64)
    assert float(spline(middle)) == pytest.approx(expected, abs=1e-12)


def test_gradients_are_finite_at_bounds_and_knots():
    sizes = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    spline = RationalQuadraticSpline(sizes, slopes)
    inner = spline._knots.detach()[0, 0]
    x = torch.cat([inner, torch.tensor([-1e9, 1e9, 0.0], dtype=torch.float64)])[:, None].requires_grad_()
    y, ladj = spline.call_and_ladj(x)
    for gradient in torch.autograd.grad((y + ladj).sum(), (x, sizes, slopes)):
        assert bool(gradient.isfinite().all())
