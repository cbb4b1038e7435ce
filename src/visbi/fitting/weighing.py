"""How much of the mass a q lacks where a mixture was put: what `witnesses` say is weighed here."""

import math

import torch
from torch import Tensor

from visbi.fitting.climbing import Group
from visbi.fitting.pool import Proposal, Trial

__all__ = ["LOW", "MISSING", "missing_at"]

LOW = math.log(20.0)
"""Nats by which q is much too low somewhere."""
MISSING = 0.02
"""Share of the mass beyond which an answer is in doubt."""
_SURE, _MORE = 2.0, 2  # errors of a difference that is one, and times as many draws where it may be


def missing_at(now: Group, q: Proposal, local: Proposal, log_z: Tensor, trial: Trial | None = None) -> Tensor:
    """(F,) mass, relative to what q has, that draws of `local` find where q is much too low.

    Each counts by local / (q + local): as one of so many draws, half of which are thought to be q's. What
    the draws of q in `trial` find there, counted alike, is not missing: their weights bring it back. A
    difference of the two within its error, after twice as many more draws, is none.
    """
    found = now.pool.draw(local, now.effort.witnesses)
    if trial is None:
        return _found(q, found, log_z)[0]
    own, own_error = _brought_back(local, trial, log_z)

    def lacking(found: Trial) -> tuple[Tensor, Tensor]:
        share, error = _found(q, found, log_z)
        return (share - own).clamp_min(0.0), _SURE * torch.hypot(error, own_error)

    gap, noise = lacking(found)
    if bool(((gap > MISSING) & (gap < noise)).any()):
        gap, noise = lacking(found.with_(now.pool.draw(local, _MORE * now.effort.witnesses)))
    return torch.where(gap > noise, gap, 0.0)


def _found(q: Proposal, found: Trial, log_z: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) mass that draws of a mixture find where q is much too low, and its standard error."""
    log_q, log_z = q.log_prob(found.z), log_z[:, None]
    log_w = found.ell - torch.logaddexp(log_q, found.log_q) - log_z
    each = log_w.clamp_max(50.0).exp() * (found.ell - log_q - log_z > LOW)
    return each.mean(1), each.std(1) / math.sqrt(each.shape[1])


def _brought_back(local: Proposal, trial: Trial, log_z: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of what q's own draws find at the same place."""
    log_w = trial.log_w - log_z[:, None]
    low = (log_w > LOW).any(0)
    part = torch.sigmoid(local.log_prob(trial.z[:, low]) - trial.log_q[:, low])
    each = part * log_w[:, low].clamp_max(50.0).exp() * (log_w[:, low] > LOW)
    n = log_w.shape[1]
    mean = each.sum(1) / n
    return mean, ((each.square().sum(1) / n - mean.square()).clamp_min(0.0) / n).sqrt()
