"""Whether a q is an answer: its certificate from fresh draws, and what speaks against it beside."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from visbi.certificate.report import GOOD, Report
from visbi.certificate.verdict import certify_many
from visbi.fitting.climbing import Answer, Group
from visbi.fitting.pool import BELIEVED, DISCOUNT, Proposal, Trial
from visbi.fitting.witnesses import doubts

__all__ = ["EVEN", "SPARE", "certified"]

SPARE = 0.2
"""Effective share of draws with which a rung's answer is final."""
_MANY = 2000.0  # draws in effect that a user may ask for
_MORE = 3  # times as many draws at most where there are fewer,
_AIM = 1.6  # times as many in effect as are wanted
_NEARLY = 0.2  # total variation of a q of which nothing but rare draws is wrong
_SURE = 3.0  # standard errors
EVEN = 0.5
"""k-hat of weights so even that many draws in effect are enough, however small their share."""


def certified(now: Group, rung: str, q: Proposal, *, spare: float, more_to_come: bool = False) -> Tensor:
    """(F,) whether q passes with draws to spare; what passes at all is kept.

    To spare are a share `spare` of the draws in effect, or many where their weights are even, or any number
    where all but a few heavy ones are right. A k-hat of `BELIEVED` is not final where a flow may do better.

    Args:
        now: the fits. rung: the name of what answers. q: what is certified.
        spare: the share.
        more_to_come: whether what comes next may fit better; so may a flow, where there is to be one. Then
            more draws are not taken of what could pass with them, but not with draws to spare.
    """
    broken = now.target.broken
    trial = now.pool.draw(q, now.effort.draws)
    if more := _wanted(now, trial, more_to_come=more_to_come):
        trial = trial.with_(now.pool.draw(q, more))
    broken = (now.target.broken - broken) / trial.ell.shape[1]
    reports = certify_many(trial.ell, trial.log_q, resampled=True)
    passed = torch.tensor([report.status in GOOD for report in reports], device=now.target.device)
    doubted, shaped = [False] * len(reports), now.for_a_flow()
    if bool(passed.any()):  # what the weights say is final where they are bad
        found = iter(doubts(now.only(passed), q.of_fits(passed), trial.of_fits(passed)))
        each = [next(found) if good else [] for good in passed.tolist()]
        reports = [_doubted(*pair) for pair in zip(reports, each, strict=True)]
        doubted = [bool(doubt) for doubt in each]
    for i, (record, report) in enumerate(zip(now.records, reports, strict=True)):
        report = replace(report, n_searched=now.n_searched)
        answer = Answer(q.of_fits(now.one(i)), trial.z[i], trial.ell[i], trial.log_q[i], report)
        record.doubted = doubted[i]
        rank = _rank(report, doubted=doubted[i])
        more = 0.0 if record.answer is None else _more_mass(report, record.answer[1].report)
        if (rank[:2], more, rank) > (record.rank[:2], 0.0, record.rank):
            record.answer, record.rank, record.broken = (rung, answer), rank, float(broken[i])
        many = report.khat < EVEN and report.ess >= _MANY
        many |= report.total_variation <= _NEARLY
        to_spare = (report.ess_fraction >= spare or many) and (report.khat < BELIEVED or not shaped[i])
        passed[i] = report.status in GOOD and to_spare
        if not passed[i]:
            record.story.append(f"{rung} {_why(report)}")
    return passed


def _wanted(now: Group, trial: Trial, *, more_to_come: bool) -> int:
    """More draws that are worth it: where weights are sound, but few of a single fit's draws in effect."""
    n = trial.ell.shape[1]
    if not now.alone or now.target.fits > 1 or now.target.budget.left < _MORE * n:
        return 0
    ess = trial.n_effective
    sound = EVEN if more_to_come or bool(now.for_a_flow()) else BELIEVED
    if float(trial.khat) >= sound or not _MANY / (1 + _MORE) <= ess < _MANY:
        return 0
    return min(_MORE * n, math.ceil((_AIM * _MANY / ess - 1) * n))


def _doubted(report: Report, doubts: list[str]) -> Report:
    return replace(report, status="suspect", sentence=doubts[0]) if doubts else report


def _rank(report: Report, *, doubted: bool) -> tuple[int, bool, float]:
    """Which of two answers is better. A share that heavy tails leave no measure gives way to the distance."""
    order = {"failed": 0, "suspect": 1, "corrected": 2, "ok": 2}
    believed = report.khat < BELIEVED
    worth = report.ess_fraction if believed else DISCOUNT * (1.0 - report.total_variation)
    return order[report.status], not doubted, worth


def _more_mass(report: Report, other: Report) -> float:
    """Nats of evidence by which one is above the other, 0 where that may be chance.

    Weights see nothing of what their q does not reach: of two that seem sound the lower has lost mass.
    """
    gap = report.log_evidence - other.log_evidence
    noise = _SURE * math.hypot(report.log_evidence_se, other.log_evidence_se)
    return gap if abs(gap) > noise else 0.0


def _why(report: Report) -> str:
    numbers = f"had k-hat {report.khat:.2f} and an effective share of {report.ess_fraction:.2f}"
    return numbers if report.status != "suspect" else f"{numbers} ({report.sentence.split('.')[0]})"
