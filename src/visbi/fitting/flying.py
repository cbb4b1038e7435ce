r"""The rung of flows: for what is bent, or has tails and necks, beyond what a mixture of Gaussians fits.

Flows of all fits of a group train side by side (`fitting.flow`), from the Gaussian with the moments of the
weighted points so far. A posterior in one piece gets affine layers, and the reverse KL alone. Where several
modes were seen the layers are splines, which can tear a Gaussian apart, and half of the loss is the forward
KL to the points: what a flow's own draws do not reach, such as another mode, only points can teach it. The
first round takes fewer draws: far from the posterior their noise is not what limits a step. So does the last
one that there can be, which few fits need, and by which much has been spent. In few dimensions the thousands
of points of a fit alone show where bends and necks are: their likelihood takes the place of the first round,
and asks for no evaluation. What they lack is left to the later rounds, of the reverse KL alone.

After each round fresh draws say how good the flows are. A flow that is far from the posterior and comes no
nearer is trained no further: ripples and kinks beyond its bends stay. One whose weights are uneven is patched
by Gaussians where it is too low.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visbi.families.coupling_stack import CouplingStack
from visbi.families.gaussians import cholesky
from visbi.fitting.climbing import Group
from visbi.fitting.flow import FlowProposal, flow_body, show_points, train_flows
from visbi.fitting.mixture import moments
from visbi.fitting.pool import UNSOUND, Trial
from visbi.fitting.refine import patch
from visbi.fitting.verdicts import certified

__all__ = ["fly", "patched", "polished"]

_ROUNDS, _MOST_ROUNDS = 3, 4  # the last one where a flow is near, but its weights are not sound yet
_LATE_ROUNDS = 2  # more of each in many dimensions
_FEW_DIMENSIONS = 10
_STEPS = 200  # of a round
_FEW, _MANY = 128, 160  # draws in a step of the first and the last round, and of those between
_HOPELESS, _NEAR = 0.02, 0.1
_ENOUGH, _ENOUGH_KHAT = 0.8, 0.5
_WORTH = 0.4  # effective share with which a k-hat says little: of thousands of draws .9 to 1.3, of more .6
_STALLED, _AWAY = 0.1, 0.5  # of KL(q | p) that a round has taken off at most, and nats that are left of it
_FORWARD = 0.5


def fly(now: Group, *, spare: float) -> Sequence[Group]:
    """Train flows for those fits that have had none; give back the fits that they do not answer.

    Args:
        now: the fits.
        spare: effective share of draws with which an answer is final.

    Raises:
        BudgetReached: a fit's budget is used up.
    """
    if not now.gradient:
        return [now]
    flown, fresh = now.parts(now.where(lambda record: record.flown))
    rest = [] if flown is None else [flown]
    if fresh is None:
        return rest
    for group in fresh.parts(fresh.where(lambda record: record.modes > 1)):
        if group is not None:
            rest += _answered(group, *_trained(group), spare=spare)
    return rest


def _trained(now: Group) -> tuple[FlowProposal, Trial]:
    """Flows after as many rounds as the slowest fit needs, and the trial of them."""
    several = now.records[0].modes > 1
    flows = _start(now, spline=several)
    q, trial = FlowProposal.widened(flows), None
    for record in now.records:
        record.flown = True
    late = _LATE_ROUNDS if now.target.dim > _FEW_DIMENSIONS else 0
    last = _MOST_ROUNDS + late - 1
    before = torch.full_like(flows.place[:, 0], -torch.inf)
    shown = now.alone and not several and now.target.dim <= _FEW_DIMENSIONS
    if shown:
        show_points(flows, now.pool.points(2 * now.effort.trial), steps=_STEPS, batch=_MANY)
    for number in range(1 if shown else 0, last + 1):
        elbo = train_flows(
            flows,
            now.target,
            round_=number,
            steps=_STEPS,
            batch=_FEW if number in (0, last) else _MANY,
            points=now.pool.points(2 * now.effort.trial) if several else None,
            forward_share=_FORWARD,
        )
        q = FlowProposal.widened(flows)  # copied: the pool keeps it, and training goes on
        trial = now.pool.draw(q, now.effort.trial)
        good = (trial.share > _ENOUGH) & (trial.khat < _ENOUGH_KHAT)
        hopeless = trial.share < _HOPELESS if number else ~now.all()
        away, gain, before = trial.log_z - elbo, elbo - before, elbo
        stalled = (away > _AWAY) & (gain < _STALLED * (away + gain)) if not several else ~now.all()
        over = (_worth_a_certificate(trial) | (trial.share < _NEAR)) & (number + 1 >= _ROUNDS + late)
        if bool((good | hopeless | stalled | over).all()):
            break
    assert trial is not None
    return q, trial


def _start(now: Group, *, spline: bool) -> CouplingStack:
    """Gaussians with the moments of all points."""
    z, weights = now.pool.points(now.effort.trial)
    mean, cov = moments(z, weights)
    cov = cov + 1e-9 * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
    bodies = [flow_body(now.target.dim, spline=spline).to(now.target.device) for _ in now.records]
    return CouplingStack(bodies).placed(mean[:, 0], cholesky(cov))


def polished(now: Group, q: FlowProposal, points: tuple[Tensor, Tensor]) -> tuple[FlowProposal, Trial]:
    """Flows after one more round, half of whose loss is the forward KL to points, and the trial of them.

    Args:
        now: the fits.
        q: flows, which stay as they are.
        points: (F, M, d) and their weights (F, M).
    """
    flows = q.flows.only(range(len(q.flows)))
    train_flows(
        flows,
        now.target,
        round_=_ROUNDS,
        steps=_STEPS,
        batch=_MANY,
        points=points,
        forward_share=_FORWARD,
    )
    better = FlowProposal.widened(flows)
    return better, now.pool.draw(better, now.effort.trial)


def _answered(now: Group, q: FlowProposal, trial: Trial, *, spare: float) -> Sequence[Group]:
    """Certificates of flows and then of patched ones; the fits that neither answers."""
    now.consider("a flow", q, trial)
    sound = _worth_a_certificate(trial)
    good, others = now.parts(sound)
    rest = [] if others is None else patched(others, q.of_fits(~sound), spare=spare)
    if good is not None:
        q = q.of_fits(sound)
        answered = certified(good, "a flow", q, spare=spare, more_to_come=True)
        left = good.parts(answered)[1]
        if left is not None:
            rest += patched(left, q.of_fits(~answered), spare=spare, near=True)
    return rest


def _worth_a_certificate(trial: Trial) -> Tensor:
    """(F,) by few draws, whose k-hat is noisy: where many of them are in effect, more are to say."""
    return (trial.share > _HOPELESS) & ((trial.khat < UNSOUND) | (trial.share > _WORTH))


def patched(
    now: Group, q: FlowProposal, *, spare: float, name: str = "a patched flow", near: bool = False
) -> list[Group]:
    """Certificates of flows with Gaussians where they are too low; the fits that these do not answer.

    Args:
        now: the fits. q: their flows.
        spare: effective share of draws with which an answer is final.
        name: of what answers.
        near: whether flows have failed by many draws alone: then patches are not judged by few.
    """
    blend = patch(now.pool, q)
    trial = now.pool.draw(blend, now.effort.trial)
    now.consider(name, blend, trial)
    sound = now.all() if near else _worth_a_certificate(trial)
    now.tell(~sound, lambda i: f"a flow had {trial.numbers(i)}")
    good, others = now.parts(sound)
    rest = [] if others is None else [others]
    if good is not None:
        answered = certified(good, name, blend.of_fits(sound), spare=spare)
        left = good.parts(answered)[1]
        rest = rest if left is None else [*rest, left]
    return rest
