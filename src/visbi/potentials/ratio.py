r"""The potential of a learned ratio: U(theta; x) = sum_t log r(theta, x_t) + log p(theta), with
r = p(x | theta) / p(x) up to a factor that depends on x alone."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from visbi.potentials.base import BasePotential, check_theta, check_values, paired
from visbi.potentials.peers import as_ratio
from visbi.priors.distributions import as_prior
from visbi.priors.transforms import mcmc_transform

__all__ = ["RatioPotential", "ratio_estimator_based_potential"]


class RatioPotential(BasePotential):
    """Potential from an estimator of the likelihood-to-evidence ratio.

    Args:
        ratio_estimator: has `log_ratio(theta (N, D), x (N, ...)) -> (N,)` and
            `log_ratio_iid(theta (N, D), x (T, ...)) -> (N,)`, or is a ratio estimator of the `sbi` package.
        prior, x_o, device: as for `BasePotential`.
    """

    def __init__(
        self,
        ratio_estimator: Any,
        prior: Distribution,
        x_o: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.ratio_estimator = as_ratio(ratio_estimator)
        self.ratio_estimator.eval()
        super().__init__(as_prior(prior), x_o, device)

    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        check_theta(theta, self.prior)
        x = self.x_o if x is None else x
        if x_is_iid:
            log_ratio = self.ratio_estimator.log_ratio_iid(theta, x)
        else:
            theta, x = paired(theta, x)
            log_ratio = self.ratio_estimator.log_ratio(theta, x)
        return check_values(log_ratio, len(theta), "ratio_estimator") + self._log_prior(theta)

    def to(self, device: str | torch.device) -> "RatioPotential":
        self.ratio_estimator.to(device)
        super().to(device)
        return self


def ratio_estimator_based_potential(
    ratio_estimator: Any,
    prior: Distribution,
    x_o: Tensor | None,
    enable_transform: bool = True,
) -> tuple[RatioPotential, Transform]:
    """Potential of a ratio estimator, and a transform of theta to unconstrained space.

    Args:
        ratio_estimator: as for `RatioPotential`.
        prior: the prior.
        x_o: the observation, or None.
        enable_transform: False makes the transform the identity.
    """
    potential = RatioPotential(ratio_estimator, prior, x_o)
    return potential, mcmc_transform(potential.prior, enable_transform=enable_transform)  # type: ignore[arg-type]
