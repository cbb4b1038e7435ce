"""The examples in docs/amortised.md run, in order, and find what they are after."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAGE = Path(__file__).parents[1] / "docs" / "amortised.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        found: dict[str, Any] = {"__name__": "amortised"}
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), found)
    return found


def spread_of_z(draws: Tensor, truth: Tensor) -> Tensor:
    """Root mean square of (truth - mean) / sd, 1 for a calibrated posterior."""
    return ((draws.mean(0) - truth) / draws.std(0)).square().mean(0).sqrt()


def test_images(names: dict[str, Any]) -> None:
    found, spots = names["found"], names["spots"]
    assert found.shape == (500, 100, 2)
    assert (found.mean(0) - spots).abs().mean() < 0.12  # 0.5 for one that knows the prior alone
    assert (spread_of_z(found, spots) < 1.5).all()
    assert bool(names["square"].support.check(found).all())
    assert names["report"].n_draws == 5000


def test_an_image_s_posterior_by_quadrature(names: dict[str, Any]) -> None:
    axis = torch.linspace(-0.995, 0.995, 200)
    grid = torch.cartesian_prod(axis, axis)
    for image, draws in zip(names["new_images"][:5], names["found"].unbind(1), strict=False):
        log_p = torch.cat([names["image_potential"](part, image) for part in grid.split(5000)])
        w = torch.softmax(log_p.double(), 0)[:, None]
        mean = (w * grid).sum(0)
        sd = (w * (grid - mean).square()).sum(0).sqrt()
        assert ((draws.mean(0) - mean) / sd).abs().max() < 1.0
        assert (draws.std(0) / sd - 1).abs().max() < 0.4


def test_sets(names: dict[str, Any]) -> None:
    sets, new, truth = names["sets"], names["new_sets"], names["truth"]
    shuffled = new[:, torch.randperm(10)]
    torch.testing.assert_close(sets.log_prob(truth, shuffled), names["density"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sets.log_prob(truth, new.flip(0)), names["density"], atol=1.0)
    draws = sets.sample((500,), new)
    assert bool(names["where_and_how_wide"].support.check(draws).all())
    assert ((draws.mean(0) - truth).abs().mean(0) < torch.tensor([0.3, 0.3])).all()
    assert (draws[..., 0].std(0) < 3 * draws[..., 1].mean(0)).all()  # narrow sets place the mean narrowly


def test_corrected_sets_by_quadrature(names: dict[str, Any]) -> None:
    assert len(names["reports"]) == 20 and sum(names["sound"]) >= 10
    grid = torch.cartesian_prod(torch.linspace(-1.99, 1.99, 200), torch.linspace(0.01, 4.0, 200))
    alone = names["alone"].sample((4000,))
    draws = [*names["corrected"].unbind(1), alone]
    for data, theta in zip([*names["new_sets"][:20], names["new_sets"][0]], draws, strict=True):
        w = torch.softmax(names["set_potential"](grid, data[None]).double(), 0)[:, None]
        mean = (w * grid).sum(0)
        sd = (w * (grid - mean).square()).sum(0).sqrt()
        assert ((theta.mean(0) - mean) / sd).abs().max() < 0.2
        assert (theta.std(0) / sd - 1).abs().max() < 0.2
    assert names["alone"].report.status in ("ok", "corrected")
