"""How q is found."""

from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import Trace, fit_gradient
from visbi.fitting.state import SingleFit, Untrained

__all__ = ["SingleFit", "TrainOptions", "Trace", "Untrained", "fit_gradient"]
