r"""Points that accuse q of being much too low: a tail of what it has, or the slope of what it lacks?

A draw of the prior at which ell - log q is far above log Z may lie in a tail that q has cut off, and then
hardly any mass is there; or on the slope of a narrow mode that no particle has found: a needle with standard
deviation s and a hundredth of the draws' width is seen, through its slope, from 5 to 9 s away, and by its
height from nowhere. So accusers are led uphill by line searches along the gradient: what ends where q has its
mass came from a tail, what still accuses q at the top stands in a mode of its own. Around such tops Gaussians
are matched, from a width at which the potential falls by about what it falls in a Gaussian; weighing draws of
them is the caller's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.families.gaussians import Mixture
from visbi.fitting.mixture import spread_out
from visbi.fitting.pool import Proposal
from visbi.fitting.refine import matched
from visbi.fitting.target import Target

__all__ = ["FOLLOWED", "KEPT", "best_along", "starts_at", "too_low", "tops", "uphill"]

FOLLOWED = 256
"""Points, the highest ones, in the first line search, and"""
KEPT = 32
"""of them, in the later ones."""
_TIMES = 4  # line searches
_LONGEST, _STEPS = 4.0, 16  # the longest step, prior sds; each of the others is half of the one before
_MATCHED = 8  # tops from which Gaussians are matched
_DIRECTIONS = 8  # in which a top's width is measured


def too_low(q: Proposal, z: Tensor, least: Tensor) -> Tensor:
    """(F, N) whether log q at z (F, N, d) is below `least` (F, N).

    Of a mixture all components are added up only where the largest alone does not show that it is not, and
    all are looked at only where the widest do not show it.

    >>> q = Mixture.of(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1))
    >>> too_low(q, torch.tensor([[[0.0], [4.0]]]), torch.tensor([[-5.0, -5.0]]))
    tensor([[False,  True]])
    """
    if not isinstance(q, Mixture):
        return q.log_prob(z) < least
    low = torch.ones_like(least, dtype=torch.bool)
    for bound in (q.widest.at_least, q.at_least, q.log_prob):
        left = low.any(0)
        low[:, left] = bound(z[:, left]) < least[:, left]
    return low


def uphill(target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
    """The best of some steps along the gradient from points z (F, K, d), and ell (F, K) there.

    Args:
        target: of F potentials.
        z: where to start; what is best itself stays.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(lambda theta: -50 * theta.square().sum(-1), coordinates(prior))
    >>> z, ell = uphill(target, torch.full((1, 1, 2), 0.5).double())
    >>> float(z.norm()) < 0.25
    True
    """
    ell, gradient = target.value_and_gradient(z)
    return best_along(z, ell, gradient, target.value)


def best_along(
    z: Tensor, height: Tensor, direction: Tensor, height_at: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The highest of z (F, K, d) and of points at some lengths along a direction, and its height (F, K).

    Args:
        z: where to start. height: (F, K), there.
        direction: (F, K, d), of any length.
        height_at: (F, K, steps, d) -> (F, K, steps).
    """
    along = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    lengths = _LONGEST * 0.5 ** torch.arange(_STEPS).to(z)
    each = z[:, :, None] + lengths[:, None] * along[:, :, None]
    highest = torch.cat([height[..., None], height_at(each)], -1).max(-1)
    index = highest.indices[..., None, None].expand(-1, -1, 1, z.shape[-1])
    return torch.cat([z[:, :, None], each], 2).gather(2, index)[:, :, 0], highest.values


def tops(
    target: Target, z: Tensor, ell: Tensor, q: Proposal, log_z: Tensor, *, by: float
) -> tuple[Mixture, Tensor]:
    """Gaussians matched where points accuse q even after they were led uphill.

    Args:
        target: of F potentials, with useful gradients.
        z, ell: points (F, N, d) and the target at them (F, N), -inf for those that need not be looked at.
        q: what is accused.
        log_z: (F,) log-evidence.
        by: nats by which ell - log q - log Z is too much.

    Returns:
        F mixtures of equal weights, and (F,) whether there is such a top; the mixture of a fit without one
        says nothing.

    Raises:
        BudgetReached: the target's budget is used up.
    """

    def accusing(z: Tensor, ell: Tensor) -> Tensor:
        return torch.where(too_low(q, z, ell - log_z[:, None] - by), ell, -torch.inf)

    height = accusing(z, ell)
    most = min(FOLLOWED, int(torch.isfinite(height).sum(1).max()))
    for _ in range(_TIMES):
        if most == 0:
            break
        z = picked(z, height.topk(most, 1).indices)
        z, ell = uphill(target, z)
        height = accusing(z, ell)
        most = min(KEPT, int(torch.isfinite(height).sum(1).max()))
    found = torch.isfinite(height).any(1) if most else torch.zeros_like(log_z, dtype=torch.bool)
    if not bool(found.any()):
        nothing = torch.zeros(len(z), 1, target.dim).to(z)
        return Mixture.of(
            nothing[..., 0], nothing, torch.eye(target.dim).to(z).expand(len(z), 1, -1, -1)
        ), found
    weights = torch.isfinite(height).to(z)
    weights = torch.where(found[:, None], weights, 1.0)
    return matched(target, *starts_at(target, z, weights)), found


def starts_at(target: Target, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the tops z (F, K, d), spread out by weights (F, K), and covariances to match Gaussians from."""
    starts = picked(z, spread_out(z, weights / weights.sum(1, keepdim=True), min(_MATCHED, z.shape[1])))
    eye = torch.eye(target.dim).to(z)
    return starts, _widths(target, starts).square()[..., None, None] * eye


def _widths(target: Target, z: Tensor) -> Tensor:
    """(F, K) how far from points (F, K, d) ell has fallen by d / 2, as in a Gaussian of that sd."""
    lengths = _LONGEST * 0.5 ** torch.arange(_STEPS).to(z)
    along = torch.randn(*z.shape[:2], 1, _DIRECTIONS, z.shape[-1]).to(z)
    values = target.value(z[:, :, None, None] + lengths[:, None, None] * along)  # (F, K, steps, directions)
    fallen = target.value(z)[..., None] - values.median(-1).values > 0.5 * z.shape[-1]
    return torch.where(fallen, lengths, _LONGEST).amin(-1)
