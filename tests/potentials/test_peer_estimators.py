"""Estimators in the shape of the sbi package's; `tests/peers` runs the same with the package itself."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from visbi.potentials import likelihood_estimator_based_potential, ratio_estimator_based_potential

PRIOR = Independent(Normal(torch.zeros(2), 2 * torch.ones(2)), 1)
THETA = torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.5, 0.5]])
X = torch.tensor([[1.0, 1.0], [0.0, 2.0], [-1.0, 0.0], [0.3, 0.3]])


def log_normal(theta: Tensor, x: Tensor) -> Tensor:
    return Normal(theta, 0.5).log_prob(x).sum(-1)


class Density(nn.Module):
    """log_prob(x (S, B, K), condition=theta (B, K)) -> (S, B), and nothing else."""

    def log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        assert x.ndim == 3 and x.shape[1] == len(condition)
        return log_normal(condition, x)


class Ratio(nn.Module):
    """unnormalized_log_ratio(theta (N, D), x (N, K)) -> (N,); does not broadcast."""

    def unnormalized_log_ratio(self, theta: Tensor, x: Tensor) -> Tensor:
        assert theta.shape[:-1] == x.shape[:-1]
        return log_normal(theta, x)


KINDS = pytest.mark.parametrize(
    ("make", "estimator"),
    [(likelihood_estimator_based_potential, Density), (ratio_estimator_based_potential, Ratio)],
)


@KINDS
def test_trials_add_up(make, estimator) -> None:
    potential, _ = make(estimator(), PRIOR, X)
    expected = torch.stack([log_normal(THETA, x) for x in X]).sum(0) + PRIOR.log_prob(THETA)
    torch.testing.assert_close(potential(THETA), expected)


@KINDS
def test_rows_are_paired(make, estimator) -> None:
    potential, _ = make(estimator(), PRIOR, None)
    values = potential.evaluate(THETA, X[:3], x_is_iid=False)
    torch.testing.assert_close(values, log_normal(THETA, X[:3]) + PRIOR.log_prob(THETA))


@KINDS
def test_one_x_for_all_theta(make, estimator) -> None:
    potential, _ = make(estimator(), PRIOR, None)
    values = potential.evaluate(THETA, X[:1], x_is_iid=False)
    torch.testing.assert_close(values, log_normal(THETA, X[:1]) + PRIOR.log_prob(THETA))


@KINDS
def test_it_is_not_copied_and_stops_training(make, estimator) -> None:
    inner = estimator()
    potential, _ = make(inner, PRIOR, X)
    assert any(
        module is inner
        for part in vars(potential).values()
        if isinstance(part, nn.Module)
        for module in part.modules()
    )
    assert not inner.training


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (likelihood_estimator_based_potential, "likelihood_estimator"),
        (ratio_estimator_based_potential, "ratio_estimator"),
    ],
)
@pytest.mark.parametrize("estimator", [nn.Linear(2, 2), log_normal, None])
def test_no_estimator(make, name: str, estimator) -> None:
    with pytest.raises(TypeError, match=f"`{name}`: expected an estimator"):
        make(estimator, PRIOR, X)
