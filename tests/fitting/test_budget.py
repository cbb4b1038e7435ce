"""What a fit may cost."""

import math

import pytest
import torch

from family_cases import real_prior
from visbi.fitting import budget as module
from visbi.fitting.budget import Budget, BudgetReached
from visbi.fitting.target import Target
from visbi.priors import coordinates


def test_without_limits():
    budget = Budget()
    budget.spend(10**12)
    assert budget.left == math.inf and budget.evals == 10**12


def test_exactly_so_many_and_no_more():
    budget = Budget(max_evals=10)
    budget.spend(7)
    with pytest.raises(BudgetReached, match=r"^reached max_potential_evals = 10$"):
        budget.spend(4)
    assert budget.evals == 7 and budget.left == 3  # what was refused costs nothing
    budget.spend(3)
    assert budget.left == 0
    budget.spend(0)
    with pytest.raises(BudgetReached):
        budget.spend(1)


def test_seconds_are_counted_from_the_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    budget = Budget(max_seconds=2.5, started=100.0)
    now[0] = 102.0
    budget.spend(5)
    assert budget.seconds == 2.0
    now[0] = 103.0
    with pytest.raises(BudgetReached, match=r"^reached max_seconds = 2\.5$"):
        budget.spend(1)
    assert budget.evals == 5


def test_a_target_stops_before_it_evaluates():
    rows = []

    def log_p(theta):
        rows.append(len(theta))
        return -theta.square().sum(-1)

    target = Target(log_p, coordinates(real_prior(2)), Budget(max_evals=20))
    target.value(torch.zeros(3, 4, 2).double())
    with pytest.raises(BudgetReached):
        target.value_and_gradient(torch.zeros(9, 2).double())
    target.value_and_gradient(torch.zeros(8, 2).double())
    with pytest.raises(BudgetReached):
        target.value(torch.zeros(1, 2).double())
    assert sum(rows) == 20 and (target.n_values, target.n_gradients) == (12, 8)
