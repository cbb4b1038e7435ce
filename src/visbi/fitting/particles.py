r"""The last rung: particles, where no q that was fitted to them passes.

Particles that were carried from the best q and then moved by Markov chains that leave the posterior as it is
are nearer to it than that q. They are given as a mixture of as many Gaussians, one about each particle with a
share h^2 of the covariance S of the particles around it, drawn towards their mean m so that the mixture has
their mean and covariance (Liu, West 2001):

    1/N sum_i N(m_i + sqrt(1 - h^2) (z_i - m_i), h^2 S_i).

Nothing vouches for them: what the base and the chains have not reached is missing. Such kernels are no
proposal for importance weights either, so draws are taken as they are, and the report is `suspect` and names
MCMC.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from visbi.certificate.verdict import certify
from visbi.core.rows import picked
from visbi.families.gaussians import Mixture, cholesky
from visbi.fitting.climbing import Answer, Group
from visbi.fitting.mixture import local_covariances
from visbi.fitting.state import PARTICLES

__all__ = ["kernels", "settle"]

_WIDTH = 0.3  # h
_MOST = 1024
_FEWEST_NEAR = 40
_SENTENCE = (
    "no q passed, and draws are those of particles that Markov chains have moved: nothing vouches that they "
    "are everywhere, or in proportion. Run MCMC."
)


def kernels(z: Tensor) -> Mixture:
    """Particles z (F, N, d), N >= 2, as mixtures of N Gaussians with the particles' own moments, nearly.

    >>> z = torch.randn(1, 200, 2).double()
    >>> kernels(z).sample(1000).shape
    torch.Size([1, 1000, 2])
    """
    fits, n, d = z.shape
    near = min(max(4 * d, _FEWEST_NEAR), n)
    cov = torch.cat([local_covariances(z, piece, near) for piece in z.split(64, 1)], 1)
    inverse = torch.linalg.inv(cholesky(cov))
    means = []
    for piece, root in zip(z.split(64, 1), inverse.split(64, 1), strict=True):
        gap = z[:, None] - piece[:, :, None]  # (F, C, N, d)
        nearest = (gap @ root.mT).square().sum(-1).topk(near, largest=False).indices
        means.append(picked(z, nearest.flatten(1)).unflatten(1, (-1, near)).mean(2))
    mean = torch.cat(means, 1)
    loc = mean + math.sqrt(1 - _WIDTH**2) * (z - mean)
    return Mixture.of(torch.zeros(fits, n).to(z), loc, _WIDTH**2 * cov)


def settle(now: Group) -> None:
    """Give one fit (F = 1) that nothing answered its particles for an answer, where there are any.

    An answer whose weights can be used, though something speaks against it, is left.

    Raises:
        BudgetReached: the budget is used up.
    """
    record = now.records[0]
    if record.carried is None or (record.answer is not None and record.answer[1].report.status != "failed"):
        return
    z = record.carried.z
    q = kernels(z[:, torch.randperm(z.shape[1], device=z.device)[:_MOST]])
    trial = now.pool.draw(q, now.effort.trial)
    report = certify(trial.ell[0], trial.log_q[0])
    if not bool(trial.ell.isfinite().any()):
        return
    report = replace(report, status="suspect", sentence=_SENTENCE)
    record.answer = PARTICLES, Answer(q, trial.z[0], trial.ell[0], trial.log_q[0], report)
