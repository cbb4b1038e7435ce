r"""The rung of the bridge: particles are carried from the best q to the posterior, and fitted.

Sequential Monte Carlo from q in place of the prior (`fitting.explore` with q as its base): the tempered
densities q^(1 - beta) p^beta lead from what was fitted to what it lacks, and where q is near, one or two
temperatures do. Any q that has a score can be the base, a mixture, a flow, or a flow with patches.

What the particles show is then fitted: a mixture, by EM on all of them and refits; and, if a flow is the best
so far, that flow, by the forward KL to the particles beside the reverse one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import Group
from visbi.fitting.explore import Exploration, explore
from visbi.fitting.flow import FlowProposal
from visbi.fitting.flying import patched, polished
from visbi.fitting.mixture import defended
from visbi.fitting.pool import UNSOUND, Proposal
from visbi.fitting.refine import Blend, from_particles, refined
from visbi.fitting.verdicts import certified
from visbi.fitting.witnesses import FEW, mirrored

__all__ = ["ProposalBase", "bridge"]

_TURNS = 2


@dataclass(frozen=True)
class ProposalBase:
    """Proposals as the base of an exploration, F populations from F of them.

    >>> from visbi.fitting.flow import flow_body
    >>> base = ProposalBase(FlowProposal.of(flow_body(2)))
    >>> log_q, score = base.log_prob_and_score(base.sample(1, 5, torch.zeros(())))
    >>> log_q.shape, score.shape
    (torch.Size([1, 5]), torch.Size([1, 5, 2]))
    """

    q: Proposal

    def sample(self, fits: int, n: int, like: Tensor) -> Tensor:
        """(fits, n, d)."""
        z = self.q.sample(n)
        assert len(z) == fits
        return z

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q (F, N) and its gradient (F, N, d)."""
        return self.q.log_prob_and_score(z)


def bridge(now: Group, *, spare: float) -> bool:
    """Carry the particles of one fit (F = 1) from its best q, and fit to them; whether that answered.

    Args:
        now: the fit.
        spare: effective share of draws with which an answer is final.

    Raises:
        BudgetReached: the budget is used up.
    """
    for _ in range(_TURNS):
        q = _best(now)
        base = defended(q) if isinstance(q, Mixture) else q
        seen = explore(now.target, now.effort.particles, base=ProposalBase(base), gradient=now.gradient)
        now.records[0].carried = seen
        if _flow_to(now, q, seen, spare=spare) or _mixture_to(now, seen, spare=spare):
            return True
    return False


def _best(now: Group) -> Proposal:
    """The best answer if there is one; if none came as far, the best by a trial."""
    record = now.records[0]
    if record.answer is not None and record.answer[1].report.status != "failed":
        return record.answer[1].q
    assert record.best is not None
    return record.best[1]


def _flow_to(now: Group, q: Proposal, seen: Exploration, *, spare: float) -> bool:
    """If q has a flow: that flow, trained on with the particles in its sight."""
    flow = q.main if isinstance(q, Blend) else q
    if not (now.gradient and isinstance(flow, FlowProposal)):
        return False
    even = torch.full(seen.z.shape[:2], 1.0 / seen.z.shape[1]).to(seen.z)
    better, trial = polished(now, flow, (seen.z, even))
    now.consider("a bridged flow", better, trial)
    return not patched(now, better, spare=spare, name="a bridged flow")


def _mixture_to(now: Group, seen: Exploration, *, spare: float) -> bool:
    """A mixture of what the particles saw, or the best one so far, refitted."""
    q = from_particles(seen, now.effort.points)
    trial = now.pool.draw(defended(q), now.effort.trial)
    _, best, best_trial = now.records[0].best or ("", q, trial)
    if isinstance(best, Mixture) and float(best_trial.merit) > float(trial.merit):
        q, trial = best, best_trial
    q, trial, _ = refined(now.pool, q, trial, rounds=2, n=now.effort.trial, points=now.effort.points)
    if bool((mirrored(now, defended(q), trial.log_z, base=q) > FEW).all()):
        q, trial = now.joined()
    now.consider("a bridged mixture", q, trial)
    if float(trial.khat) >= UNSOUND:
        return False
    return bool(certified(now, "a bridged mixture", defended(q), spare=spare))
