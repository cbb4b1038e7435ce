"""Sums of exponentials are torch's own."""

import pytest
import torch

from visbi.core import logs
from visbi.core.logs import exp_, log_sum_exp


@pytest.fixture(params=["few", "many"], autouse=True)
def number(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few numbers and many are added up in two ways."""
    monkeypatch.setattr(logs, "_SMALL", 10**9 if request.param == "few" else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_equals_torch(dtype: torch.dtype, scale: float, dim: int) -> None:
    values = scale * torch.randn(3, 5, 40, dtype=dtype)
    expected = torch.logsumexp(values, dim)
    assert torch.allclose(log_sum_exp(values, dim), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


def test_values_stay() -> None:
    values = torch.randn(4, 3).double() * 1e3
    before = values.clone()
    log_sum_exp(values, 0)
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    "row", [[-torch.inf, -torch.inf], [-torch.inf, 2.0], [torch.inf, 0.0], [torch.nan, 0.0]]
)
def test_not_finite(row: list[float]) -> None:
    values = torch.tensor([row, [0.0, 0.0]], dtype=torch.float64)
    expected = torch.logsumexp(values, 1)
    assert torch.allclose(log_sum_exp(values, 1), expected, equal_nan=True)


def test_gradient() -> None:
    values = (100 * torch.randn(2, 9).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: log_sum_exp(v, 1), values)
    with torch.no_grad():
        assert not log_sum_exp(values, 1).requires_grad


def test_exp_in_place() -> None:
    values = torch.tensor([-torch.inf, -800.0, -3.0, 0.0, torch.nan], dtype=torch.float64)
    result = exp_(values)
    assert result is values and result[:2].max() < 1e-100
    assert torch.allclose(result[2:], torch.tensor([-3.0, 0.0, torch.nan]).double().exp(), equal_nan=True)
