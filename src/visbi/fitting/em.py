r"""Weighted expectation maximisation for mixtures of Gaussians, many at a time.

It minimises the forward KL to what the weighted points represent (Cappé, Douc, Guillin, Marin, Robert:
Adaptive importance sampling in general mixture classes. 2008). A component's covariance is shrunk towards its
own diagonal and widened by what its effective number of points n leaves uncertain:

    S_k <- (1 + (d + 1)/n) [ n S_k + (d + 2) diag(S_k) ] / (n + d + 2).

In few dimensions log-densities are polynomials in z, and so the E step is one matrix product, and another one
gives all moments of the M step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.logs import exp_
from visbi.families.gaussians import POLYNOMIAL_DIMENSIONS, Mixture, monomials

__all__ = ["expectation_maximisation", "maximise"]

_COINCIDE = 1e-12  # sd, relative to where it is, at which a component sits on copies of a single point


def expectation_maximisation(
    mixture: Mixture, z: Tensor, weights: Tensor, *, max_iters: int = 20, tol: float = 2e-3
) -> Mixture:
    """The mixture after EM on weighted points.

    Args:
        mixture: the start. A component that is left with too few points to have a covariance loses its
            weight.
        z: (F, N, d). weights: (F, N), normalised.
        max_iters: most iterations; fewer if the log-likelihood gains less than `tol` nats.

    >>> z = torch.cat([torch.randn(1, 300, 1) - 5, torch.randn(1, 100, 1) + 5], 1).double()
    >>> loc = torch.tensor([[[-1.0], [1.0]]], dtype=torch.float64)
    >>> start = Mixture.of(torch.zeros(1, 2).double(), loc, torch.ones(1, 2, 1, 1).double())
    >>> even = torch.full((1, 400), 1 / 400, dtype=torch.float64)
    >>> expectation_maximisation(start, z, even).log_weights.exp()
    tensor([[0.75, 0.25]], dtype=torch.float64)
    """
    before = -math.inf
    known = Moments.of(z, weights)
    for _ in range(max_iters):
        polynomial = None if known is None else mixture.about(known.centre)
        if known is None or polynomial is None:
            joint = mixture.by_component(z)
        else:
            joint = polynomial @ known.monomials.mT
        top = joint.amax(1, keepdim=True)
        share = exp_(joint.sub_(top))
        total = share.sum(1, keepdim=True)
        score = float((weights * (top + total.log())[:, 0]).sum(1).mean())
        if score - before < tol:
            break
        before = score
        share.mul_(weights[:, None] / total)
        mixture = maximise(mixture, z, share, None if polynomial is None else known)
    return mixture


@dataclass(frozen=True)
class Moments:
    """What the moments of shares of points follow from by one product.

    Attributes:
        centre: (F, 1, d). monomials: (F, N, P) of the points about it.
    """

    centre: Tensor
    monomials: Tensor

    @staticmethod
    def of(z: Tensor, weights: Tensor) -> "Moments | None":
        """Of points (F, N, d) about their mean; None in many dimensions."""
        if z.shape[-1] > POLYNOMIAL_DIMENSIONS:
            return None
        centre = (weights[..., None] * z).sum(1, keepdim=True)
        return Moments(centre, monomials(z - centre))

    def mean_and_covariance(self, share: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """(F, K, d) and (F, K, d, d) of shares (F, K, N) with sums (F, K, 1)."""
        d = self.centre.shape[-1]
        moments = share @ self.monomials / mass
        mean, second = moments[..., 1 : d + 1], moments[..., d + 1 :]
        i, j = torch.triu_indices(d, d, device=mean.device)
        square = mean.new_empty(*mean.shape, d)
        square[..., i, j] = square[..., j, i] = second
        return self.centre + mean, square - mean[..., None] * mean[..., None, :]


def _mean_and_covariance(z: Tensor, share: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the points themselves, where rounding would show or dimensions are many."""
    loc = share @ z / mass
    cov = loc.new_empty(*loc.shape, loc.shape[-1])
    for k in range(share.shape[1]):
        gap = z - loc[:, k, None]
        cov[:, k] = (share[:, k, :, None] * gap).mT @ gap / mass[:, k, :, None]
    return loc, cov


def maximise(mixture: Mixture, z: Tensor, share: Tensor, known: Moments | None = None) -> Mixture:
    """One M step from responsibilities times weights.

    Args:
        mixture: what a component that is left without points keeps, with weight zero; all of it where no
            component has any.
        z: (F, N, d). share: (F, K, N), adding up to the points' weights over K.
        known: what moments of z follow from, if it is there already.

    Returns:
        The mixture with the moments of each component's share, shrunk as the module says.
    """
    d = z.shape[-1]
    mass = share.sum(-1)
    points = mass.square() / share.square().sum(-1).clamp_min(1e-300)
    alive = (points > d + 1.5) & (mass > 1e-6)
    safe = mass.clamp_min(1e-300)[..., None]
    loc, cov = (
        _mean_and_covariance(z, share, safe) if known is None else known.mean_and_covariance(share, safe)
    )
    n = points[..., None, None].clamp_min(d + 2.0)
    own = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300))
    cov = (1 + (d + 1) / n) * (n * cov + (d + 2) * own) / (n + d + 2)
    tril, info = torch.linalg.cholesky_ex(cov)
    apart = cov.diagonal(dim1=-2, dim2=-1).sqrt() > _COINCIDE * (1 + loc.abs())
    alive &= (info == 0) & apart.all(-1)
    log_weights = torch.where(alive, mass.clamp_min(1e-300).log(), -torch.inf)
    lost = ~alive.any(1, keepdim=True)  # nothing to go on: as it was
    return Mixture(
        torch.where(lost, mixture.log_weights, torch.log_softmax(log_weights, -1)),
        torch.where(alive[..., None], loc, mixture.loc),
        torch.where(alive[..., None, None], tril, mixture.tril),
    )
