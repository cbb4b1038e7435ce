"""A real posterior under priors far too wide, along a bend in which tempered particles sink."""

import pytest
import torch

from targets import target
from visbi import VIPosterior


@pytest.mark.parametrize("seed", [0, 3])
def test_where_the_explorer_sinks_into_a_bend(seed: int) -> None:
    """Without ascents one ended with particles 2000 sds off, the other with an effective share of .02."""
    goal = target("growth_d4")
    posterior = VIPosterior(goal.potential, goal.prior, q="auto")
    report = posterior.train(torch.zeros(1, 1), seed=seed, show_progress_bar=False).report
    assert report.status in ("ok", "corrected") and report.n_values + report.n_gradients < 300_000
    assert goal.log_evidence is not None
    assert abs(report.log_evidence - goal.log_evidence) < 4 * report.log_evidence_se
    draws, exact = posterior.sample((4000,)).double(), goal.sample(4000, seed)
    assert float(((draws.mean(0) - exact.mean(0)) / exact.std(0)).abs().max()) < 0.1
    torch.testing.assert_close(draws.std(0), exact.std(0), rtol=0.1, atol=0)
