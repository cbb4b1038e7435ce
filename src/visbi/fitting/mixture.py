"""What is done to the mixtures of Gaussians of a fit, and the neighbourhoods that they start from."""

import math

import torch
from torch import Tensor

from visbi.core.rows import picked, trues_first
from visbi.families.gaussians import Mixture, cholesky

__all__ = [
    "ALIKE",
    "bhattacharyya",
    "defence",
    "defended",
    "local_covariances",
    "merged",
    "moments",
    "spread_out",
]

_DEFENCE = ((2.5, 0.08), (6.0, 0.02))  # radii in spreads of the typical shell, and shares
_LEAST = 1e-8  # smallest variance of a neighbourhood, relative to that of all points
ALIKE = 0.5
"""Bhattacharyya distance below which two components are one."""


def defence(dim: int) -> tuple[tuple[float, float], ...]:
    """Factors by which part of a proposal is spread wider, and the shares of its mass.

    The norm of a standard normal vector lies near sqrt(d) with a spread of sqrt(1/2): a factor of
    1 + r / sqrt(2 d) moves that shell outwards by r of its spreads, in any dimension.

    >>> defence(2)
    ((2.25, 0.08), (4.0, 0.02))
    """
    return tuple((1 + radius / math.sqrt(2 * dim), share) for radius, share in _DEFENCE)


def defended(q: Mixture) -> Mixture:
    """q with a tenth of its mass spread wider, so that weights at its edge stay bounded.

    The defensive mixture of Hesterberg (1995) with q's own shape for the wide part; see `defence`.

    >>> loc, cov = torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None, None]
    >>> defended(Mixture.of(torch.zeros(1, 1).double(), loc, cov)).log_weights.exp()
    tensor([[0.9016, 0.0784, 0.0200]], dtype=torch.float64)
    """
    wide = q
    for factor, share in defence(q.loc.shape[-1]):
        wide = wide.with_(q.widened(factor**2), share)
    return wide


def merged(mixture: Mixture, score: Tensor, most: int) -> Mixture:
    """At most `most` unlike components of each mixture, best `score` first, each with its own weight.

    Two are alike if their Bhattacharyya distance is below `ALIKE`:
    (m - n)' [(S + T) / 2]^-1 (m - n) / 8 + log(|(S + T) / 2| / sqrt(|S| |T|)) / 2.

    Args:
        mixture: F mixtures of K components; those without weight are left out.
        score: (F, K). most: at least 1.

    >>> loc = torch.tensor([[[0.0], [0.1], [9.0]]], dtype=torch.float64)
    >>> q = Mixture.of(torch.zeros(1, 3).double(), loc, torch.ones(1, 3, 1, 1).double())
    >>> merged(q, torch.tensor([[1.0, 2.0, 3.0]]), 5).loc.flatten().tolist()
    [9.0, 0.1]
    """
    alive = torch.isfinite(mixture.log_weights)
    order = torch.where(alive, score, -torch.inf).argsort(1, descending=True)
    distance = bhattacharyya(mixture)
    kept = torch.zeros_like(alive)
    fit = torch.arange(len(order), device=order.device)
    for k in order.T:
        alike = ((distance[fit, k] < ALIKE) & kept).any(1)
        kept[fit, k] = alive[fit, k] & ~alike & (kept.sum(1) < most)
    front = trues_first(kept.gather(1, order))
    chosen = order.gather(1, front)[:, : int(kept.sum(1).max())]
    log_weights = torch.where(kept.gather(1, chosen), mixture.log_weights.gather(1, chosen), -torch.inf)
    return Mixture(
        torch.log_softmax(log_weights, -1),
        mixture.loc[fit[:, None], chosen],
        mixture.tril[fit[:, None], chosen],
    )


def bhattacharyya(mixture: Mixture) -> Tensor:
    """(F, K, K) distances between the components of each mixture."""
    cov = mixture.cov
    log_det = 2 * mixture.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    both = cholesky(0.5 * (cov[:, :, None] + cov[:, None]))
    gap = mixture.loc[:, :, None] - mixture.loc[:, None]
    between = torch.linalg.solve_triangular(both, gap[..., None], upper=False)[..., 0].square().sum(-1)
    middle = 2 * both.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return between / 8 + 0.5 * (middle - 0.5 * (log_det[:, :, None] + log_det[:, None]))


