"""The first look: what draws of the prior say about the potential, and whether its gradient is of use."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from visbi.certificate.weights import MIN_DRAWS
from visbi.core.rows import picked, trues_first
from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import SEARCHED, Group
from visbi.fitting.probe import useful_gradient
from visbi.fitting.target import Target, is_usable

__all__ = ["PRIOR", "look", "prior_like"]

PRIOR = "the prior"
"""The rung of a fit that has come no further than the look."""
_LEAST_SHARE = 1e-9  # of the prior beyond the outermost draw, in each dimension
_ROOM = 8  # times the draws of the search: a budget that leaves less is not spent on it
_INMOST = 0.03  # of how far it is from the prior's middle, to which a draw is moved at most
_NEAR, _NEAREST = 4096, 1e-7  # in few dimensions, so many of them, and to so much
_SCARCE = 32  # draws that can be used, below which more of the prior's are searched, and all are looked at
_PROBED = 16  # best draws at which gradients are tried
_LOOKED_AT, _NEAR_LOOKED_AT = 512, 128  # promising draws of the prior, and of those moved inwards


def look(now: Group) -> Sequence[Group]:
    """What the prior's draws say about the potential."""
    n = now.effort.look
    if now.effort.keep_look:
        trial = now.pool.draw(prior_like(now.target), n)
        now.consider(PRIOR, prior_like(now.target), trial)
        z, ell = trial.z, trial.ell
        usable = torch.isfinite(ell)
    else:
        z, ell, n = _search(now)
        usable = is_usable(ell)
    ell = torch.where(usable, ell, -torch.inf)
    somewhere = usable.any(1)
    for record, there in zip(now.records, somewhere.tolist(), strict=True):
        if not there:
            record.best = None
    if not bool(somewhere.any()):
        return []
    each = [_promising(z, ell, _LOOKED_AT)]
    if len(now.searched) and now.searched.shape[1] > now.n_prior:
        each.append(_promising(now.searched[:, now.n_prior :], now.found[:, now.n_prior :], _NEAR_LOOKED_AT))
    now.starts, now.usable = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
    best = [picked(z, ell.topk(min(_PROBED, n), 1).indices), *(near[:, :_PROBED] for near, _ in each[1:])]
    now.gradient = useful_gradient(
        now.target, torch.cat([*best, picked(z, trues_first(usable)[:, :_SCARCE])], 1)
    )
    if not now.gradient:
        now.tell(now.all(), "the potential has no useful gradient")
    return [now.only(somewhere)]


def _promising(z: Tensor, ell: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n points of highest likelihood (F, n, d), and whether they can be used."""
    best = (ell + 0.5 * z.square().sum(-1)).topk(min(n, z.shape[1]), 1).indices
    return picked(z, best), torch.isfinite(ell.gather(1, best))


def _search(now: Group) -> tuple[Tensor, Tensor, int]:
    """Draws of the prior and the target there, and how many there are; more are searched, and kept in `now`.

    Where hardly any of the first can be used, all are what the potential is judged by.
    """
    n, d = now.effort.look, now.target.dim
    more = now.effort.search if d <= SEARCHED else now.effort.inward
    more = more if now.target.budget.left > _ROOM * more else 0
    z = _evenly_drawn(now.target, n + more)
    n_prior = n
    if d > SEARCHED:
        z[:, n:] *= _INMOST ** torch.rand_like(z[:, n:, :1])
    elif more:
        n_prior += more - _NEAR
        z[:, n_prior:] *= _NEAREST ** torch.rand_like(z[:, n_prior:, :1])
    ell, end = now.target.value_as_far(z, MIN_DRAWS)
    scarce = bool((is_usable(ell[:, :n]).sum(1) < _SCARCE).any())
    if scarce and d > SEARCHED and more and end is None:
        further = _evenly_drawn(now.target, now.effort.search)
        values, end = now.target.value_as_far(further, MIN_DRAWS)
        further = further[:, : values.shape[1]]
        z, ell = torch.cat([further, z], 1), torch.cat([values, ell], 1)
        n_prior += values.shape[1]
    usable = is_usable(ell)
    for record, each, values, good in zip(now.records, z, ell, usable, strict=True):
        of_prior = slice(min(len(values), n_prior))
        record.looked = each[of_prior], torch.where(good, values, -torch.inf)[of_prior]
    if end is not None:
        raise end
    if more:
        now.searched, now.found = z, torch.where(usable, ell, -torch.inf)
        now.n_prior = n_prior
    first = n_prior if scarce else n
    return z[:, :first], ell[:, :first], first


def _evenly_drawn(target: Target, n: int) -> Tensor:
    """(F, n, d) draws of N(0, I) by scrambled Sobol sequences: smaller gaps than independent ones."""
    seeds = torch.randint(2**31, (target.fits,)).tolist()
    u = [SobolEngine(target.dim, scramble=True, seed=seed).draw(n, dtype=torch.float64) for seed in seeds]
    return torch.special.ndtri(torch.stack(u).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)).to(target.device)


def prior_like(target: Target) -> Mixture:
    """N(0, I) for each of the target's potentials."""
    d = target.dim
    loc = torch.zeros(target.fits, 1, d, dtype=torch.float64, device=target.device)
    return Mixture.of(torch.zeros_like(loc[..., 0]), loc, torch.eye(d).to(loc).expand(*loc.shape, d))
