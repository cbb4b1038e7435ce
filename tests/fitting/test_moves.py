"""The moves themselves: how long they are."""

import pytest
import torch

from mixture_cases import known, of_mixture
from visbi.fitting.explore import explore
from visbi.fitting.moves import Moves, StandardNormal


def test_moves_end_after_a_quarter_orbit():
    """In a Gaussian, whose best steps are long, a move takes few of them; all are the explorer's to know."""
    found = explore(of_mixture(known([1.0], [[0.5] * 4], 0.3)), 512)
    moves = Moves(of_mixture(known([1.0], [[1.0, -0.5]], 0.2)), StandardNormal(2), gradient=True)
    counts = []
    for moves.step in (torch.tensor([0.1]), found.step, torch.tensor([0.9, 0.9, 0.1]), torch.tensor([2.0])):
        counts.append(moves.leapfrog)
    assert counts[0] == 5 and counts[1] < 5 and counts[2:] == [2, 1]
    assert found.step.shape == found.acceptance.shape == (1,)
    assert float(found.acceptance) == pytest.approx(0.8, abs=0.1)
