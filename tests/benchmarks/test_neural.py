"""The reference sampler of learned potentials, and the page."""

import math

import pytest
import torch
from torch import Tensor

from neural_potentials import page
from neural_targets import SmcOptions, tempered_smc


def test_tempered_smc_finds_masses_and_evidence() -> None:
    """Two narrow Gaussians of masses .8 and .2 times e^3, given as a ratio to N(0, I)."""
    centres = torch.tensor([[1.5, 0.5], [-1.5, -1.0]], dtype=torch.float64)

    def log_ratio(z: Tensor) -> Tensor:
        square = ((z[:, None] - centres) / 0.1).square().sum(-1)
        weights = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
        log_p = torch.logsumexp(weights - 0.5 * square, -1) - 2 * math.log(0.1)
        return log_p + 3 + 0.5 * z.square().sum(-1)

    options = SmcOptions(particles=2000, ess_share=0.7, moves=3, last_moves=10, leapfrogs=5)
    z, evidence = tempered_smc(log_ratio, 2, options, seed=0)
    right = z[:, 0] > 0
    assert evidence == pytest.approx(3, abs=0.25)
    assert float(right.double().mean()) == pytest.approx(0.8, abs=0.06)
    assert float((z[right].mean(0) - centres[0]).abs().max()) < 0.02
    assert z[right].std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.1)


def test_page() -> None:
    row = {
        "tool": "visbi",
        "target": "nle_slcp",
        "seed": 0,
        "dim": 5,
        "outcome": "done",
        "cpu_seconds": 2.0,
        "draw_cpu_seconds": 0.5,
        "seconds": 3.0,
        "draw_seconds": 0.25,
        "n_values": 10,
        "n_gradients": 20,
        "report": {"status": "ok"},
        "scores": {"c2st": 0.515},
        "raw_scores": {"c2st": 0.6},
        "reference_c2st": 0.49,
        "load": [1.0, 2.0],
        "processor": "p",
    }
    late = row | {"tool": "sbi-maf-rKL", "outcome": "time limit"}
    text = page([row, late])
    assert "| nle_slcp | 5 | 0.490 | visbi | 1 | ok | 0.515 (0.515) | 0.600 | 2.5 | 3.2 | 30 |" in text
    assert "| sbi-maf-rKL | 1 | time limit |" in text
    assert "Nothing measured" in page([])
