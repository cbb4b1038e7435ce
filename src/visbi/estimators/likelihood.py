r"""A learned likelihood: q(x | theta), a conditional flow trained on simulations.

Neural likelihood estimation, that is, maximum likelihood on pairs (theta_i, x_i),

    min_w  -1/n sum_i log q_w(x_i | theta_i),

whose minimum over all q is p(x | theta) wherever the thetas are dense, whatever their distribution
(Papamakarios, Sterratt, Murray 2019). With z_x and z_theta the standardised values,

    log q(x | theta) = log q_flow(z_x | z_theta) + log|det dz_x/dx|.

The flow must stay invertible in x, so x itself has no embedding; theta may have one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visbi.core.checks import one_of, positive_int
from visbi.core.random import seeded
from visbi.core.types import Seed, Shape, ZScore
from visbi.estimators.networks import FLOWS, ConditionalFlow, embedded_features
from visbi.estimators.rows import as_rows, paired, sum_over_trials
from visbi.estimators.standardise import Z_SCORES, Standardise

__all__ = ["LikelihoodConfig", "NeuralLikelihood"]


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """What a `NeuralLikelihood` is built from.

    Attributes:
        flow: "maf" or "nsf".
        num_transforms: layers of the flow.
        hidden_features: width of its networks.
        z_score_theta, z_score_x: "none", "independent" or "structured".

    Raises:
        ValueError: an unknown name or a number below 1.
    """

    flow: str
    num_transforms: int
    hidden_features: int
    z_score_theta: ZScore
    z_score_x: ZScore

    def __post_init__(self) -> None:
        one_of("flow", self.flow, FLOWS)
        positive_int("num_transforms", self.num_transforms)
        positive_int("hidden_features", self.hidden_features)
        one_of("z_score_theta", self.z_score_theta, Z_SCORES)
        one_of("z_score_x", self.z_score_x, Z_SCORES)


class NeuralLikelihood(nn.Module):
    """q(x | theta), differentiable in both; `fit_likelihood` makes and trains it.

    Args:
        theta_features: D.
        x_shape: shape of one x; flattened for the flow.
        config: what it is built from.
        theta_embedding: applied to standardised theta (N, D), gives (N, features); None: theta as it is.

    >>> config = LikelihoodConfig(
    ...     flow="maf", num_transforms=2, hidden_features=8, z_score_theta="none", z_score_x="none"
    ... )
    >>> likelihood = NeuralLikelihood(2, (3,), config)
    >>> likelihood.log_prob(torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([5])
    >>> likelihood.sample(torch.zeros(5, 2), 4).shape
    torch.Size([4, 5, 3])
    """

    def __init__(
        self,
        theta_features: int,
        x_shape: Shape,
        config: LikelihoodConfig,
        theta_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.theta_features, self.x_shape, self.config = theta_features, torch.Size(x_shape), config
        self.standardise_theta = Standardise((theta_features,), config.z_score_theta)
        self.standardise_x = Standardise(x_shape, config.z_score_x)
        self.theta_embedding = nn.Identity() if theta_embedding is None else theta_embedding
        self.flow = ConditionalFlow(
            self.x_shape.numel(),
            embedded_features(self.theta_embedding, (theta_features,), "theta_embedding_net"),
            flow=config.flow,
            num_transforms=config.num_transforms,
            hidden_features=config.hidden_features,
        )

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        """log q(x_n | theta_n) in nats, (N,), for x (N, *x_shape) and theta (N, D).

        A single row of one of them is paired with every row of the other.

        Raises:
            ValueError: shapes that do not fit the estimator or each other.
        """
        paired(theta, x)
        z_theta, z_x = self.standardised(theta, x)
        return self.standardised_log_prob(z_theta, z_x)

    def log_prob_iid(self, x: Tensor, theta: Tensor) -> Tensor:
        """sum_t log q(x_t | theta_n) in nats, (N,), for trials x (T, *x_shape) and theta (N, D).

        Raises:
            ValueError: shapes that do not fit the estimator.
        """
        z_theta, z_x = self.standardised(theta, x)
        context = self.flow.context(self._condition(z_theta))

        def pairwise(context: Tensor, z_x: Tensor) -> Tensor:
            return self.flow.log_prob_in_context(z_x, context)

        summed = sum_over_trials(pairwise, context, z_x.flatten(1))
        return summed + x.shape[0] * self.standardise_x.log_abs_det

    @torch.no_grad()
    def sample(self, theta: Tensor, n: int, *, seed: Seed = None) -> Tensor:
        """`n` draws of x for each theta (N, D): (n, N, *x_shape)."""
        z_theta = self.standardise_theta(as_rows("theta", theta, (self.theta_features,)))
        condition = self._condition(z_theta)
        with seeded(seed):
            z_x = self.flow.sample(condition.expand(positive_int("n", n), *condition.shape))
        return self.standardise_x.inverse(z_x.unflatten(-1, self.x_shape))

    def fit_standardisation(self, theta: Tensor, x: Tensor) -> "NeuralLikelihood":
        """Set mean and scale from simulations; returns self."""
        self.standardise_theta.fit(theta)
        self.standardise_x.fit(x)
        return self

    def standardised(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised theta (N, D) and x (T, *x_shape): what `standardised_log_prob` takes."""
        z_theta = self.standardise_theta(as_rows("theta", theta, (self.theta_features,)))
        return z_theta, self.standardise_x(as_rows("x", x, self.x_shape))

    def standardised_log_prob(self, z_theta: Tensor, z_x: Tensor) -> Tensor:
        """`log_prob` of values that are standardised already; the training loss is its negative."""
        log_q = self.flow.log_prob(z_x.flatten(1), self._condition(z_theta))
        return log_q + self.standardise_x.log_abs_det

    def _condition(self, z_theta: Tensor) -> Tensor:
        return self.theta_embedding(z_theta).flatten(1)
