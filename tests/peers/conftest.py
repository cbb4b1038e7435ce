"""Networks trained by sbi, once for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def simulations() -> tuple[Tensor, Tensor]:
    """theta and x of 3000 runs."""
    from sbi_cases import PRIOR, simulator

    torch.manual_seed(1)
    theta = PRIOR.sample((3000,))
    return theta, simulator(theta)


@pytest.fixture(scope="session")
def nets(simulations: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Estimators by the name of the method that trained them, each made on first use."""
    from sbi_cases import PRIOR, TRAINERS

    class Nets(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            torch.manual_seed(1)
            trainer = TRAINERS[name](PRIOR, show_progress_bars=False).append_simulations(*simulations)
            self[name] = trainer.train(max_num_epochs=15, training_batch_size=200, learning_rate=3e-3)
            return self[name]

    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("sbi"))  # it writes its log where it runs
    yield Nets()
    os.chdir(before)
