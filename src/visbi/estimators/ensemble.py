r"""Ensembles: estimators that differ by their seed, averaged.

    log q(x | theta) = log (1/K) sum_k q_k(x | theta)

Averages of densities are densities; where members disagree, the average is wider than each (Lakshminarayanan,
Pritzel, Blundell 2017; Hermans et al. 2022). Independent trials share the unknown network, so for them the
average is over products: log (1/K) sum_k prod_t q_k(x_t | theta). `members_*` give each member's value, so
that the spread can be reported.

The average of ratios is a ratio too, if the members are ratios: after the loss `contrastive` each has a free
factor c_k(x), which weights the members of the average at that x.
"""

import math
from collections.abc import Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from visbi.core.checks import positive_int, violation
from visbi.core.random import seeded
from visbi.core.types import Seed
from visbi.estimators.likelihood import NeuralLikelihood
from visbi.estimators.ratio import NeuralRatio
from visbi.estimators.rows import as_rows

__all__ = ["LikelihoodEnsemble", "RatioEnsemble"]

M = TypeVar("M", NeuralLikelihood, NeuralRatio)


class _Ensemble(nn.Module, Generic[M]):
    """K estimators of one kind and shape.

    Args:
        members: at least one.

    Raises:
        ValueError: none, or different shapes of theta or x.
    """

    def __init__(self, members: Sequence[M]) -> None:
        super().__init__()
        shapes = {(member.theta_features, tuple(member.x_shape)) for member in members}
        if len(shapes) != 1:
            expected = "estimators of one shape (D, x_shape)"
            raise ValueError(violation("members", expected, sorted(shapes) or "none"))
        self.estimators = nn.ModuleList(members)

    def __len__(self) -> int:
        return len(self.estimators)

    @property
    def members(self) -> tuple[M, ...]:
        """The estimators."""
        return cast(tuple[M, ...], tuple(self.estimators))

    @property
    def theta_features(self) -> int:
        """D."""
        return self.members[0].theta_features

    @property
    def x_shape(self) -> torch.Size:
        """Shape of one x."""
        return self.members[0].x_shape


class LikelihoodEnsemble(_Ensemble[NeuralLikelihood]):
    """The average of K learned likelihoods; with K = 1 that likelihood."""

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        """As `NeuralLikelihood.log_prob`: (N,)."""
        return _log_mean_exp(self.members_log_prob(x, theta))

    def log_prob_iid(self, x: Tensor, theta: Tensor) -> Tensor:
        """As `NeuralLikelihood.log_prob_iid`: (N,)."""
        return _log_mean_exp(self.members_log_prob_iid(x, theta))

    def members_log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        """`log_prob` of each member, (K, N)."""
        return torch.stack([member.log_prob(x, theta) for member in self.members])

    def members_log_prob_iid(self, x: Tensor, theta: Tensor) -> Tensor:
        """`log_prob_iid` of each member, (K, N)."""
        return torch.stack([member.log_prob_iid(x, theta) for member in self.members])

    @torch.no_grad()
    def sample(self, theta: Tensor, n: int, *, seed: Seed = None) -> Tensor:
        """`n` draws of x for each theta (N, D), each from a member drawn at random: (n, N, *x_shape)."""
        theta = as_rows("theta", theta, (self.theta_features,))
        rows = theta.repeat(positive_int("n", n), 1)
        with seeded(seed):
            choice = torch.randint(len(self), (len(rows),)).to(rows.device)
            drawn = [member.sample(rows[choice == k], 1)[0] for k, member in enumerate(self.members)]
        order = torch.cat([(choice == k).nonzero()[:, 0] for k in range(len(self))])
        return torch.cat(drawn)[order.argsort()].unflatten(0, (n, len(theta)))


class RatioEnsemble(_Ensemble[NeuralRatio]):
    """The average of K learned ratios; with K = 1 that ratio."""

    def log_ratio(self, theta: Tensor, x: Tensor) -> Tensor:
        """As `NeuralRatio.log_ratio`: (N,)."""
        return _log_mean_exp(self.members_log_ratio(theta, x))

    def log_ratio_iid(self, theta: Tensor, x: Tensor) -> Tensor:
        """As `NeuralRatio.log_ratio_iid`: (N,)."""
        return _log_mean_exp(self.members_log_ratio_iid(theta, x))

    def members_log_ratio(self, theta: Tensor, x: Tensor) -> Tensor:
        """`log_ratio` of each member, (K, N)."""
        return torch.stack([member.log_ratio(theta, x) for member in self.members])

    def members_log_ratio_iid(self, theta: Tensor, x: Tensor) -> Tensor:
        """`log_ratio_iid` of each member, (K, N)."""
        return torch.stack([member.log_ratio_iid(theta, x) for member in self.members])


def _log_mean_exp(values: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else values.logsumexp(0) - math.log(len(values))
