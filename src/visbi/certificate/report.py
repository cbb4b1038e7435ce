"""What a certificate says: numbers about q and what they mean, in one frozen report (`verdict` makes it).

status
    ok         draws of q may be used as they are
    corrected  the weights are sound, and draws were resampled with them
    suspect    q is off, or could be: do not use raw draws for conclusions; the sentence says what may mend it
    failed     the weights say that q misses essential parts of p
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import shorten

from visbi.certificate.modes import Mode

__all__ = ["GOOD", "FitError", "Report"]

GOOD = ("ok", "corrected")
"""Statuses of fits whose draws, corrected ones of the second, may be used."""
_STORY = 160  # characters of it in a printed report; all of it is in `Report.story`


@dataclass(frozen=True)
class Report:
    """How good q is.

    Attributes:
        status: "ok", "corrected", "suspect" or "failed".
        khat: Pareto shape of the weights' tail; -inf if the weights are constant.
        ess: effective sample size, a count.
        ess_fraction: the same as a share of the draws.
        log_evidence, log_evidence_se: of the potential's integral, in nats, and its standard error: that
            of the mean weight, and the mass that their tail may hold beyond the largest (k-hat raised by one
            of its standard errors), without which it is several times too small where the tail is heavy;
            infinite where the weights may have no mean.
        total_variation: estimated distance between q and the posterior, 0 to 1; includes the mass of a tail
            that draws did not reach, extrapolated, if k-hat < 1.
        n_draws: draws of q behind these numbers.
        n_nonfinite: how many of them had a potential that was not finite.
        sentence: what it means and what to do next.
        stop_reason: why the fit ended, if it is known.
        proportionality: r^2 of the score "prop" or "prop_prior", if that was asked for.
        kl_reverse, kl_forward: estimates of KL(q || p) and KL(p || q), in nats.
        modes: of the posterior, with weights and places, where they were looked for.
        n_searched: points from which modes were looked for: draws of the prior, or, in more than five
            dimensions, those that were led uphill; see `least_share`.
        rung: which way of the automatic fit answered, and
        story: why the earlier ones did not.
        n_values, n_gradients: evaluations of the potential during the fit, without and with gradient.
        seconds: wall time of the fit; left out of comparisons.
        seed: of the fit, or None.
    """

    status: str
    khat: float
    ess: float
    ess_fraction: float
    log_evidence: float
    log_evidence_se: float
    total_variation: float
    n_draws: int
    n_nonfinite: int
    sentence: str
    stop_reason: str = ""
    proportionality: float | None = None
    kl_reverse: float = math.nan
    kl_forward: float = math.nan
    modes: tuple[Mode, ...] = ()
    n_searched: int = 0
    rung: str = ""
    story: tuple[str, ...] = ()
    n_values: int = 0
    n_gradients: int = 0
    seconds: float = field(default=math.nan, compare=False)
    seed: int | None = None

    @property
    def least_share(self) -> float:
        """Share of the prior's mass that a mode and its slopes must hold to be met with 95 % probability.

        By n draws of the prior: 3 / n (the rule of three). What is narrower than that may have been missed,
        and no certificate from draws of q can know; NaN where nothing was searched. Roughly, where points
        were led uphill: these lie wider than the posterior and closer than the prior.
        """
        return 3 / self.n_searched if self.n_searched else math.nan

    @property
    def _evidence_error(self) -> str:
        if math.isinf(self.log_evidence_se):
            return "with an unknown error: the weights may have no mean"
        return f"+- {self.log_evidence_se:.3f}"

    def __str__(self) -> str:
        lines = [
            f"{self.status}: {self.sentence}",
            f"k-hat {self.khat:.2f}, "
            f"ESS {self.ess:.0f} of {self.n_draws} draws ({100 * self.ess_fraction:.1f} %)",
            f"from the posterior: total variation {self.total_variation:.3f}, "
            f"KL(q, p) {self.kl_reverse:.3f}, KL(p, q) {self.kl_forward:.3f} nats",
            f"log-evidence {self.log_evidence:.3f} {self._evidence_error}",
        ]
        if self.modes or self.n_searched:
            unseen = f"; one that reaches less than {self.least_share:.0e} of the prior may be missed"
            lines.append(_modes_line(self.modes) + (unseen if self.n_searched else ""))
        if self.rung:
            story = shorten("; ".join(self.story), _STORY, placeholder=" ...")
            lines.append(f"answered by {self.rung}" + (f"; before: {story}" if story else ""))
            seed = "" if self.seed is None else f", seed {self.seed}"
            lines.append(
                f"{self.n_values} evaluations of the potential, {self.n_gradients} more with gradient, "
                f"{self.seconds:.1f} s{seed}"
            )
        if self.n_nonfinite:
            lines.append(f"potential not finite at {self.n_nonfinite} draws")
        if self.stop_reason:
            lines.append(f"fit ended: {self.stop_reason}")
        return "\n".join(lines)


class FitError(RuntimeError):
    """The automatic fit found nothing that can be used.

    Attributes:
        report: why.
        posterior: the best that there was, all the same.
    """

    def __init__(self, report: Report, posterior: object) -> None:
        super().__init__(f"{report}\nPass allow_failed=True to keep the fit.")
        self.report, self.posterior = report, posterior


def _modes_line(modes: Sequence[Mode]) -> str:
    """Weights, and places where they are few and short."""
    if not modes:
        return "modes not told apart"
    if len(modes) == 1:
        return "one mode"
    weights = ", ".join(f"{mode.weight:.2f}" for mode in modes[:8])
    more = "" if len(modes) <= 8 else f" and {len(modes) - 8} more"
    short = len(modes) <= 4 and len(modes[0].place) <= 3
    at = [f"({', '.join(f'{v:.3g}' for v in mode.place)})" for mode in modes] if short else []
    return f"{len(modes)} modes of weights {weights}{more}" + (f" at {', '.join(at)}" if at else "")
