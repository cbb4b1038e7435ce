"""Did it work? Numbers and a verdict from log p and log q at draws of q; knows no posterior.

Of one fit: k-hat, effective sample size, evidence, modes. Of fits to many observations whose truths are
known: are they calibrated?
"""

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.coverage import Coverage, expected_coverage
from visbi.certificate.local import LocalC2ST, local_c2st
from visbi.certificate.modes import Mode, find_modes
from visbi.certificate.predictive import PredictiveCheck, predictive_check, prior_predictive_check
from visbi.certificate.report import FitError, Report
from visbi.certificate.sbc import SBC, sbc
from visbi.certificate.scores import proportionality
from visbi.certificate.tarp import TARP, tarp
from visbi.certificate.twosample import c2st
from visbi.certificate.verdict import certify, certify_many
from visbi.certificate.weights import (
    divergences,
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    resample,
    total_variation,
)

__all__ = [
    "Coverage",
    "FitError",
    "LocalC2ST",
    "Mode",
    "PredictiveCheck",
    "Report",
    "SBC",
    "TARP",
    "WeightedDraws",
    "c2st",
    "certify",
    "certify_many",
    "divergences",
    "effective_sample_size",
    "expected_coverage",
    "find_modes",
    "local_c2st",
    "log_evidence",
    "pareto_smooth",
    "predictive_check",
    "prior_predictive_check",
    "proportionality",
    "resample",
    "sbc",
    "tarp",
    "total_variation",
]
