"""Neural estimators trained on simulations: likelihoods p(x | theta) and ratios p(x | theta) / p(x)."""

from visbi.estimators.ensemble import LikelihoodEnsemble, RatioEnsemble
from visbi.estimators.fit import TrainedLikelihood, TrainedRatio, fit_likelihood, fit_ratio
from visbi.estimators.likelihood import NeuralLikelihood
from visbi.estimators.networks import FLOWS
from visbi.estimators.ratio import NeuralRatio
from visbi.estimators.ratio_losses import RATIO_LOSSES
from visbi.estimators.training_state import TrainingOptions, TrainingState, TrainingTrace

__all__ = [
    "FLOWS",
    "RATIO_LOSSES",
    "LikelihoodEnsemble",
    "NeuralLikelihood",
    "NeuralRatio",
    "RatioEnsemble",
    "TrainedLikelihood",
    "TrainedRatio",
    "TrainingOptions",
    "TrainingState",
    "TrainingTrace",
    "fit_likelihood",
    "fit_ratio",
]
