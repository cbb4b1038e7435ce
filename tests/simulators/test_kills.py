"""SIGKILL at random moments of `simulate`: no finished run is lost or made twice, same answer."""

import os
from pathlib import Path

import pytest
import torch

from kill_cases import in_nursery, simulate_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    lived = in_nursery("simulate", tmp_path, 40)
    assert lived["killed"] >= 40 and lived["midway"] >= 10
    assert lived["twice"] == [] and lived["lost"] == []
    undisturbed = simulate_run(None)
    assert undisturbed.n_failed == 6
    for folder in lived["folders"]:
        begun: list[int] = []
        again = simulate_run(Path(folder), begun.append)
        assert begun == [] and again.failures == undisturbed.failures
        assert torch.equal(again.x, undisturbed.x) and torch.equal(again.theta, undisturbed.theta)
