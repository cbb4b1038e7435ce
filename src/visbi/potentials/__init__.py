"""log p(theta | x) up to a constant: learned likelihoods and ratios, callables, other packages' objects."""

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
