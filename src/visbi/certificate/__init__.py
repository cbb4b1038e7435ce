"""Did it work? Numbers and a verdict from log p and log q at draws of q; knows no posterior."""

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.modes import Mode, find_modes
from visbi.certificate.report import FitError, Report, certify, certify_many
from visbi.certificate.scores import proportionality
from visbi.certificate.twosample import c2st
from visbi.certificate.weights import (
    divergences,
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    resample,
    total_variation,
)

__all__ = [
    "FitError",
    "Mode",
    "Report",
    "WeightedDraws",
    "c2st",
    "certify",
    "certify_many",
    "divergences",
    "effective_sample_size",
    "find_modes",
    "log_evidence",
    "pareto_smooth",
    "proportionality",
    "resample",
    "total_variation",
]
