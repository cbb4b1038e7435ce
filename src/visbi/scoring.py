"""How good a fitted q is: its certificate, and scores in a line for a reader.

`certificate` weighs fresh draws of q at one observation. `scored` puts one of three numbers into words: k-hat
of those weights ("psis"), or r^2 of q against the potential at draws of q ("prop") or of the prior
("prop_prior"); see `visbi.certificate` for the formulas.
"""

from dataclasses import dataclass, replace

import torch
from torch.distributions import Distribution

from visbi.certificate.report import GOOD, Report
from visbi.certificate.scores import proportionality
from visbi.certificate.verdict import certify, recertified
from visbi.core.types import LogDensity
from visbi.correcting import in_pieces, weighted_draws
from visbi.fitting.state import AmortizedFit, AutoFit, SingleFit

__all__ = ["CERTIFICATE_DRAWS", "Score", "certificate", "scored"]

CERTIFICATE_DRAWS = 50_000
_PROPORTIONAL = 0.8  # r^2 below which a score of proportionality is poor
_NOT_PROPORTIONAL = "q is not proportional to the potential there. Train longer, or use a richer family."


@dataclass(frozen=True)
class Score:
    """A number that says how good q is, and what to do about it.

    Attributes:
        report: the certificate, with r^2 in it if that is the score.
        poor: whether the number is a bad one.
        brief: the number with its name.
        line: the same with more digits and what it means.
        advice: what to do.
    """

    report: Report
    poor: bool
    brief: str
    line: str
    advice: str


def certificate(fit: SingleFit | AutoFit | AmortizedFit, log_p: LogDensity, n: int) -> Report:
    """The certificate of q at the one observation that `fit` is looked at in, from n fresh draws.

    Args:
        fit: the fit; what it says of how it ended goes into the report.
        log_p: the potential at that observation.
        n: how many.

    Raises:
        ValueError: `fit` is looked at in several observations, or n is too small.
    """
    draws = weighted_draws(fit, log_p, n)
    if isinstance(fit, AutoFit):
        return recertified(fit.report, draws.log_p, draws.log_q)
    doubts = [f"the fit {fit.trace.stop_reason}. Give it more."] if fit.trace.cut_short else []
    return certify(draws.log_p, draws.log_q, stop_reason=fit.trace.stop_reason, doubts=doubts)


def scored(
    metric: str,
    report: Report,
    fit: SingleFit | AutoFit | AmortizedFit,
    log_p: LogDensity,
    prior: Distribution,
    n: int,
) -> Score:
    """What one of the scores says.

    Args:
        metric: "psis", "prop" or "prop_prior".
        report: the certificate.
        fit, log_p: as for `certificate`.
        prior: where "prop_prior" draws.
        n: how many draws the last two are made from.
    """
    if metric == "psis":
        poor = report.status not in GOOD
        line = f"k-hat {report.khat:.3f} ({report.status}): {report.sentence}"
        return Score(report, poor, f"k-hat {report.khat:.2f}", line, report.sentence)
    with torch.no_grad():
        theta = fit.family.sample((n,)) if metric == "prop" else prior.sample(torch.Size([n]))
        r2 = proportionality(in_pieces(log_p, theta), fit.family.log_prob(theta))
    bad = isinstance(fit, AutoFit) and report.status not in GOOD  # a q that nobody may take for a good one
    poor = r2 < _PROPORTIONAL or bad
    advice = _NOT_PROPORTIONAL if poor and not bad else report.sentence  # a good report would not reassure
    line = f"{metric} r^2 {r2:.3f} (1 is best): {advice}"
    return Score(replace(report, proportionality=r2), poor, f"{metric} r^2 {r2:.2f}", line, advice)
