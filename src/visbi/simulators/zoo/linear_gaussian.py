"""The linear Gaussian model, where everything is known: posterior, evidence, any dimension.

    theta ~ N(0, s_0^2 I),   x = A theta + s eps,   eps ~ N(0, I)

    theta | x ~ N(C A^T x / s^2, C),   C = (A^T A / s^2 + I / s_0^2)^-1,   x ~ N(0, s_0^2 A A^T + s^2 I)

Source: any textbook; e.g. C. Bishop, "Pattern Recognition and Machine Learning", 2006, section 2.3.3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from visbi.core.checks import finite_tensor, positive, positive_int, violation
from visbi.simulators.zoo.task import Task, check_theta, paired

__all__ = ["LinearGaussian", "task"]


def task(
    dim: int = 2,
    *,
    matrix: Tensor | None = None,
    noise_scale: float = 0.5,
    prior_scale: float = 1.0,
    x_o: Tensor | None = None,
) -> Task:
    """The linear Gaussian problem.

    Args:
        dim: number of parameters D.
        matrix: A, (K, D); None for ones on the diagonal and halves below it, so that parameters correlate.
        noise_scale: s.
        prior_scale: s_0.
        x_o: the observation, (K,); None for K numbers from -1 to 1.

    Raises:
        ValueError: a scale that is not positive, or shapes that do not fit.

    >>> problem = task(3)
    >>> problem.posterior(problem.x_o).covariance_matrix.shape
    torch.Size([3, 3])
    """
    dim = positive_int("dim", dim)
    if matrix is None:
        matrix = torch.eye(dim) + 0.5 * torch.eye(dim).roll(1, 0).tril(-1)
    matrix = finite_tensor("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[1] != dim:
        raise ValueError(violation("matrix", f"shape (K, {dim})", f"{tuple(matrix.shape)}"))
    x_o = torch.linspace(-1, 1, len(matrix), dtype=matrix.dtype) if x_o is None else finite_tensor("x_o", x_o)
    if x_o.shape != matrix.shape[:1]:
        raise ValueError(violation("x_o", f"shape ({len(matrix)},)", f"{tuple(x_o.shape)}"))
    model = LinearGaussian(matrix, positive("noise_scale", noise_scale), positive("prior_scale", prior_scale))
    return Task(
        name=f"linear Gaussian, D = {dim}",
        theta_names=tuple(f"theta_{i + 1}" for i in range(dim)),
        prior=model.prior,
        simulator=model.simulate,
        x_o=x_o,
        log_likelihood=model.log_likelihood,
        posterior=model.posterior,
        log_evidence=model.log_evidence,
    )


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """The model and its answers; computed in float64, returned in the dtype of `matrix`.

    Attributes:
        matrix: A, (K, D).
        noise_scale: s.
        prior_scale: s_0.
    """

    matrix: Tensor
    noise_scale: float
    prior_scale: float

    @property
    def prior(self) -> Independent:
        """N(0, s_0^2 I)."""
        zeros = self.matrix.new_zeros(self.matrix.shape[1])
        return Independent(Normal(zeros, self.prior_scale), 1)

    @torch.no_grad()
    def simulate(self, theta: Tensor) -> Tensor:
        """theta (N, D) -> x (N, K)."""
        check_theta(theta, self.matrix.shape[1])
        mean = self._mean(theta)
        return mean + self.noise_scale * torch.randn_like(mean)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x | theta), (N,), for theta (N, D) and x (K,) or (N, K)."""
        width, dim = self.matrix.shape
        theta, x = paired(theta, x, dim, width)
        return Normal(self._mean(theta), self.noise_scale).log_prob(x).sum(-1)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """theta | x for x (K,), or a batch of posteriors for x (M, K)."""
        matrix = self.matrix.double()
        precision = matrix.T @ matrix / self.noise_scale**2
        precision = precision + torch.eye(len(precision), dtype=torch.float64) / self.prior_scale**2
        covariance = torch.linalg.inv(precision)
        mean = x.double() @ matrix @ covariance / self.noise_scale**2
        dtype = self.matrix.dtype
        return MultivariateNormal(mean.to(dtype), covariance_matrix=covariance.to(dtype))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) for x (K,), or (M,) of them for x (M, K)."""
        matrix = self.matrix.double()
        covariance = self.prior_scale**2 * matrix @ matrix.T
        covariance = covariance + self.noise_scale**2 * torch.eye(len(covariance), dtype=torch.float64)
        zeros = matrix.new_zeros(len(covariance))
        return MultivariateNormal(zeros, covariance).log_prob(x.double()).to(self.matrix.dtype)

    def _mean(self, theta: Tensor) -> Tensor:
        return theta @ self.matrix.T.to(theta.dtype)
