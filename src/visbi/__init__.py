"""visbi: variational inference for simulation-based inference.

Names are loaded on first use, so that `import visbi` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visbi.calibration import Calibration, calibrate
    from visbi.certificate import FitError, Report
    from visbi.estimators import fit_likelihood, fit_ratio
    from visbi.families import ZukoFlowType
    from visbi.fitting.parameters import VIPosteriorParameters
    from visbi.many import Posteriors, fit_many
    from visbi.posterior import VIPosterior
    from visbi.potentials import (
        BasePotential,
        CustomPotential,
        likelihood_estimator_based_potential,
        ratio_estimator_based_potential,
    )
    from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal, mcmc_transform
    from visbi.refitting import RefittingPosterior
    from visbi.rounds import infer
    from visbi.simulators import simulate

__all__ = [
    "BasePotential",
    "BoxUniform",
    "Calibration",
    "CustomPotential",
    "FitError",
    "MultipleIndependent",
    "Posteriors",
    "RefittingPosterior",
    "Report",
    "TruncatedNormal",
    "VIPosterior",
    "VIPosteriorParameters",
    "ZukoFlowType",
    "calibrate",
    "fit_likelihood",
    "fit_many",
    "fit_ratio",
    "infer",
    "likelihood_estimator_based_potential",
    "mcmc_transform",
    "ratio_estimator_based_potential",
    "simulate",
]

__version__ = "0.1.0"

_HOME = {
    "BasePotential": "visbi.potentials",
    "BoxUniform": "visbi.priors",
    "Calibration": "visbi.calibration",
    "CustomPotential": "visbi.potentials",
    "FitError": "visbi.certificate",
    "MultipleIndependent": "visbi.priors",
    "Posteriors": "visbi.many",
    "RefittingPosterior": "visbi.refitting",
    "Report": "visbi.certificate",
    "TruncatedNormal": "visbi.priors",
    "VIPosterior": "visbi.posterior",
    "VIPosteriorParameters": "visbi.fitting.parameters",
    "ZukoFlowType": "visbi.families",
    "calibrate": "visbi.calibration",
    "fit_likelihood": "visbi.estimators",
    "fit_many": "visbi.many",
    "fit_ratio": "visbi.estimators",
    "infer": "visbi.rounds",
    "likelihood_estimator_based_potential": "visbi.potentials",
    "mcmc_transform": "visbi.priors",
    "ratio_estimator_based_potential": "visbi.potentials",
    "simulate": "visbi.simulators",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'visbi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
