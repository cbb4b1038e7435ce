"""The certificate: numbers about q and what they mean, in one frozen report.

A verdict needs more than one number. k-hat alone is blind to a tail that q's draws never reached, and an effective
sample size from few draws is optimistic; so the draws are many, and the ESS of all of them is compared with that of a
quarter of them: a share that falls as draws are added is the mark of a tail not yet seen. And a k-hat above its limit
condemns q only if the tail that it describes holds mass.

status
    ok         draws of q may be used as they are: the weights are sound and q is within total variation `_CLOSE` of p
    corrected  the weights are sound, and draws were resampled with them
    suspect    q is off, but not beyond what resampling or more work could mend; do not use raw draws for conclusions
    failed     the weights say that q misses essential parts of p

What no such certificate can see is a mode that no draw came near.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.certificate.weights import (
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    tail_excess,
    total_variation,
)

__all__ = ["Report", "certify"]

_KHAT_MAX = 0.7
_MIN_ESS = 1000.0
_STABLE = 0.5
_NEGLIGIBLE = 0.01  # of p's mass
_CLOSE = 0.1  # a perfect classifier between raw draws and exact ones is right at most 55 % of the time
_KHAT_HOPELESS = 1.0  # the weights have no mean


@dataclass(frozen=True)
class Report:
    """How good q is.

    Attributes:
        status: "ok", "corrected", "suspect" or "failed".
        khat: Pareto shape of the weights' tail; -inf if the weights are constant.
        ess: effective sample size, a count.
        ess_fraction: the same as a share of the draws.
        log_evidence, log_evidence_se: of the potential's integral, in nats, and its standard error.
        total_variation: estimated distance between q and the posterior, 0 to 1.
        n_draws: draws of q behind these numbers.
        n_nonfinite: how many of them had a potential that was not finite.
        sentence: what it means and what to do next.
        stop_reason: why the fit ended, if it is known.
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

    def __str__(self) -> str:
        lines = [
            f"{self.status}: {self.sentence}",
            f"k-hat {self.khat:.2f}, ESS {self.ess:.0f} of {self.n_draws} draws ({100 * self.ess_fraction:.1f} %)",
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

    >>> theta = torch.randn(20_000, dtype=torch.float64)
    >>> log_q = -0.5 * theta.square() - 0.5 * math.log(2 * math.pi)
    >>> certify(-0.5 * theta.square(), log_q).status
    'ok'
    """
    log_w = log_p.detach().double() - log_q.detach().double()
    n = len(log_w)
    smooth, khat = pareto_smooth(log_w)
    ess = effective_sample_size(log_w)
    evidence, error = log_evidence(log_w)
    distance = total_variation(log_w)
    status, sentence = _verdict(khat, tail_excess(smooth, khat), ess, _stability(log_w), distance, n)
    return Report(
        status=status,
        khat=khat,
        ess=ess,
        ess_fraction=ess / n,
        log_evidence=evidence,
        log_evidence_se=error,
        total_variation=distance,
        n_draws=n,
        n_nonfinite=int((~torch.isfinite(log_w)).sum()),
        sentence=sentence,
        stop_reason=stop_reason,
    )


def _stability(log_w: Tensor) -> float:
    """ESS share of all draws over that of the first quarter."""
    quarter = log_w[: max(len(log_w) // 4, min(len(log_w), 25))]
    part = effective_sample_size(quarter) / len(quarter)
    return (effective_sample_size(log_w) / len(log_w)) / part if part > 0 else 0.0


def _verdict(khat: float, excess: float, ess: float, stability: float, distance: float, n: int) -> tuple[str, str]:
    limit = min(1.0 - 1.0 / math.log10(n), _KHAT_MAX)
    if khat >= _KHAT_HOPELESS or ess <= 1.0 + 1e-9:
        return "failed", "q misses essential parts of the posterior. Try another family, more particles, or MCMC."
    heavy = khat >= limit and excess > _NEGLIGIBLE
    if heavy or ess < min(_MIN_ESS, n / 2) or stability <= _STABLE:
        return "suspect", (
            "q covers the posterior poorly; importance weights cannot be trusted to mend it. "
            "Train longer, or use a richer family."
        )
    if distance > _CLOSE:
        return "suspect", (
            "q is near the posterior but raw draws of it differ visibly; "
            "the importance weights are sound, so resampling with them would mend it."
        )
    return "ok", "draws of q can be used as draws of the posterior."
