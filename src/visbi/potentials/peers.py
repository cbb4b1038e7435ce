r"""Estimators of the `sbi` package behind the methods that our potentials call.

That package batches over samples and conditions: `log_prob(x (S, B, ...), condition=theta (B, D)) -> (S, B)`
for a likelihood, `unnormalized_log_ratio(theta (N, D), x (N, ...)) -> (N,)` for a ratio. Here T trials meet N
thetas, and the trials' values add up. Nothing of the package is imported: what an object can do decides.
"""

from typing import Any

from torch import Tensor, nn

from visbi.core.checks import violation

__all__ = ["as_likelihood", "as_ratio"]


class PeerLikelihood(nn.Module):
    """log p(x | theta) from a conditional density estimator of `sbi`; keeps the estimator, not a copy."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x_n | theta_n), (N,), for x (N, ...) and theta (N, D)."""
        return self.inner.log_prob(x[None], condition=theta)[0]  # type: ignore[operator]

    def log_prob_iid(self, x: Tensor, theta: Tensor) -> Tensor:
        """Sum over the trials x (T, ...), (N,), for theta (N, D)."""
        trials = x[:, None].expand(len(x), len(theta), *x.shape[1:])
        return self.inner.log_prob(trials, condition=theta).sum(0)  # type: ignore[operator]


class PeerRatio(nn.Module):
    """log r(theta, x) from a ratio estimator of `sbi`; keeps the estimator, not a copy."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def log_ratio(self, theta: Tensor, x: Tensor) -> Tensor:
        """log r(theta_n, x_n), (N,), for theta (N, D) and x (N, ...)."""
        return self.inner.unnormalized_log_ratio(theta, x)  # type: ignore[operator]

    def log_ratio_iid(self, theta: Tensor, x: Tensor) -> Tensor:
        """Sum over the trials x (T, ...), (N,), for theta (N, D)."""
        each = self.log_ratio(theta.repeat(len(x), 1), x.repeat_interleave(len(theta), 0))
        return each.reshape(len(x), len(theta)).sum(0)


def as_likelihood(estimator: Any) -> Any:
    """`estimator` with `log_prob(x, theta)` and `log_prob_iid(x, theta)`.

    Raises:
        TypeError: it has neither these nor the methods of a density estimator of `sbi`.
    """
    if hasattr(estimator, "log_prob_iid"):
        return estimator
    if isinstance(estimator, nn.Module) and hasattr(estimator, "log_prob"):
        return PeerLikelihood(estimator)
    expected = "an estimator with log_prob and log_prob_iid, or a conditional density estimator of sbi"
    raise TypeError(violation("likelihood_estimator", expected, type(estimator).__name__))


def as_ratio(estimator: Any) -> Any:
    """`estimator` with `log_ratio(theta, x)` and `log_ratio_iid(theta, x)`.

    Raises:
        TypeError: it has neither these nor the method of a ratio estimator of `sbi`.
    """
    if hasattr(estimator, "log_ratio_iid"):
        return estimator
    if isinstance(estimator, nn.Module) and hasattr(estimator, "unnormalized_log_ratio"):
        return PeerRatio(estimator)
    expected = "an estimator with log_ratio and log_ratio_iid, or a ratio estimator of sbi"
    raise TypeError(violation("ratio_estimator", expected, type(estimator).__name__))
