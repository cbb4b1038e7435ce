r"""Expected coverage: do regions that should hold 90 % of the truths hold them?

The region of level c holds the c most probable share of q(theta | x); theta* is inside if less than a share
c of draws has a higher density, so the level at which theta* enters is uniform if q is right (Deistler,
Goncalves, Macke: Truncated proposals for scalable and hassle-free simulation-based inference. 2022; Hermans,
Delaunoy, Rozet, Wehenkel, Begy, Louppe: A trust crisis in simulation-based inference? Your posterior
approximations can be unfaithful. 2022). Without densities, the regions are central intervals of each
parameter.

Regions in the wrong place hold too little as narrow ones do. Which it is, is told by the side on which the
truths lie: if the parameters' ranks speak of a shift more than of a spread, it is bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visbi.certificate.ranks import (
    ALPHA,
    checked_densities,
    checked_names,
    checked_pairs,
    density_verdict,
    lie_aside,
    p_text,
    ranks_among,
    shift_score,
)
from visbi.certificate.uniformity import Curve, curve, holm
from visbi.core.checks import in_interval
from visbi.core.random import seeded
from visbi.core.types import Seed

__all__ = ["Coverage", "expected_coverage"]

_REGIONS = "highest-density regions"
_SPOKEN = 0.9


@dataclass(frozen=True, eq=False)
class Coverage:
    """How much regions hold.

    Attributes:
        names: (Q,) "highest-density regions", or the parameters whose central intervals are looked at.
        verdicts: (Q,) of each: "calibrated", "over-confident", "under-confident", "biased", "miscalibrated".
        p_values, corrected: (Q,) alone and corrected for Q (Holm).
        curves: (Q,) with `levels` and, as `shares`, what regions of these levels hold.
        entered: (n_obs, Q) the level, in (0, 1), from which on the truth is inside.
        alpha: chance of a false alarm.
    """

    names: tuple[str, ...]
    verdicts: tuple[str, ...]
    p_values: np.ndarray
    corrected: np.ndarray
    curves: tuple[Curve, ...]
    entered: Tensor
    alpha: float

    @property
    def verdict(self) -> str:
        """Of the whole: that of the smallest p-value."""
        return self.verdicts[int(self.p_values.argmin())]

    @property
    def p_value(self) -> float:
        """Of the whole: the smallest corrected one."""
        return float(self.corrected.min())

    def held(self, level: float) -> np.ndarray:
        """(Q,) shares of the truths inside regions of this level.

        Raises:
            ValueError: `level` not in (0, 1).
        """
        level = in_interval("level", level, 0, 1)
        return (self.entered <= level).double().mean(0).numpy()

    def __str__(self) -> str:
        held = self.held(_SPOKEN)
        wrong = [i for i in np.argsort(self.p_values) if self.verdicts[i] != "calibrated"]
        shown = wrong or [int(self.p_values.argmin())]
        parts = [f"{100 * _SPOKEN:.0f} % {self._regions(i)} hold {100 * held[i]:.0f} %" for i in shown]
        aside = ", which lie on one side of the draws" if self.verdict == "biased" else ""
        number = f"{len(self.entered)} truths{aside} ({p_text(self.p_value)})"
        return f"{self.verdict}: {', '.join(parts)} of {number}"

    def _regions(self, i: int) -> str:
        return "regions" if self.names[i] == _REGIONS else f"intervals of {self.names[i]}"


def expected_coverage(
    theta: Tensor,
    draws: Tensor,
    log_q: tuple[Tensor, Tensor] | None = None,
    *,
    names: Sequence[str] | None = None,
    alpha: float = ALPHA,
    seed: Seed = None,
) -> Coverage:
    """What regions of q hold, beside what they should.

    Args:
        theta: true parameters, (n_obs, D).
        draws: of q(theta | x) for the x of each, (n_draws, n_obs, D), independent.
        log_q: at the truth (n_obs,) and at the draws (n_draws, n_obs); None for central intervals. Any
            density
            gives regions: for corrected draws the potential belongs here.
        names: of the D parameters.
        alpha: chance that a right q is called wrong.
        seed: of ties; None for torch's global generator.

    Raises:
        ValueError: shapes that do not fit, less than 20 observations or 10 draws, numbers not finite, or
            `alpha` not in (0, 1).

    >>> from visbi.core.random import seeded
    >>> with seeded(1):
    ...     theta = torch.randn(500, 1)
    ...     x = theta + torch.randn(500, 1)
    ...     narrow = x / 2 + 0.4 * torch.randn(100, 500, 1)
    >>> print(expected_coverage(theta, narrow, seed=1))
    over-confident: 90 % intervals of theta_1 hold 65 % of 500 truths (p < 1e-15)
    """
    theta, draws = checked_pairs(theta, draws)
    alpha = in_interval("alpha", alpha, 0, 1)
    n_draws, _, dim = draws.shape
    labels = checked_names(names, dim)
    possible = torch.arange(n_draws + 1)
    with seeded(seed):
        ranks = ranks_among(theta, draws)
        if log_q is None:
            outside, grid = (2 * ranks - n_draws).abs(), (2 * possible - n_draws).abs()
        else:
            labels = (_REGIONS,)
            inside = ranks_among(*checked_densities("log_q", *log_q, draws))
            outside, grid = n_draws - inside[:, None], possible
    curves = tuple(curve(column, grid) for column in outside.unbind(1))
    p_values = np.array([each.p_value for each in curves])
    corrected = holm(p_values)
    entered = _levels(outside, grid)
    sides = [lie_aside(ranks, n_draws)] * len(labels)
    if log_q is None:
        sides = [lie_aside(column[:, None], n_draws) for column in ranks.unbind(1)]
    said = [_verdict(score, aside) for score, aside in zip(shift_score(entered).tolist(), sides, strict=True)]
    return Coverage(
        names=labels,
        verdicts=tuple("calibrated" if p >= alpha else s for p, s in zip(corrected, said, strict=True)),
        p_values=p_values,
        corrected=corrected,
        curves=curves,
        entered=entered,
        alpha=alpha,
    )


def _levels(values: Tensor, grid: Tensor) -> Tensor:
    """Values as levels in (0, 1): what of the grid is lower, and half of what is equal."""
    grid = grid.sort().values
    below, upto = (torch.searchsorted(grid, values.contiguous(), right=right) for right in (False, True))
    return 0.5 * (below + upto).double() / len(grid)


def _verdict(late: float, aside: bool) -> str:
    said = density_verdict(-late)  # who enters late is improbable
    return "biased" if aside and said != "under-confident" else said
