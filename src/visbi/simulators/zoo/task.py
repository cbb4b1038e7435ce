"""What every simulator of the zoo comes with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.core.types import Shape

__all__ = ["KnownPosterior", "Task", "check_theta", "paired"]


class KnownPosterior(Protocol):
    """p(theta | x) for one x, exact."""

    def sample(self, sample_shape: Shape = (), /) -> Tensor:
        """Draws, (*sample_shape, D)."""
        ...

    def log_prob(self, value: Tensor, /) -> Tensor:
        """Normalised log-density of theta (N, D), (N,)."""
        ...


@dataclass(frozen=True, eq=False)
class Task:
    """An inference problem: prior, simulator, observation, and what is known of the answer.

    Attributes:
        name: in words.
        theta_names: one for each parameter.
        prior: distribution with `event_shape` (D,).
        simulator: theta (N, D) -> x (N, K), without gradient; random under torch's global generator.
        x_o: the observation, (K,).
        log_likelihood: theta (N, D), x (K,) or (N, K) -> log p(x | theta), (N,), differentiable in theta;
            None where it is unknown.
        posterior: x (K,) -> the exact posterior; None where it is unknown.
        log_evidence: x (K,) -> log p(x), (); None where it is unknown.

    Raises:
        ValueError: not one name for each parameter.
    """

    name: str
    theta_names: tuple[str, ...]
    prior: Distribution
    simulator: Callable[[Tensor], Tensor]
    x_o: Tensor
    log_likelihood: Callable[[Tensor, Tensor], Tensor] | None = None
    posterior: Callable[[Tensor], KnownPosterior] | None = None
    log_evidence: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if tuple(self.prior.event_shape) != (len(self.theta_names),):
            expected = f"one name for each parameter, {tuple(self.prior.event_shape)}"
            raise ValueError(violation("theta_names", expected, len(self.theta_names)))

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        return len(self.theta_names)


def check_theta(theta: Tensor, dim: int) -> None:
    """Raise ValueError unless theta is (N, dim)."""
    if theta.ndim != 2 or theta.shape[1] != dim:
        raise ValueError(violation("theta", f"shape (N, {dim})", f"{tuple(theta.shape)}"))


def paired(theta: Tensor, x: Tensor, dim: int, width: int) -> tuple[Tensor, Tensor]:
    """theta (N, D) and x (N, K), from x (K,), (1, K) or (N, K).

    Raises:
        ValueError: other shapes.
    """
    check_theta(theta, dim)
    if x.ndim not in (1, 2) or x.shape[-1] != width or (x.ndim == 2 and len(x) not in (1, len(theta))):
        expected = f"shape ({width},) or ({len(theta)}, {width})"
        raise ValueError(violation("x", expected, f"{tuple(x.shape)}"))
    return theta, x.expand(len(theta), width)
