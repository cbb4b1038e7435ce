"""The tasks of the amortised benchmark: exact draws are exact at any x, and the page says what lines say."""

import pytest
import torch

import amortized_tasks
from amortized import _reason, page
from amortized_tasks import TASKS, amortized_task, glm_weighed
from visbi.certificate import effective_sample_size
from visbi.core.random import seeded


@pytest.mark.parametrize("name", [name for name in TASKS if name != "slcp"])
def test_ranks_of_the_truth_among_exact_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over simulations they are uniform (Talts et al. 2018)."""
    monkeypatch.setattr(amortized_tasks, "_GLM_DRAWS", 2000)
    task = amortized_task(name)
    with seeded(1):
        theta = task.prior.sample(torch.Size([80]))
        x = task.simulator(theta)
    ranks = torch.stack(
        [
            (task.sample(one, 40, i) < truth).double().mean(0)
            for i, (one, truth) in enumerate(zip(x, theta, strict=True))
        ]
    )
    assert ranks.shape == theta.shape
    assert (ranks.mean(0) - 0.5).abs().max() < 4 * (1 / 12 / 80) ** 0.5
    assert (ranks.var(0) * 12 - 1).abs().max() < 0.5


def test_exact_draws_of_slcp_against_the_weighted_prior() -> None:
    task = amortized_task("slcp")
    with seeded(4):
        x = task.simulator(torch.tensor([[0.5, -1.0, 2.2, 1.8, 0.5]], dtype=torch.float64))[0]
        theta = task.prior.sample(torch.Size([400_000])).double()
    w = task.log_likelihood(theta, x).softmax(0)
    assert 1 / w.square().sum() > 2000
    draws = task.sample(x, 4000, 0)
    for moment in (lambda t: t, torch.square, lambda t: t[:, :3].abs() * t[:, 2:].abs()):
        own, expected = moment(draws), (w[:, None] * moment(theta)).sum(0)
        assert ((own.mean(0) - expected) / own.std(0)).abs().max() < 0.1


def test_draws_are_where_the_likelihood_and_the_prior_are() -> None:
    for name in TASKS:
        task = amortized_task(name)
        with seeded(2):
            x = task.simulator(task.prior.sample(torch.Size([1])))[0]
        theta = task.sample(x, 30, 0)
        assert theta.dtype is torch.float64 and theta.shape == (30, *task.prior.event_shape)
        assert bool(task.prior.support.check(theta).all())
        assert bool(task.log_likelihood(theta, x.double()).isfinite().all())


def test_the_proposal_of_the_regression_is_near_its_posterior() -> None:
    task = amortized_task("bernoulli_glm")
    with seeded(3):
        for x in task.simulator(task.prior.sample(torch.Size([5]))):
            theta, log_w = glm_weighed(x.double(), 4000)
            assert effective_sample_size(log_w) > 0.5 * len(theta)


def test_page() -> None:
    cell = {"task": "two_moons", "method": "forward", "seed": 0, "processor": "p"}
    rows = [{**cell, "x": None, "seconds": 12.3, "nle_seconds": 45.6, "share": 0.55}]
    for x, (raw, corrected, status) in enumerate(
        [(0.6, 0.55, "corrected"), (0.56, 0.55, "suspect"), (0.5, 0.5, "ok")]
    ):
        report = {"status": status}
        rows.append({**cell, "x": x, "raw": raw, "corrected": corrected, "variation": 0.1, "report": report})
    rows.append({**cell, "method": "forward+exact", "x": 0, "exact": 0.51})
    failed = {**cell, "method": "sbi", "x": None, "error": "Traceback\\nValueError: no"}
    text = page([*rows, failed])
    scores = "0.553 (0.600) | 0.533 (0.550) | 0.510 (0.510) at 1 x | 2 | 1 | 1, 1, 1 |"
    assert f"| two_moons | forward | 1 | 3 | 12 (46) | 0.550 (0.550) | 0.55 | {scores}" in text
    assert "ValueError: no" in text
    assert _reason("Traceback\n  File x\nValueError: no\n - Try") == "ValueError: no"
