"""SIGKILL at random moments of `infer`: nothing finished is lost or done twice, same answer."""

import os
from pathlib import Path
from typing import Any

import pytest

from kill_cases import in_nursery, infer_run
from visbi.core.random import seeded
from visbi.rounds import Inference

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def numbers(result: Inference) -> list[Any]:
    with seeded(1):
        draws = [done.posterior.sample((100,)).tolist() for done in result.rounds]
    runs = [(each.theta.tolist(), each.x.tolist()) for each in result.simulations]
    said = [(done.n_used, done.errors, done.report, done.likelihood.traces) for done in result.rounds]
    return [runs, said, draws, result.stop_reason]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    lived = in_nursery("infer", tmp_path, 24)
    assert lived["killed"] >= 24 and lived["midway"] >= 6
    assert lived["twice"] == [] and lived["lost"] == []
    result = infer_run(None)
    assert result.errors.likelihood_p is not None  # the test of a likelihood is among what is repeated
    undisturbed = numbers(result)
    for folder in lived["folders"]:
        begun: list[int] = []
        assert numbers(infer_run(Path(folder), begun.append)) == undisturbed
        assert begun == []
