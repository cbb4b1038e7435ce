"""The certificate: numbers about q and what they mean, in one frozen report.

A verdict needs more than one number. An effective sample size from few draws is optimistic, so the draws
are many, and the ESS of all of them is compared with that of a quarter: a share that falls as draws are
added is the mark of a tail not yet seen. And a k-hat above .7 condemns the weights, but q only by the mass
that its tail may hold: what draws saw, and what the tail holds beyond them if k-hat is two standard errors
higher.

status
    ok         draws of q may be used as they are: q is within total variation `_CLOSE` of p
    corrected  the weights are sound, and draws were resampled with them
    suspect    q is off, or could be: do not use raw draws for conclusions; the sentence says what may mend it
    failed     the weights say that q misses essential parts of p

What no such certificate can see is a mode that no draw came near, and an edge beyond which q is zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.certificate.weights import (
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    total_variation,
    unseen_mass,
)
from visbi.core.checks import violation

__all__ = ["Report", "certify"]

_KHAT_MAX = 0.7
_KHAT_HOPELESS = 1.0  # the weights have no mean
_MIN_ESS = 1000.0
_STABLE = 0.5
_SIGMAS = 2.0  # by which k-hat is raised to bound the mass that draws of q did not reach
_CLOSE = 0.1  # a perfect classifier between raw draws and exact ones is right at most 55 % of the time
_BROKEN = 0.01  # share of draws at which log p may be NaN or +inf
_ROUNDING = 1.0  # nats


@dataclass(frozen=True)
class Report:
    """How good q is.

    Attributes:
        status: "ok", "corrected", "suspect" or "failed".
        khat: Pareto shape of the weights' tail; -inf if the weights are constant.
        ess: effective sample size, a count.
        ess_fraction: the same as a share of the draws.
        log_evidence, log_evidence_se: of the potential's integral, in nats, and its standard error.
        total_variation: estimated distance between q and the posterior, 0 to 1; includes the mass of a tail
            that draws did not reach, extrapolated, if k-hat < 1.
        n_draws: draws of q behind these numbers.
        n_nonfinite: how many of them had a potential that was not finite.
        sentence: what it means and what to do next.
        stop_reason: why the fit ended, if it is known.
        proportionality: r^2 of the score "prop" or "prop_prior", if that was asked for.
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

    def __str__(self) -> str:
        lines = [
            f"{self.status}: {self.sentence}",
            f"k-hat {self.khat:.2f}, "
            f"ESS {self.ess:.0f} of {self.n_draws} draws ({100 * self.ess_fraction:.1f} %)",
            f"total variation from the posterior about {self.total_variation:.3f}",
            f"log-evidence {self.log_evidence:.3f} +- {self.log_evidence_se:.3f}",
        ]
        if self.n_nonfinite:
            lines.append(f"potential not finite at {self.n_nonfinite} draws")
        if self.stop_reason:
            lines.append(f"fit ended: {self.stop_reason}")
        return "\n".join(lines)


def certify(log_p: Tensor, log_q: Tensor, *, stop_reason: str = "") -> Report:
    """The certificate of q from its own draws.

    Args:
        log_p: potential at draws of q, (N,), unnormalised.
        log_q: log q at the same draws, (N,).
        stop_reason: carried into the report.

    Raises:
        ValueError: unlike shapes, or fewer than 25 draws.

    >>> theta = torch.randn(20_000, dtype=torch.float64)
    >>> log_q = -0.5 * theta.square() - 0.5 * math.log(2 * math.pi)
    >>> certify(-0.5 * theta.square(), log_q).status
    'ok'
    """
    log_p, log_q = log_p.detach(), log_q.detach()
    if log_p.ndim != 1 or log_p.shape != log_q.shape:
        shapes = f"{tuple(log_p.shape)} and {tuple(log_q.shape)}"
        raise ValueError(violation("log_p` and `log_q", "one shape (N,)", shapes))
    log_w = log_p.double() - log_q.double()
    smooth, khat = pareto_smooth(log_w)
    ess = effective_sample_size(log_w)
    evidence, error = log_evidence(log_w)
    seen = total_variation(log_w)
    unseen, at_most = (unseen_mass(smooth, khat, sigmas=sigmas) for sigmas in (0.0, _SIGMAS))
    distance = min(seen + unseen, 1.0) if math.isfinite(unseen) else seen
    status, sentence = _complaint(log_p) or _verdict(
        khat=khat,
        ess=ess,
        stability=_stability(log_w),
        distance=distance,
        at_most=seen + at_most,
        n=len(log_w),
    )
    return Report(
        status=status,
        khat=khat,
        ess=ess,
        ess_fraction=ess / len(log_w),
        log_evidence=evidence,
        log_evidence_se=error,
        total_variation=distance,
        n_draws=len(log_w),
        n_nonfinite=int((~torch.isfinite(log_w)).sum()),
        sentence=sentence,
        stop_reason=stop_reason,
    )


def _stability(log_w: Tensor) -> float:
    """ESS share of all draws over that of the first quarter."""
    quarter = log_w[: max(len(log_w) // 4, min(len(log_w), 25))]
    part = effective_sample_size(quarter) / len(quarter)
    return (effective_sample_size(log_w) / len(log_w)) / part if part > 0 else 0.0


def _complaint(log_p: Tensor) -> tuple[str, str] | None:
    """What is wrong with the potential itself, whatever q."""
    broken = float((log_p.isnan() | (log_p == math.inf)).double().mean())
    if broken > _BROKEN:
        return (
            "suspect",
            f"the potential is NaN or +inf at {100 * broken:.0f} % of the draws. Look at it there.",
        )
    magnitude = log_p[log_p.isfinite()].abs().double()
    rounding = torch.finfo(log_p.dtype).eps * float(magnitude.median()) if len(magnitude) else 0.0
    if rounding > _ROUNDING:
        return "suspect", (
            f"the potential is so large that it is rounded to {rounding:.0e} nats, which hides what it says "
            "about q. Subtract a constant from it, or compute it in float64."
        )
    return None


def _verdict(
    *, khat: float, ess: float, stability: float, distance: float, at_most: float, n: int
) -> tuple[str, str]:
    if ess <= 1.0 + 1e-9 or (khat >= _KHAT_HOPELESS and distance > _CLOSE):
        return "failed", (
            "q misses essential parts of the posterior. Try another family, more particles, or MCMC."
        )
    if ess < min(_MIN_ESS, n / 2) or stability <= _STABLE:
        return "suspect", (
            "q covers the posterior poorly; importance weights cannot be trusted to mend it. "
            "Train longer, or use a richer family."
        )
    if at_most <= _CLOSE:
        return "ok", "draws of q can be used as draws of the posterior."
    if distance <= _CLOSE:
        return "suspect", (
            "q agrees with the posterior where its draws fall, but the weights' tail is so heavy that mass "
            "beyond them cannot be excluded. Train longer, or use a richer family."
        )
    if khat >= min(1.0 - 1.0 / math.log10(n), _KHAT_MAX):
        return "suspect", (
            "raw draws of q differ visibly from the posterior, and the importance weights are too uneven to "
            "mend it. Train longer, or use a richer family."
        )
    return "suspect", (
        "q is near the posterior but raw draws of it differ visibly; "
        "the importance weights are sound, so resampling with them would mend it."
    )
