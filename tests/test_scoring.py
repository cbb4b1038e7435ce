"""Scores of a fit: the certificate and what is said of it, from fits whose quality is known."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from posterior_cases import alone_and_seeded, real
from visbi import scoring
from visbi.certificate import certify
from visbi.fitting.gradient import Trace
from visbi.fitting.state import AutoFit
from visbi.scoring import Score, certificate, scored

__all__ = ["alone_and_seeded"]

POOR = "q is not proportional to the potential there. Train longer, or use a richer family."
GOOD = "draws of q can be used as draws of the posterior."


class Gaussian:
    """N(0, scale^2) in 2D; it keeps how many draws were asked for."""

    def __init__(self, scale: float = 1.0) -> None:
        self.law, self.asked = Independent(Normal(torch.zeros(2).double(), scale), 1), []

    def sample(self, shape: Any) -> Tensor:
        self.asked.append(tuple(shape))
        return self.law.sample(torch.Size(shape))

    def sample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        theta = self.sample((n,))
        return theta, self.law.log_prob(theta)

    def log_prob(self, theta: Tensor) -> Tensor:
        return self.law.log_prob(theta)


def log_p(theta: Tensor) -> Tensor:
    assert not torch.is_grad_enabled()
    return Normal(0.0, 1.0).log_prob(theta).sum(-1)


def fit(scale: float = 1.0, stop_reason: str = "stopped", cut_short: bool = False) -> Any:
    trace = SimpleNamespace(stop_reason=stop_reason, cut_short=cut_short)
    return SimpleNamespace(family=Gaussian(scale), x=None, trace=trace)


def test_a_certificate_counts_and_says_why_the_fit_ended() -> None:
    report = certificate(fit(), log_p, 1000)
    assert (report.n_draws, report.status, report.stop_reason) == (1000, "ok", "stopped")
    assert report.log_evidence == pytest.approx(0.0, abs=1e-9)
    assert scoring.CERTIFICATE_DRAWS == 50_000


def test_a_fit_that_was_cut_short_is_suspect() -> None:
    report = certificate(fit(stop_reason="ran out of time", cut_short=True), log_p, 1000)
    assert (report.status, report.sentence) == ("suspect", "the fit ran out of time. Give it more.")


def test_an_automatic_fit_keeps_what_it_knows() -> None:
    before = certify(torch.zeros(99), torch.zeros(99), doubts=["a mode may be missing."])
    automatic: Any = AutoFit(Gaussian(), None, Trace((), ""), None, before, None)  # type: ignore[arg-type]
    report = certificate(automatic, log_p, 1000)
    assert (report.n_draws, report.sentence) == (1000, "a mode may be missing.")


def score(metric: str, scale: float, n: int = 5000, prior: Any = None) -> Score:
    one = fit(scale)
    with torch.no_grad():
        report = certify(*(torch.randn(2000).double(),) * 2)
    return scored(metric, report, one, log_p, prior or real(), n)


def test_the_score_psis() -> None:
    report = certificate(fit(0.5), log_p, 5000)
    said = scored("psis", report, fit(), log_p, real(), 100)
    assert said.poor and said.report is report and said.advice == report.sentence
    assert said.brief == f"k-hat {report.khat:.2f}"
    assert said.line == f"k-hat {report.khat:.3f} (suspect): {report.sentence}"


@pytest.mark.parametrize(
    ("status", "poor"), [("ok", False), ("corrected", False), ("suspect", True), ("failed", True)]
)
def test_which_certificates_are_poor(status: str, poor: bool) -> None:
    report: Any = SimpleNamespace(status=status, khat=0.0, sentence="so.")
    assert scored("psis", report, fit(), log_p, real(), 100).poor is poor


@pytest.mark.parametrize("metric", ["prop", "prop_prior"])
def test_a_good_score_of_proportionality(metric: str) -> None:
    said = score(metric, 1.0)
    assert not said.poor and said.report.proportionality == pytest.approx(1.0)
    assert said.brief == f"{metric} r^2 1.00" and said.advice == GOOD
    assert said.line == f"{metric} r^2 1.000 (1 is best): {GOOD}"


@pytest.mark.parametrize("metric", ["prop", "prop_prior"])
def test_a_poor_score_of_proportionality(metric: str) -> None:
    said = score(metric, 2.0)
    r2 = said.report.proportionality
    assert said.poor and r2 is not None and r2 < 0.8 and said.report.status == "ok"
    assert said.brief == f"{metric} r^2 {r2:.2f}" and said.advice == POOR
    assert said.line == f"{metric} r^2 {r2:.3f} (1 is best): {POOR}"


@pytest.mark.parametrize(("r2", "poor"), [(0.79, True), (0.8, False), (0.81, False)])
def test_where_a_score_becomes_poor(monkeypatch: pytest.MonkeyPatch, r2: float, poor: bool) -> None:
    monkeypatch.setattr("visbi.scoring.proportionality", lambda log_p, log_q: r2)
    assert score("prop", 1.0).poor is poor


def test_where_the_scores_draw() -> None:
    """At draws of the prior N(0, 4^2) hardly anything but the peak counts, at those of q its surroundings."""
    one, prior = fit(0.5), Gaussian(4.0)
    report = certificate(one, log_p, 1000)
    one.family.asked.clear()
    scored("prop", report, one, log_p, prior, 700)  # type: ignore[arg-type]
    assert one.family.asked == [(700,)] and prior.asked == []
    scored("prop_prior", report, one, log_p, prior, 300)  # type: ignore[arg-type]
    assert one.family.asked == [(700,)] and prior.asked == [(300,)]
    assert math.isfinite(report.khat)
