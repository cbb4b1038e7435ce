"""Means of losses that no single row decides."""

import math

import pytest
import torch

from visbi.core.losses import within_reach


def test_a_row_far_from_the_others_is_brought_near():
    losses = torch.randn(99, dtype=torch.float64)
    far = torch.cat([losses, torch.tensor([1e9, math.inf]).double()])
    brought = within_reach(far)
    assert torch.equal(brought[:99], losses)
    low, middle, high = far.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    assert brought[99:].tolist() == pytest.approx([middle + 20 * (high - low)] * 2)
    # rows that are mostly alike, or not numbers, stay
    alike = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0])
    assert torch.equal(within_reach(alike), alike)
    assert bool(within_reach(torch.tensor([1.0, math.nan, 2.0])).isnan().any())
