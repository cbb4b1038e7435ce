"""log p(theta | x) up to a constant: from a learned likelihood or ratio, from any callable, from other packages."""

from visbi.potentials.base import BasePotential
from visbi.potentials.custom import AdaptedPotential, CustomPotential, as_potential
from visbi.potentials.likelihood import LikelihoodPotential, likelihood_estimator_based_potential
from visbi.potentials.ratio import RatioPotential, ratio_estimator_based_potential

__all__ = [
    "AdaptedPotential",
    "BasePotential",
    "CustomPotential",
    "LikelihoodPotential",
    "RatioPotential",
    "as_potential",
    "likelihood_estimator_based_potential",
    "ratio_estimator_based_potential",
]
