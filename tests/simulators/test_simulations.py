"""Sets of simulated pairs."""

import dataclasses

import pytest
import torch

from visbi.simulators import Simulations


def pairs(n=3, width=2, x_shape=(4,), failed=1, seed=0):
    return Simulations(
        torch.rand(n, width), torch.rand(n, *x_shape), torch.rand(failed, width), ("why",) * failed, seed
    )


def test_counts():
    assert len(pairs()) == 3 and pairs().n_failed == 1


def test_merge_joins_everything_in_order():
    a, b = pairs(3, failed=1), pairs(5, failed=2)
    both = a + b
    assert torch.equal(both.theta, torch.cat([a.theta, b.theta])) and torch.equal(both.x[3:], b.x)
    assert torch.equal(both.failed_theta[1:], b.failed_theta) and len(both.failures) == 3
    assert both.seed == 0 and (a + pairs(seed=1)).seed is None


@pytest.mark.parametrize(("change", "name"), [(dict(width=3), "theta"), (dict(x_shape=(5,)), "x")])
def test_unlike_sets_do_not_merge(change, name):
    with pytest.raises(ValueError, match=f"`{name}`: expected rows of shape"):
        pairs().merge(pairs(**change))


def test_inconsistent_fields_are_errors():
    with pytest.raises(ValueError, match="equally many rows"):
        dataclasses.replace(pairs(), x=torch.rand(4, 4))
    with pytest.raises(ValueError, match="`failed_theta`"):
        dataclasses.replace(pairs(), failures=())
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs().theta = torch.rand(3, 2)  # type: ignore[misc]
