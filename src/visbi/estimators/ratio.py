r"""A learned ratio: log r(theta, x) = log p(x | theta) / p(x), by a classifier (neural ratio estimation).

p(x) is that of the thetas trained on. The classifier learns which theta made x; `ratio_losses` derives what
it then knows. As a function of theta at fixed x the log-ratio is the log-likelihood up to a constant, so it
may be used with any prior where the thetas trained on are dense. Nothing here is inverted: x may be discrete
or an image, and may have an embedding, which is trained with the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visbi.core.checks import one_of, positive_int
from visbi.core.types import Shape, ZScore
from visbi.estimators.networks import RatioClassifier, embedded_features
from visbi.estimators.rows import as_rows, paired, sum_over_trials
from visbi.estimators.standardise import Z_SCORES, Standardise

__all__ = ["NeuralRatio", "RatioConfig"]


@dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """What a `NeuralRatio` is built from.

    Attributes:
        num_blocks: residual blocks of the classifier.
        hidden_features: their width.
        z_score_theta, z_score_x: "none", "independent" or "structured".

    Raises:
        ValueError: an unknown name or a number below 1.
    """

    num_blocks: int
    hidden_features: int
    z_score_theta: ZScore
    z_score_x: ZScore

    def __post_init__(self) -> None:
        positive_int("num_blocks", self.num_blocks)
        positive_int("hidden_features", self.hidden_features)
        one_of("z_score_theta", self.z_score_theta, Z_SCORES)
        one_of("z_score_x", self.z_score_x, Z_SCORES)


class NeuralRatio(nn.Module):
    """log r(theta, x), differentiable in both; `fit_ratio` makes and trains it.

    Args:
        theta_features: D.
        x_shape: shape of one x.
        config: what it is built from.
        embedding: applied to standardised x (N, *x_shape), gives (N, features); None: x flattened.

    >>> config = RatioConfig(num_blocks=1, hidden_features=8, z_score_theta="none", z_score_x="none")
    >>> ratio = NeuralRatio(2, (3,), config)
    >>> ratio.log_ratio(torch.zeros(5, 2), torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(
        self, theta_features: int, x_shape: Shape, config: RatioConfig, embedding: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.theta_features, self.x_shape, self.config = theta_features, torch.Size(x_shape), config
        self.standardise_theta = Standardise((theta_features,), config.z_score_theta)
        self.standardise_x = Standardise(x_shape, config.z_score_x)
        self.embedding = nn.Identity() if embedding is None else embedding
        self.classifier = RatioClassifier(
            theta_features,
            embedded_features(self.embedding, x_shape, "embedding_net"),
            hidden_features=config.hidden_features,
            num_blocks=config.num_blocks,
        )

    def log_ratio(self, theta: Tensor, x: Tensor) -> Tensor:
        """log r(theta_n, x_n) in nats, (N,), for theta (N, D) and x (N, *x_shape).

        A single row of one of them is paired with every row of the other.

        Raises:
            ValueError: shapes that do not fit the estimator or each other.
        """
        paired(theta, x)
        z_theta, z_x = self.standardised(theta, x)
        return self.classifier(z_theta, self.embed(z_x))

    def log_ratio_iid(self, theta: Tensor, x: Tensor) -> Tensor:
        """sum_t log r(theta_n, x_t) in nats, (N,), for theta (N, D) and trials x (T, *x_shape).

        Raises:
            ValueError: shapes that do not fit the estimator.
        """
        z_theta, z_x = self.standardised(theta, x)
        return sum_over_trials(self.classifier, z_theta, self.embed(z_x))

    def fit_standardisation(self, theta: Tensor, x: Tensor) -> "NeuralRatio":
        """Set mean and scale from simulations; returns self."""
        self.standardise_theta.fit(theta)
        self.standardise_x.fit(x)
        return self

    def standardised(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised theta (N, D) and x (T, *x_shape)."""
        z_theta = self.standardise_theta(as_rows("theta", theta, (self.theta_features,)))
        return z_theta, self.standardise_x(as_rows("x", x, self.x_shape))

    def embed(self, z_x: Tensor) -> Tensor:
        """Features (N, F) of standardised x."""
        return self.embedding(z_x).flatten(1)
