"""The certificate: numbers about q and what they mean, in one frozen report.

A verdict needs more than one number. An effective sample size from few draws is optimistic, so the draws
are many, and the ESS of all of them is compared with that of a quarter (of smoothed weights: one raw weight
may halve it by chance): a share that falls as draws are added is the mark of a tail not yet seen. And a
k-hat above .7 condemns the weights, but q only by the mass that its tail may hold: what draws saw, and what
the tail holds beyond them if k-hat is two standard errors higher.

status
    ok         draws of q may be used as they are: q is within total variation `_CLOSE` of p
    corrected  the weights are sound, and draws were resampled with them
    suspect    q is off, or could be: do not use raw draws for conclusions; the sentence says what may mend it
    failed     the weights say that q misses essential parts of p

What no such certificate can see is a mode that no draw came near, and an edge beyond which q is zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten

import torch
from torch import Tensor

from visbi.certificate.modes import Mode
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

__all__ = [
    "BROKEN",
    "GOOD",
    "FitError",
    "Report",
    "broken_sentence",
    "certify",
    "certify_many",
    "recertified",
]

GOOD = ("ok", "corrected")
"""Statuses of fits whose draws, corrected ones of the second, may be used."""
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
_STORY = 160  # characters of it in a printed report; all of it is in `Report.story`
_IMPOSSIBLE = -1e29  # and lower stands for minus infinity: no log-density is there by itself


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
        n_searched: draws of the prior from which modes were looked for; see `least_share`.
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
        and no certificate from draws of q can know; NaN where nothing was searched.
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
