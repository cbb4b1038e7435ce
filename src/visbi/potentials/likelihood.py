r"""The potential of a learned likelihood: U(theta; x) = sum_t log q(x_t | theta) + log p(theta)."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from visbi.potentials.base import BasePotential, check_theta, check_values, paired
from visbi.potentials.peers import as_likelihood
from visbi.priors.distributions import as_prior
from visbi.priors.transforms import mcmc_transform

__all__ = ["LikelihoodPotential", "likelihood_estimator_based_potential"]


class LikelihoodPotential(BasePotential):
    """Potential from an estimator of the likelihood.

    Args:
        likelihood_estimator: has `log_prob(x (N, ...), theta (N, D)) -> (N,)` and
            `log_prob_iid(x (T, ...), theta (N, D)) -> (N,)`, or is a density estimator of the `sbi` package.
        prior, x_o, device: as for `BasePotential`.
    """

    def __init__(
        self,
        likelihood_estimator: Any,
        prior: Distribution,
        x_o: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.likelihood_estimator = as_likelihood(likelihood_estimator)
        self.likelihood_estimator.eval()
        super().__init__(as_prior(prior), x_o, device)

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        check_theta(theta, self.prior)
        x = self.x_o if x is None else x
        if x_is_iid:
            log_likelihood = self.likelihood_estimator.log_prob_iid(x, theta)
        else:
            theta, x = paired(theta, x)
            log_likelihood = self.likelihood_estimator.log_prob(x, theta)
        return check_values(log_likelihood, len(theta), "likelihood_estimator") + self._log_prior(theta)

    def to(self, device: str | torch.device) -> "LikelihoodPotential":
        self.likelihood_estimator.to(device)
        super().to(device)
        return self


def likelihood_estimator_based_potential(
    likelihood_estimator: Any,
    prior: Distribution,
    x_o: Tensor | None,
    enable_transform: bool = True,
) -> tuple[LikelihoodPotential, Transform]:
    """Potential of a likelihood estimator, and a transform of theta to unconstrained space.

    Args:
        likelihood_estimator: as for `LikelihoodPotential`.
        prior: the prior.
        x_o: the observation, or None.
        enable_transform: False makes the transform the identity.
    """
    potential = LikelihoodPotential(likelihood_estimator, prior, x_o)
    return potential, mcmc_transform(potential.prior, enable_transform=enable_transform)  # type: ignore[arg-type]
