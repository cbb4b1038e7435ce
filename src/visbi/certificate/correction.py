"""Draws of q with their weights: what a certificate rests on, and what corrected draws are taken from.

Corrected draws are resampled with Pareto-smoothed weights (Vehtari et al. 2024), systematically, so that no
draw comes twice unless its weight times their number is above one; and along an order in which neighbours are
alike, so that every part of the posterior, and every mode, gets its share of them, rounded up or down.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from visbi.certificate.weights import effective_sample_size, pareto_smooth, resample
from visbi.core.checks import violation

__all__ = ["WeightedDraws"]

_LARGEST = 2**20
_HALVINGS = 4  # of the draws, for an order in which they are alike
_SPARE = 2.0  # draws in effect for each corrected one


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of q.

    Attributes:
        theta: (N, D).
        log_p: (N,) the potential, float64. log_q: (N,), float64.
    """

    theta: Tensor
    log_p: Tensor
    log_q: Tensor

    @cached_property
    def log_weights(self) -> Tensor:
        """(N,) logarithms of smoothed weights that add up to one; uniform where none is finite."""
        return pareto_smooth(self.log_p - self.log_q)[0]

    def resampled(self, n: int) -> Tensor:
        """n draws of the posterior, (n, D), as far as the weights can mend q.

        Raises:
            ValueError: log p - log q is finite at no draw.

        >>> theta = torch.linspace(-3, 3, 101)[:, None]
        >>> draws = WeightedDraws(theta, -50.0 * theta[:, 0].square(), torch.zeros(101))
        >>> bool(draws.resampled(10).abs().max() < 1)
        True
        """
        return self.theta[self.chosen(n)]

    def chosen(self, n: int) -> Tensor:
        """(n,) indices of such draws.

        Raises:
            ValueError: as `resampled`.
        """
        if not bool(torch.isfinite(self.log_p - self.log_q).any()):
            raise ValueError(violation("log_p", "a finite value at one draw at least", "none"))
        order = self._alike
        return order[resample(self.log_weights[order], n)]

    @cached_property
    def _alike(self) -> Tensor:
        """(N,) an order of the draws: halves, quarters ..., cut where they are wide; the last are sorted."""
        theta = self.theta.detach()
        scale = theta.std(0, correction=0).nan_to_num(1.0, 1.0).clamp_min(torch.finfo(theta.dtype).tiny)

        def widest(part: Tensor) -> Tensor:
            each = theta[part]
            return each[:, (each.std(0, correction=0) / scale).nan_to_num(0.0).argmax()]

        parts = [torch.arange(len(theta), device=theta.device)]
        for _ in range(_HALVINGS):
            halves = []
            for part in parts:
                along = widest(part)
                below = along <= along.median()
                halves += [part[below], part[~below]]
            parts = [half for half in halves if len(half)]
        return torch.cat([part[widest(part).argsort()] for part in parts])

    @cached_property
    def n_effective(self) -> float:
        """Effective sample size."""
        return effective_sample_size(self.log_p - self.log_q)

    def needed(self, n: int) -> int:
        """How many draws of q make n corrected ones that hardly ever coincide; a million at most."""
        share = self.n_effective / len(self.theta)
        return min(math.ceil(_SPARE * n / max(share, 1e-12)), _LARGEST)

    def first(self, n: int) -> "WeightedDraws":
        """The first n of them."""
        return WeightedDraws(self.theta[:n], self.log_p[:n], self.log_q[:n])

    def with_(self, other: "WeightedDraws") -> "WeightedDraws":
        """These and others of the same q."""
        pairs = zip(
            (self.theta, self.log_p, self.log_q), (other.theta, other.log_p, other.log_q), strict=True
        )
        return WeightedDraws(*(torch.cat(pair) for pair in pairs))

    def to(self, device: str | torch.device) -> "WeightedDraws":
        """These on `device`."""
        return WeightedDraws(self.theta.to(device), self.log_p.to(device), self.log_q.to(device))
