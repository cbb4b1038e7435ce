"""Figures: of a fit (`visbi.plots.fits`) and of how well many are calibrated (`visbi.plots.calibration`).

Every function returns a matplotlib Figure and touches no global state, so it works without a display and
inside any program. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from visbi.plots.calibration import (
    calibration_figures,
    coverage_plot,
    predictive_plot,
    rank_plot,
    tarp_plot,
)
from visbi.plots.fits import pair_plot, predictive_band, trace_plot

__all__ = [
    "calibration_figures",
    "coverage_plot",
    "pair_plot",
    "predictive_band",
    "predictive_plot",
    "rank_plot",
    "tarp_plot",
    "trace_plot",
]
