r"""Simulation-based calibration: are true values uniform among draws?

For pairs theta*, x of prior and simulator the ranks of theta* among draws of q(theta | x) are uniform if q
is right (Talts, Betancourt, Simpson, Vehtari, Gelman: Validating Bayesian inference algorithms with
simulation-based calibration. 2018). Ranks of each parameter alone cannot see a q that ignores x, or one with
wrong correlations; ranks of a quantity that depends on the data, such as the log-likelihood, can (Modrák,
Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari: Simulation-based calibration checking for Bayesian
computation: the choice of test quantities shapes sensitivity. 2023).

Draws must be independent: of a chain, take every k-th. Draws that were corrected by importance weights may be
given as they are; where few of them are distinct, truths fall beside all of them too often, and q is called
over-confident: what such draws say is.
"""

from collections.abc import Mapping, Sequence
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
    p_text,
    parameter_verdict,
    ranks_among,
    shift_score,
    spread_score,
    unit,
)
from visbi.certificate.uniformity import Curve, chi_squared, curve, holm
from visbi.core.checks import in_interval
from visbi.core.random import seeded
from visbi.core.types import Seed

__all__ = ["SBC", "sbc"]

_CENTRAL = 0.9


@dataclass(frozen=True, eq=False)
class SBC:
    """Ranks and what they say.

    Attributes:
        names: (Q,) parameters, then other quantities.
        verdicts: (Q,) of each: "calibrated", "over-confident", "under-confident", "biased", or
            "miscalibrated" where ranks are off in another way.
        p_values, corrected: (Q,) that its ranks are uniform, alone and corrected for Q (Holm).
        chi2_p_values: (Q,) the same from Pearson's test, uncorrected.
        shift, spread: (Q,) standard normal scores: the truth above the draws, the truth at their edges.
        ranks: (n_obs, Q) in 0 .. n_draws.
        curves: (Q,) of the ranks' cumulative shares.
        n_draws: draws for each observation.
        n_parameters: how many of the Q are parameters.
        alpha: chance of a false alarm.
    """

    names: tuple[str, ...]
    verdicts: tuple[str, ...]
    p_values: np.ndarray
    corrected: np.ndarray
    chi2_p_values: np.ndarray
    shift: np.ndarray
    spread: np.ndarray
    ranks: Tensor
    curves: tuple[Curve, ...]
    n_draws: int
    n_parameters: int
    alpha: float

    @property
    def verdict(self) -> str:
        """Of the whole: of several complaints the clearest one, a parameter's first."""
        complaints = self._complaints()
        return self.verdicts[complaints[0]] if complaints else "calibrated"

    @property
    def p_value(self) -> float:
        """Of the whole: the smallest corrected one."""
        return float(self.corrected.min())

    def __str__(self) -> str:
        n = len(self.ranks)
        if self.verdict == "calibrated":
            what = f"ranks of {', '.join(self.names)} are uniform"
            return f"calibrated: {what} over {n} observations ({p_text(self.p_value)})"
        return "; ".join(self._sentence(i) for i in self._complaints())

    def _complaints(self) -> list[int]:
        """What is not calibrated, parameters first, the clearest of them first."""
        score = np.maximum(np.abs(self.shift), np.abs(self.spread))
        wrong = [i for i, verdict in enumerate(self.verdicts) if verdict != "calibrated"]
        return sorted(wrong, key=lambda i: (i >= self.n_parameters, -score[i]))

    def _sentence(self, i: int) -> str:
        u, verdict = unit(self.ranks[:, i], self.n_draws), self.verdicts[i]
        name, p = self.names[i], p_text(self.corrected[i])
        if i >= self.n_parameters:
            share = 100 * float(u.mean())
            return f"{verdict} in {name}: the truth's is above {share:.0f} % of the draws' on average ({p})"
        if verdict == "biased":
            above = 100 * float((u > 0.5).double().mean())
            return f"biased in {name}: the truth lies above the median in {above:.0f} % of the cases ({p})"
        held = 100 * float(((u - 0.5).abs() <= _CENTRAL / 2).double().mean())
        return f"{verdict} in {name}: {100 * _CENTRAL:.0f} % intervals hold {held:.0f} % of the truths ({p})"


def sbc(
    theta: Tensor,
    draws: Tensor,
    *,
    log_densities: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    names: Sequence[str] | None = None,
    alpha: float = ALPHA,
    seed: Seed = None,
) -> SBC:
    """Rank true parameters among draws and test the ranks for uniformity.

    Args:
        theta: true parameters, (n_obs, D).
        draws: of q(theta | x) for the x of each, (n_draws, n_obs, D), independent.
        log_densities: by name, what depends on the data, at the truth (n_obs,) and at the draws (n_draws,
            n_obs): a log-likelihood, a potential, log q. Minus infinity is a value like others.
        names: of the D parameters.
        alpha: chance that a right q is called wrong, over all quantities.
        seed: of the ties; None for torch's global generator.

    Raises:
        ValueError: shapes that do not fit, less than 20 observations or 10 draws, numbers not finite, or
            `alpha` not in (0, 1).

    >>> from visbi.core.random import seeded
    >>> with seeded(1):
    ...     theta = torch.randn(300, 1)
    ...     x = theta + torch.randn(300, 1)
    ...     right = x / 2 + 0.5**0.5 * torch.randn(100, 300, 1)
    ...     narrow = x / 2 + 0.3 * torch.randn(100, 300, 1)
    >>> print(sbc(theta, right, seed=1))
    calibrated: ranks of theta_1 are uniform over 300 observations (p = 0.87)
    >>> sbc(theta, narrow, seed=1).verdict
    'over-confident'
    """
    theta, draws = checked_pairs(theta, draws)
    alpha = in_interval("alpha", alpha, 0, 1)
    n_draws, _, dim = draws.shape
    labels = [*checked_names(names, dim)]
    with seeded(seed):
        columns = [ranks_among(theta, draws)]
        for label, (at_truth, at_draws) in (log_densities or {}).items():
            columns.append(ranks_among(*checked_densities(label, at_truth, at_draws, draws))[:, None])
            labels.append(label)
    return _judged(torch.cat(columns, 1), tuple(labels), n_draws, dim, alpha)


def _judged(ranks: Tensor, names: tuple[str, ...], n_draws: int, dim: int, alpha: float) -> SBC:
    possible = torch.arange(n_draws + 1)
    curves = tuple(curve(column, possible) for column in ranks.unbind(1))
    p_values = np.array([each.p_value for each in curves])
    corrected = holm(p_values)
    u = unit(ranks, n_draws)
    shift, spread = shift_score(u).numpy(), spread_score(u, n_draws).numpy()
    said = [
        parameter_verdict(shift[i], spread[i]) if i < dim else density_verdict(shift[i])
        for i in range(len(names))
    ]
    return SBC(
        names=names,
        verdicts=tuple("calibrated" if p >= alpha else s for p, s in zip(corrected, said, strict=True)),
        p_values=p_values,
        corrected=corrected,
        chi2_p_values=np.array([chi_squared(column, n_draws + 1) for column in ranks.unbind(1)]),
        shift=shift,
        spread=spread,
        ranks=ranks,
        curves=curves,
        n_draws=n_draws,
        n_parameters=dim,
        alpha=alpha,
    )