def moments(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means (F, 1, d) and covariances (F, d, d) of points z (F, N, d) with weights (F, N) that add up to one.

    >>> mean, cov = moments(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[0.75, 0.25]]))
    >>> float(mean), float(cov)
    (1.0, 3.0)
    """
    mean = (weights[..., None] * z).sum(1, keepdim=True)
    centred = z - mean
    return mean, (weights[..., None] * centred).mT @ centred


def spread_out(z: Tensor, weights: Tensor, n: int) -> Tensor:
    """Indices (F, n) of points z (F, N, d), spread out.

    Each is drawn by its weight times the squared distance to the nearest one drawn before, in units of the
    points' own covariance (k-means++; Arthur, Vassilvitskii 2007). Where no other point of positive weight
    lies apart from those drawn, some come twice.

    Args:
        z: (F, N, d). weights: (F, N), adding up to one.
        n: how many of each fit.

    >>> z = torch.tensor([[[0.0], [0.0], [5.0]]], dtype=torch.float64)
    >>> sorted(z[0, spread_out(z, torch.full((1, 3), 1 / 3).double(), 2)[0], 0].tolist())
    [0.0, 5.0]
    """
    mean, cov = moments(z, weights)
    y = torch.linalg.solve_triangular(cholesky(cov), (z - mean).mT, upper=False).mT
    fit = torch.arange(len(z), device=z.device)
    chosen = [torch.multinomial(weights, 1)[:, 0]]
    nearest = (y - y[fit, chosen[0]][:, None]).square().sum(-1)
    for _ in range(n - 1):
        chance = weights * nearest
        apart = chance.sum(1, keepdim=True) > 0
        chosen.append(torch.multinomial(torch.where(apart, chance, weights), 1)[:, 0])
        nearest = torch.minimum(nearest, (y - y[fit, chosen[-1]][:, None]).square().sum(-1))
    return torch.stack(chosen, 1)


def local_covariances(
    z: Tensor, centres: Tensor, neighbours: int | Tensor, weights: Tensor | None = None
) -> Tensor:
    """Covariance of each centre's nearest points of its fit: (F, C, d, d).

    Nearness is judged in units of the points' own covariance first, then once more in units of the
    covariances so found: a narrow ridge gets narrow neighbourhoods.

    Args:
        z: (F, N, d), N >= 2. centres: (F, C, d).
        neighbours: how many, or how many of each fit (F,); all of the points where there are fewer.
        weights: (F, N); points without weight do not count. None: all count.

    >>> local_covariances(torch.randn(1, 50, 2).double(), torch.zeros(1, 3, 2).double(), 20).shape
    torch.Size([1, 3, 2, 2])
    """
    n, d = z.shape[1:]
    counts = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if weights is None else weights > 0
    wanted = torch.minimum(torch.as_tensor(neighbours, device=z.device).expand(len(z)), counts.sum(1))
    rank = torch.arange(int(wanted.max()), device=z.device)
    there = (rank < wanted[:, None]).to(z)[:, None, :, None]  # (F, 1, neighbours, 1)
    cov = moments(z, counts.to(z) / counts.sum(1, keepdim=True))[1] * (n / max(n - 1, 1))
    least = _LEAST * cov.diagonal(dim1=-2, dim2=-1)[:, None]  # where points lie on top of each other
    size = wanted.to(z)[:, None, None, None]
    cov = cov[:, None].expand(-1, centres.shape[1], d, d)
    for _ in range(2):
        about = Mixture.of(torch.zeros(centres.shape[:2]).to(z), centres, cov)
        # of one Gaussian, the nearer the denser
        density = torch.where(counts[:, None], about.by_component(z), -torch.inf)
        near = density.topk(len(rank)).indices
        points = picked(z, near.flatten(1)).unflatten(1, near.shape[1:]) - centres[:, :, None]
        points = there * (points - (there * points).sum(2, keepdim=True) / size)
        local = points.mT @ points / (size - 1).clamp_min(1)
        own = torch.diag_embed(local.diagonal(dim1=-2, dim2=-1) + least)
        cov = (size * local + (d + 2) * own) / (size + d + 2)
    return cov
