"""From a prior to the blocks of its coordinates: in closed form, or standardised with draws."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Gamma,
    Independent,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    Transform,
    Uniform,
)

from visbi.core.devices import map_tensors
from visbi.core.types import ZScore
from visbi.priors.blocks import (
    AffineBlock,
    BijectionBlock,
    Block,
    CdfBlock,
    GammaBlock,
    UniformBlock,
    in_double,
)
from visbi.priors.distributions import MultipleIndependent
from visbi.priors.supports import bijection_to, support_of

__all__ = ["block_of_transform", "blocks_of_prior"]

_EIGENVALUE = 1e-9  # added to a correlation matrix so that it has a Cholesky factor
_REACH = 4.0  # standard deviations at which a draw stops counting for correlations


def blocks_of_prior(prior: Distribution, draws: Tensor, z_score: ZScore) -> list[Block]:
    """One block per independent factor of the prior.

    Args:
        prior: event_shape (D,).
        draws: of the prior, (N, D), where a factor has no closed form.
        z_score: as for `coordinates`.
    """
    factors = _factors(prior)
    if factors:
        parts = draws.split([f.event_shape[0] for f in factors], -1)
        return [b for f, part in zip(factors, parts, strict=True) for b in blocks_of_prior(f, part, z_score)]
    block = None if z_score == "none" else _closed_form(prior, z_score)
    return [_standardised(bijection_to(support_of(prior)), draws, z_score) if block is None else block]


def block_of_transform(transform: Transform, draws: Tensor, z_score: ZScore) -> Block:
    """The block of a map of one's own from the support to R^d."""
    return _standardised(transform.inv, draws, z_score)


def _factors(prior: Any) -> list[Distribution]:
    """The factors of a product, each with event_shape (D_i,); none if it is no product."""
    # the sbi package has a product of the same name and make
    if not (isinstance(prior, MultipleIndependent) or type(prior).__name__ == "MultipleIndependent"):
        return []
    return [d if len(d.event_shape) else Independent(d, len(d.batch_shape)) for d in prior.dists]


def _closed_form(prior: Distribution, z_score: ZScore) -> Block | None:
    """The block that makes z exactly standard normal, where the prior is one we know how to invert."""
    while isinstance(prior, Independent) and prior.reinterpreted_batch_ndims == 0:
        prior = prior.base_dist
    if isinstance(prior, MultivariateNormal):
        tril = prior.scale_tril if z_score == "structured" else prior.variance.sqrt().diag()
        return AffineBlock(prior.mean, tril)
    if not isinstance(prior, Independent):
        return None
    base: Any = prior.base_dist
    if isinstance(base, Normal):
        return AffineBlock(base.loc, base.scale.diag())
    if isinstance(base, LogNormal):
        return AffineBlock(base.loc, base.scale.diag(), exp=True)
    if isinstance(base, Uniform):
        return UniformBlock(base.low, base.high)
    if isinstance(base, Gamma | InverseGamma):
        return GammaBlock(base.concentration, base.rate, isinstance(base, InverseGamma))
    return CdfBlock(base) if _invertible(base) else None


def _invertible(base: Any) -> bool:
    """Whether the univariate distributions have a cdf and an icdf that undo each other."""
    u = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64, device=_device_of(base))[:, None]
    try:
        dist = in_double(base)
        back = dist.cdf(dist.icdf(u.expand(-1, *base.batch_shape)))
    except (NotImplementedError, AttributeError, RuntimeError, ValueError):
        return False
    return bool(((back - u).abs() < 1e-7 + 1e-3 * torch.minimum(u, 1 - u)).all())


def _device_of(dist: Distribution) -> torch.device:
    found: list[torch.device] = []
    map_tensors(dist, lambda t: (found.append(t.device), t)[1])
    return found[0] if found else torch.device("cpu")


def _standardised(link: Transform, draws: Tensor, z_score: ZScore) -> Block:
    """The block of a bijection; location and scale from prior draws.

    Quantiles give the scale, so that heavy tails do not set it.
    """
    dim = draws.shape[-1]
    block = BijectionBlock(link, dim, link.inverse_shape(torch.Size([dim]))[-1])
    if z_score == "none":
        return block
    z, _ = block.to_z(draws.double())
    z = z[torch.isfinite(z).all(-1)]
    if len(z) < len(draws) // 2:
        return block
    probabilities = torch.tensor([0.16, 0.5, 0.84], dtype=z.dtype, device=z.device)
    q16, q50, q84 = torch.quantile(z, probabilities, dim=0)
    scale = ((q84 - q16) / 2).clamp_min(1e-12)
    tril = scale[:, None] * _correlation((z - q50) / scale) if z_score == "structured" else scale.diag()
    block.standardise(q50, tril)
    return block


def _correlation(u: Tensor) -> Tensor:
    """Cholesky factor (d, d) of the covariance of u (N, d)."""
    covariance = torch.cov(u.clamp(-_REACH, _REACH).mT).reshape(u.shape[-1], u.shape[-1])
    return torch.linalg.cholesky(covariance + _EIGENVALUE * torch.eye(len(covariance)).to(covariance))
