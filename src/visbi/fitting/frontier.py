r"""Walks outwards from the ends of q: into tails that go on, thin or bent, where its draws stop.

The draws of a q that ends too soon say nothing of what is beyond: their weights are sound, and there is no
other mode to be found. Nor do the moves of an exploration get there, whose steps are as long as the posterior
is wide: in the thin end of a tail they are refused. So chains begin at the outermost of the weighted draws,
along the axes and the principal ones, and each moves in the scales of the draws next to where it began.
Chains that have walked to where q has next to nothing accuse it; weighing what is there is the caller's.
"""

import torch
from torch import Tensor

from visbi.core.rows import picked
from visbi.fitting.mixture import local_covariances, moments
from visbi.fitting.moves import Moves, StandardNormal, root
from visbi.fitting.target import Target

__all__ = ["outermost", "walk"]

_RANKS = 1, 4  # the outermost, and the so manieth
_STEPS = 4  # of a Hamiltonian move,
_LOG_SIZES = -3.0, 0.0  # and the range of the logarithm of their size


def outermost(z: Tensor, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n starts (F, n, d) among the outermost of points z (F, N, d), and covariances (F, n, d, d) around them.

    >>> z = torch.linspace(-1, 1, 101).double()[None, :, None]
    >>> outermost(z, torch.full((1, 101), 1 / 101).double(), 8)[0].unique()
    tensor([-1.0000, -0.9400,  0.9400,  1.0000], dtype=torch.float64)
    """
    d = z.shape[-1]
    mean, cov = moments(z, weights)
    centred = z - mean
    along = torch.cat([centred, centred @ torch.linalg.eigh(cov)[1]], 2)
    both = torch.where((weights > 0)[..., None], torch.cat([along, -along], 2), -torch.inf)
    ranked = both.topk(min(max(_RANKS), z.shape[1]), 1).indices
    index = torch.cat([ranked[:, rank - 1] for rank in _RANKS], 1)[:, :n]
    starts, again = picked(z, index), torch.arange(n) % index.shape[1]
    cov = local_covariances(z, starts, max(4 * d, 40), weights)
    return starts[:, again], cov[:, again]


def walk(target: Target, z: Tensor, cov: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Where chains are after every round, and ell there.

    Args:
        target: with a useful gradient.
        z: (F, K, d), where they begin. cov: (F, K, d, d), the scales that each moves in.
        rounds: Hamiltonian moves of each.

    Returns:
        (F, rounds K, d) and (F, rounds K).

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> start, cov = torch.zeros(1, 300, 2).double(), torch.eye(2).double().expand(1, 300, 2, 2)
    >>> seen, _ = walk(Target(prior.log_prob, coordinates(prior)), start, cov, 20)
    >>> round(float(seen[0, -300:].std()))
    1
    """
    moves = Moves(target, StandardNormal(target.dim), True)
    scale = root(cov.flatten(0, 1))
    now, one = moves.at(z.flatten(0, 1)[:, None]), torch.ones_like(scale[:, 0, 0])  # populations of one chain
    seen = []
    for _ in range(rounds):
        size = torch.empty_like(now.z[..., :1]).uniform_(*_LOG_SIZES).exp() / target.dim**0.25
        now = moves.taken(now, *moves.trajectory(now, one, scale, size, _STEPS))
        seen.append(now)
    ell = torch.cat([each.ell.reshape(z.shape[:-1]) for each in seen], 1)
    return torch.cat([each.z.reshape(z.shape) for each in seen], 1), ell
