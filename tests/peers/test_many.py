"""`fit_many` takes sbi's potentials, in rows where they can."""

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),
]  # the peer's own warnings are not ours


@pytest.mark.parametrize("name", ["NLE", "NRE", "NPE"])
def test_fits_to_sbis_potentials(name: str, nets: Any) -> None:
    from sbi_cases import NOISE, POTENTIALS, PRIOR
    from visbi import VIPosterior, fit_many

    potential, _ = POTENTIALS[name](nets[name], PRIOR, None)
    x = torch.tensor([[0.4, -0.2], [-0.8, 0.5], [0.0, 1.0]])
    posteriors = fit_many(potential, PRIOR, x, seed=1, show_progress_bar=False, quality_control=False)
    assert posteriors.job.in_rows
    theta = posteriors.sample((3000,))
    for i, row in enumerate(x):
        one = VIPosterior(potential, PRIOR, q="auto").train(row[None], seed=1, show_progress_bar=False)
        alone = one.sample((3000,))
        assert ((theta[:, i].mean(0) - alone.mean(0)) / NOISE).abs().max() < 0.1
        assert (theta[:, i].std(0) / alone.std(0) - 1).abs().max() < 0.1
