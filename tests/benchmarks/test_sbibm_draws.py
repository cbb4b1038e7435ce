"""The benchmark on the SBI benchmark's reference draws: its likelihoods, what it reads, its page."""

import bz2
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

import sbibm_draws
from sbibm_draws import Known, observed, page, tasks

X = torch.tensor([[0.3, -0.2]]).double()


def differs_by_a_constant(one: Tensor, other: Tensor) -> bool:
    gap = one - other
    return bool((gap - gap.mean()).abs().max() < 1e-9)


def test_mixture() -> None:
    theta = torch.randn(50, 2).double()
    each = torch.stack([Normal(theta, sd).log_prob(X).sum(-1) for sd in (1.0, 0.1)])
    found = tasks()["gaussian_mixture"].log_likelihood(theta, X, Path())
    assert differs_by_a_constant(found, each.logsumexp(0))


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_linear_uniform"])
def test_gaussian(name: str) -> None:
    theta, x = torch.randn(50, 10).double(), torch.randn(1, 10).double()
    found = tasks()[name].log_likelihood(theta, x, Path())
    assert differs_by_a_constant(found, Normal(theta, 0.1**0.5).log_prob(x).sum(-1))


def test_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    design = torch.randn(100, 10)
    monkeypatch.setattr(sbibm_draws, "_design", lambda _: design)
    theta, spikes = torch.randn(50, 10).double(), torch.randint(2, (1, 100)).double()
    found = tasks()["bernoulli_glm"].log_likelihood(theta, spikes, Path())
    exact = Bernoulli(logits=theta @ design.double().T).log_prob(spikes).sum(-1)
    torch.testing.assert_close(found, exact)


def test_what_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "num_observation_2"
    folder.mkdir()
    (folder / "observation.csv").write_text("data_1,data_2\n0.5,-1\n")
    rows = "parameter_1,parameter_2\n" + "1,2\n3,4\n"
    (folder / "reference_posterior_samples.csv.bz2").write_bytes(bz2.compress(rows.encode()))
    x, theta = observed(tmp_path, tasks()["two_moons"], 2)
    assert x.tolist() == [[0.5, -1.0]] and theta.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_fit_and_the_page(tmp_path: Path) -> None:
    task = tasks()["gaussian_linear"]
    folder = tmp_path / "tasks" / "gaussian_linear" / "files" / "num_observation_1"
    folder.mkdir(parents=True)
    np.savetxt(folder / "observation.csv", np.ones((1, 10)), delimiter=",", header="x", comments="")
    exact = 0.5 + 0.05**0.5 * torch.randn(4000, 10)  # prior and likelihood have the same variance
    path = folder / "reference_posterior_samples.csv.bz2"
    np.savetxt(path, exact.numpy(), delimiter=",", header="theta", comments="")
    row = sbibm_draws.measure(tmp_path, "gaussian_linear", task, 1, 0)
    assert row["c2st"] < 0.54 and row["status"] == "ok"
    text = page([row, {**row, "status": "suspect", "c2st": 0.75}])
    assert "| gaussian_linear | 2 |" in text and "ok x 1, suspect x 1" in text and "| 0.750 |" in text
    assert "slcp" not in text


def test_all_tasks_are_there() -> None:
    assert all(isinstance(known, Known) for known in tasks().values()) and len(tasks()) == 8
