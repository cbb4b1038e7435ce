"""Workers, backends and a real cluster change nothing."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from torch import Tensor

from many_cases import X, equal, many
from posterior_cases import alone_and_seeded, log_p
from visbi.estimators import fit_likelihood
from visbi.potentials import likelihood_estimator_based_potential
from visbi.priors import BoxUniform

__all__ = ["alone_and_seeded"]


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_backends_change_nothing(backend: str) -> None:
    alone = many()
    with joblib.parallel_config(backend=backend):
        assert equal(alone, many(workers=2))
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert equal(alone, many(workers=None))


def test_auto_in_processes() -> None:
    assert equal(many(X[:3], "auto"), many(X[:3], "auto", workers=2))


def test_threads_of_the_caller_change_nothing_and_stay() -> None:
    one = many()
    torch.set_num_threads(2)
    assert equal(one, many()) and torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_learnt_likelihood_goes_to_workers() -> None:
    prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
    theta = prior.sample((500,))
    x = theta + 0.5 * torch.randn(500, 2)
    trained = fit_likelihood(theta, x, num_transforms=1, hidden_features=8, seed=1, show_progress_bar=False)
    potential, _ = likelihood_estimator_based_potential(trained.estimator, prior, None)
    alone = many(x[:4], potential=potential, prior=prior)
    assert alone.job.in_rows and equal(alone, many(x[:4], potential=potential, prior=prior, workers=2))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dask's own, of ports and of versions
        options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        with distributed.LocalCluster(**options) as running, distributed.Client(running) as client:
            yield client


@pytest.mark.filterwarnings("default")  # Dask's, of its own
@pytest.mark.parametrize("q", ["gaussian", "auto"])
def test_a_dask_cluster_changes_nothing(cluster: Any, tmp_path: Path, q: str) -> None:
    def telling(theta: Tensor, x: Tensor) -> Tensor:
        (tmp_path / str(os.getpid())).touch()
        return log_p(theta, x)

    alone = many(X[:4], q)
    with joblib.parallel_config(backend="dask"):
        assert equal(alone, many(X[:4], q, telling, workers=None))
    workers = set(cluster.run(os.getpid).values())
    seen = {int(path.name) for path in tmp_path.iterdir()} - {os.getpid()}  # the door looks here
    assert seen and seen <= workers
