"""Did it work? Numbers and a verdict from log p and log q at draws of q; knows no posterior."""

from visbi.certificate.report import Report, certify
from visbi.certificate.scores import proportionality
from visbi.certificate.twosample import c2st
from visbi.certificate.weights import (
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    resample,
    total_variation,
)

__all__ = [
    "Report",
    "c2st",
    "certify",
    "effective_sample_size",
    "log_evidence",
    "pareto_smooth",
    "proportionality",
    "resample",
    "total_variation",
]
