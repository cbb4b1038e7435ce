"""The certificate: from the weights of q's draws to a report.

A verdict needs more than one number. An effective sample size from few draws is optimistic, so the draws
are many, and the ESS of all of them is compared with that of a quarter (of smoothed weights: one raw weight
may halve it by chance): a share that falls as draws are added is the mark of a tail not yet seen. And a
k-hat above .7 condemns the weights, but q only by the mass that its tail may hold: what draws saw, and what
the tail holds beyond them if k-hat is two standard errors higher. "ok" takes a total variation of at most
`_CLOSE` between q and p.

What no such certificate can see is a mode that no draw came near, and an edge beyond which q is zero.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visbi.certificate.report import GOOD, Report
from visbi.certificate.rows import (
    cleaned,
    divergences,
    effective_sample_size,
    log_evidence,
    pareto_smooth,
    tail_mass,
    total_variation,
    unseen_mass,
)
from visbi.core.checks import violation

__all__ = ["BROKEN", "broken_sentence", "certify", "certify_many", "recertified"]

_KHAT_MAX = 0.7
_KHAT_HOPELESS = 1.0  # the weights have no mean
_MIN_ESS = 1000.0
_STABLE = 0.5
_BEYOND = (
    0.05  # mass beyond the largest weights that resampled draws may lack; costs a classifier .025 at most
)
_SIGMAS = 2.0  # by which k-hat is raised to bound the mass that draws of q did not reach
_CLOSE = 0.1  # a perfect classifier between raw draws and exact ones is right at most 55 % of the time
BROKEN = 0.01
"""Share of draws at which log p may be NaN or +inf."""
_AT_ONCE = 2**16  # weights: what stays in a processor's cache
_ROUNDING = 1.0  # nats
_WEIGHED = ("khat", "ess", "stability", "distance", "at_most", "beyond")  # by the verdict
_TRY = {  # what may mend q: one that was trained, and one whose draws are corrected
    False: "Train longer, or use a richer family.",
    True: "Run MCMC from its draws to be sure.",
}
_IMPOSSIBLE = -1e29  # and lower stands for minus infinity: no log-density is there by itself


def certify(
    log_p: Tensor,
    log_q: Tensor,
    *,
    stop_reason: str = "",
    resampled: bool = False,
    doubts: Sequence[str] = (),
) -> Report:
    """The certificate of q from its own draws.

    Args:
        log_p: potential at draws of q, (N,), unnormalised.
        log_q: log q at the same draws, (N,).
        stop_reason: carried into the report.
        resampled: whether draws are resampled with these weights before they are used; where that mends them,
            the status is "corrected" and not "suspect".
        doubts: what else speaks against q; the first one makes a good status "suspect".

    Raises:
        ValueError: unlike shapes, or fewer than 25 draws.

    >>> theta = torch.randn(20_000, dtype=torch.float64)
    >>> log_q = -0.5 * theta.square() - 0.5 * math.log(2 * math.pi)
    >>> certify(-0.5 * theta.square(), log_q).status
    'ok'
    """
    if log_p.ndim != 1 or log_p.shape != log_q.shape:
        shapes = f"{tuple(log_p.shape)} and {tuple(log_q.shape)}"
        raise ValueError(violation("log_p` and `log_q", "one shape (N,)", shapes))
    return certify_many(
        log_p[None], log_q[None], stop_reason=stop_reason, resampled=resampled, doubts=[doubts]
    )[0]


def certify_many(
    log_p: Tensor,
    log_q: Tensor,
    *,
    stop_reason: str = "",
    resampled: bool = False,
    doubts: Sequence[Sequence[str]] | None = None,
) -> list[Report]:
    """The certificates of F fits, each as by `certify`, the numbers of all of them at once.

    Args:
        log_p, log_q: (F, N): potential and log q at N draws of every q.
        stop_reason, resampled: as there, for all.
        doubts: as there, for each; None: none.

    Raises:
        ValueError: unlike shapes, fewer than 25 draws, or other doubts than fits.

    >>> theta = torch.tensor([[1.0], [1.5]]) * torch.randn(20_000, dtype=torch.float64)
    >>> log_q = -0.5 * (theta / torch.tensor([[1.0], [1.5]])).square()
    >>> tuple(report.status for report in certify_many(-0.5 * theta.square(), log_q, resampled=True))
    ('ok', 'corrected')
    """
    log_p, log_q = log_p.detach(), log_q.detach()
    if log_p.ndim != 2 or log_p.shape != log_q.shape:
        shapes = f"{tuple(log_p.shape)} and {tuple(log_q.shape)}"
        raise ValueError(violation("log_p` and `log_q", "one shape (F, N)", shapes))
    count, n = log_p.shape
    if doubts is not None and len(doubts) != count:
        raise ValueError(violation("doubts", f"one entry for each of {count} fits", len(doubts)))
    doubts = [()] * count if doubts is None else doubts
    at_once = max(1, _AT_ONCE // n)
    reports = []
    for k in range(0, count, at_once):
        rows = slice(k, k + at_once)
        reports += _certified(log_p[rows], log_q[rows], stop_reason, resampled, doubts[rows])
    return reports


def _certified(
    log_p: Tensor, log_q: Tensor, stop_reason: str, resampled: bool, doubts: Sequence[Sequence[str]]
) -> list[Report]:
    log_p = torch.where(log_p > _IMPOSSIBLE, log_p, torch.where(log_p.isnan(), log_p, -torch.inf))
    log_w = cleaned(log_p.double() - log_q.double())
    numbers, complaints, n = _numbers(log_w), _complaints(log_p), log_p.shape[1]
    reports = []
    for i in range(len(log_p)):
        found = {name: column[i] for name, column in numbers.items()}
        status, sentence = complaints[i] or _verdict(
            **{name: found[name] for name in _WEIGHED}, n=n, resampled=resampled
        )
        if doubts[i] and status in GOOD:
            status, sentence = "suspect", doubts[i][0]
        reports.append(
            Report(
                status=status,
                khat=found["khat"],
                ess=found["ess"],
                ess_fraction=found["ess"] / n,
                log_evidence=found["log_evidence"],
                log_evidence_se=found["log_evidence_se"],
                total_variation=found["distance"],
                n_draws=n,
                n_nonfinite=int(found["n_nonfinite"]),
                sentence=sentence,
                stop_reason=stop_reason,
                kl_reverse=found["kl_reverse"],
                kl_forward=found["kl_forward"],
            )
        )
    return reports


def _numbers(log_w: Tensor) -> dict[str, list[float]]:
    """What a report and its verdict are made from, F numbers of each, from (F, N)."""
    smooth, khat = pareto_smooth(log_w)
    seen, tail = total_variation(log_w), tail_mass(smooth)
    unseen, beyond, at_most = (unseen_mass(tail, khat, sigmas=sigmas) for sigmas in (0.0, 1.0, _SIGMAS))
    evidence, error = log_evidence(log_w)
    reverse, forward = divergences(log_w)
    numbers = {
        "khat": khat,
        "ess": effective_sample_size(log_w),
        "stability": _stability(smooth),
        "distance": torch.where(unseen.isfinite(), (seen + unseen).clamp_max(1.0), seen),
        "at_most": seen + at_most,
        "beyond": beyond,
        "log_evidence": evidence,
        "log_evidence_se": torch.hypot(error, beyond),
        "kl_reverse": reverse,
        "kl_forward": forward,
        "n_nonfinite": (~torch.isfinite(log_w)).sum(1),
    }
    return {name: column.tolist() for name, column in numbers.items()}


def recertified(report: Report, log_p: Tensor, log_q: Tensor) -> Report:
    """The certificate of an automatic fit from other draws of the same q.

    Args:
        report: what the fit said: how it went stays, and its doubts do.
        log_p, log_q: (N,), as for `certify`.

    >>> before = certify(torch.zeros(99), torch.zeros(99), doubts=["a mode may be missing."])
    >>> recertified(before, torch.zeros(99), torch.zeros(99)).sentence
    'a mode may be missing.'
    """
    doubts = [] if report.status in GOOD else [report.sentence]
    fresh = certify(log_p, log_q, stop_reason=report.stop_reason, resampled=True, doubts=doubts)
    kept = ("modes", "n_searched", "rung", "story", "n_values", "n_gradients", "seconds", "seed")
    return replace(fresh, **{name: getattr(report, name) for name in kept})


def broken_sentence(share: float) -> str:
    """What is wrong with a potential that is NaN or +inf at this share of draws.

    >>> broken_sentence(0.25)
    'the potential is NaN or +inf at 25 % of the draws. Look at it there.'
    """
    return f"the potential is NaN or +inf at {100 * share:.0f} % of the draws. Look at it there."


def _stability(log_w: Tensor) -> Tensor:
    """ESS share of all draws over that of the first quarter, (F,), from (F, N)."""
    n = log_w.shape[1]
    quarter = log_w[:, : max(n // 4, min(n, 25))]
    part = effective_sample_size(quarter) / quarter.shape[1]
    return torch.where(part > 0, (effective_sample_size(log_w) / n) / part, 0.0)


def _complaints(log_p: Tensor) -> list[tuple[str, str] | None]:
    """What is wrong with each potential itself, whatever q, from (F, N)."""
    broken = (log_p.isnan() | (log_p == math.inf)).double().mean(1)
    magnitude = torch.where(log_p.isfinite(), log_p.abs(), torch.nan).nanmedian(1).values  # NaN of none
    rounding = torch.finfo(log_p.dtype).eps * magnitude.double()
    return [_complaint(*pair) for pair in zip(broken.tolist(), rounding.tolist(), strict=True)]


def _complaint(broken: float, rounding: float) -> tuple[str, str] | None:
    if broken > BROKEN:
        return "suspect", broken_sentence(broken)
    if rounding > _ROUNDING:
        return "suspect", (
            f"the potential is so large that it is rounded to {rounding:.0e} nats, which hides what it says "
            "about q. Subtract a constant from it, or compute it in float64."
        )
    return None


def _verdict(
    *,
    khat: float,
    ess: float,
    stability: float,
    distance: float,
    at_most: float,
    beyond: float,
    n: int,
    resampled: bool,
) -> tuple[str, str]:
    advice = _TRY[resampled]
    if ess <= 1.0 + 1e-9 or (khat >= _KHAT_HOPELESS and distance > _CLOSE):
        return "failed", (
            "q misses essential parts of the posterior. "
            + ("Run MCMC." if resampled else "Try another family, more particles, or MCMC.")
        )
    if ess < min(_MIN_ESS, n / 2) or stability <= _STABLE:
        return "suspect", (
            f"q covers the posterior poorly; importance weights cannot be trusted to mend it. {advice}"
        )
    if at_most <= _CLOSE:
        return "ok", "draws of q can be used as draws of the posterior."
    sound = khat < min(1.0 - 1.0 / math.log10(n), _KHAT_MAX) or (resampled and beyond <= _BEYOND)
    if resampled and sound:
        return "corrected", "raw draws of q differ visibly from the posterior; resampled ones can be used."
    if distance <= _CLOSE:
        return "suspect", (
            "q agrees with the posterior where its draws fall, but the weights' tail is so heavy that mass "
            f"beyond them cannot be excluded. {advice}"
        )
    if not sound:
        return "suspect", (
            "raw draws of q differ visibly from the posterior, and the importance weights are too uneven to "
            f"mend it. {advice}"
        )
    return "suspect", (
        "q is near the posterior but raw draws of it differ visibly; "
        "the importance weights are sound, so resampling with them would mend it."
    )
