"""Reports number by number: thresholds of the verdict from both sides, lines and fields to the letter."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Normal

from visbi.certificate import Mode, Report, certify, total_variation
from visbi.certificate import verdict as module
from visbi.certificate.verdict import recertified
from visbi.certificate.weights import pareto_smooth, unseen_mass

N = 50_000
SENTENCES = {
    "failed": "q misses essential parts of the posterior. Try another family, more particles, or MCMC.",
    "poorly": "q covers the posterior poorly; importance weights cannot be trusted to mend it. "
    "Train longer, or use a richer family.",
    "ok": "draws of q can be used as draws of the posterior.",
    "corrected": "raw draws of q differ visibly from the posterior; resampled ones can be used.",
    "beyond": "q agrees with the posterior where its draws fall, but the weights' tail is so heavy that mass "
    "beyond them cannot be excluded. Train longer, or use a richer family.",
    "uneven": "raw draws of q differ visibly from the posterior, and the importance weights are too uneven "
    "to mend it. Train longer, or use a richer family.",
    "near": "q is near the posterior but raw draws of it differ visibly; "
    "the importance weights are sound, so resampling with them would mend it.",
}


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("near", {}),
        ("failed", dict(ess=1.0)),
        ("poorly", dict(ess=1.5)),
        ("poorly", dict(ess=999.0)),
        ("near", dict(ess=1000.0)),
        ("poorly", dict(n=1000, ess=499.0)),
        ("near", dict(n=1000, ess=500.0)),
        ("failed", dict(khat=1.0)),
        ("uneven", dict(khat=0.999)),
        ("beyond", dict(khat=1.0, distance=0.1)),
        ("poorly", dict(stability=0.5)),
        ("near", dict(stability=0.51)),
        ("ok", dict(at_most=0.1)),
        ("ok", dict(at_most=0.1, resampled=True)),
        ("near", dict(at_most=0.11)),
        ("uneven", dict(khat=0.7)),
        ("near", dict(khat=0.69)),
        ("uneven", dict(n=1000, khat=0.67)),
        ("near", dict(n=1000, khat=0.66)),
        ("corrected", dict(resampled=True)),
        ("corrected", dict(resampled=True, beyond=0.06)),
        ("corrected", dict(resampled=True, khat=0.8, beyond=0.05)),
        ("uneven", dict(resampled=True, khat=0.8, beyond=0.06)),
        ("uneven", dict(khat=0.8, beyond=0.01)),
        ("beyond", dict(distance=0.1)),
        ("near", dict(distance=0.11)),
    ],
)
def test_thresholds(expected, changes):
    near = dict(khat=0.5, ess=2000.0, stability=1.0, distance=0.2, at_most=0.3, beyond=0.01, n=100_000)
    if expected == "beyond" and "khat" not in changes:
        near["khat"] = 0.8
    status = expected if expected in ("ok", "corrected", "failed") else "suspect"
    numbers = {**near, "resampled": False, **changes}
    said = SENTENCES[expected]
    if numbers["resampled"]:  # nothing is to be trained there
        said = said.replace("Train longer, or use a richer family.", "Run MCMC from its draws to be sure.")
    assert module._verdict(**numbers) == (status, said)


def heavy_tail(k):
    return -k * torch.rand(N, dtype=torch.float64).log()


def test_the_distance_is_what_was_seen_and_what_was_not(monkeypatch):
    log_w = heavy_tail(0.6)
    smooth, khat = pareto_smooth(log_w)
    seen, unseen = total_variation(log_w), unseen_mass(smooth, khat)
    assert unseen > 0.001
    assert certify(log_w, torch.zeros(N)).total_variation == pytest.approx(seen + unseen, abs=1e-9)
    heavier = heavy_tail(1.5)
    assert certify(heavier, torch.zeros(N)).total_variation == total_variation(heavier)
    monkeypatch.setattr(module, "unseen_mass", lambda tail, khat, sigmas: torch.full_like(khat, 5.0))
    assert certify(log_w, torch.zeros(N)).total_variation == 1.0


def test_how_far_k_hat_is_raised(monkeypatch):
    asked, given = [], {}

    def unseen_mass(tail, khat, sigmas):
        asked.append(sigmas)
        return torch.full_like(khat, sigmas)

    monkeypatch.setattr(module, "unseen_mass", unseen_mass)
    monkeypatch.setattr(module, "_verdict", lambda **found: given.update(found) or ("ok", ""))
    log_w = heavy_tail(0.2)
    certify(log_w, torch.zeros(N), resampled=True)
    assert sorted(asked) == [0.0, 1.0, 2.0]
    seen = total_variation(log_w)
    assert (given["distance"], given["at_most"], given["beyond"]) == (seen, seen + 2.0, 1.0)
    assert given["n"] == N and given["resampled"] is True


@pytest.mark.parametrize(("n", "first"), [(60, 25), (200, 50), (1000, 250)])
def test_stability_compares_all_with_a_quarter(n, first):
    log_w = torch.randn(n, dtype=torch.float64)
    shares = [float(w.sum() ** 2 / w.square().sum()) / len(w) for w in (log_w.exp(), log_w[:first].exp())]
    assert float(module._stability(log_w[None])) == pytest.approx(shares[0] / shares[1])
    log_w[:first] = -math.inf
    assert float(module._stability(log_w[None])) == 0.0


def test_one_broken_draw_in_a_hundred_may_be():
    log_q = Normal(0.0, 1.0).log_prob(torch.randn(10_000, dtype=torch.float64))
    for broken, sound in ((100, True), (101, False), (10_000, False)):
        log_p = log_q.clone()
        log_p[:broken] = math.nan
        assert (certify(log_p, log_q).status == "ok") is sound
    assert "NaN or +inf at 100 % of the draws" in certify(log_p, log_q).sentence


def test_a_nat_of_rounding():
    size = 1 / torch.finfo(torch.float64).eps
    for times, sound in ((0.9, True), (1.1, False)):
        log_p = torch.full((100,), times * size, dtype=torch.float64)
        assert (module._complaints(log_p[None])[0] is None) is sound
    assert module._complaints(log_p[None])[0] == (
        "suspect",
        "the potential is so large that it is rounded to 1e+00 nats, which hides what it says "
        "about q. Subtract a constant from it, or compute it in float64.",
    )


def bare(**more):
    return Report("ok", 0.123, 50.0, 0.5, -1.5, 0.01, 0.25, 100, 0, "fine.", **more)


class TestText:
    def test_what_is_always_there(self):
        assert str(bare(kl_reverse=0.1, kl_forward=0.2)) == (
            "ok: fine.\n"
            "k-hat 0.12, ESS 50 of 100 draws (50.0 %)\n"
            "from the posterior: total variation 0.250, KL(q, p) 0.100, KL(p, q) 0.200 nats\n"
            "log-evidence -1.500 +- 0.010"
        )

    def test_a_fit_without_story_and_seed(self):
        lines = str(bare(rung="a mixture", n_values=3, n_gradients=4, seconds=0.5)).splitlines()
        assert lines[-2:] == [
            "answered by a mixture",
            "3 evaluations of the potential, 4 more with gradient, 0.5 s",
        ]

    @pytest.mark.parametrize(
        ("count", "dim", "text"),
        [
            (1, 1, "one mode"),
            (4, 3, f"4 modes of weights {', '.join(['0.25'] * 4)} at {', '.join(['(1, 1, 1)'] * 4)}"),
            (4, 4, f"4 modes of weights {', '.join(['0.25'] * 4)}"),
            (5, 1, f"5 modes of weights {', '.join(['0.20'] * 5)}"),
            (8, 1, f"8 modes of weights {', '.join(['0.12'] * 8)}"),
            (9, 1, f"9 modes of weights {', '.join(['0.11'] * 8)} and 1 more"),
        ],
    )
    def test_modes(self, count, dim, text):
        modes = tuple(Mode(1 / count, (1.0,) * dim) for _ in range(count))
        assert str(bare(modes=modes)).splitlines()[-1] == text


class TestFields:
    def test_defaults(self):
        made = bare()
        assert (made.stop_reason, made.rung, made.modes, made.story) == ("", "", (), ())
        assert made.proportionality is None and made.seed is None
        assert (made.n_values, made.n_gradients) == (0, 0)
        assert all(math.isnan(v) for v in (made.kl_reverse, made.kl_forward, made.seconds))

    def test_seconds_are_left_out_of_comparisons(self):
        known = dict(kl_reverse=0.0, kl_forward=0.0)
        assert bare(seconds=1.0, **known) == bare(seconds=2.0, **known)
        assert bare(seed=1, **known) != bare(seed=2, **known)


class TestRecertified:
    KEPT = dict(
        modes=(Mode(1.0, (0.0,)),),
        rung="a flow",
        story=("no",),
        n_values=1,
        n_gradients=2,
        seed=3,
        seconds=4.0,
    )

    def again(self, sd, **changes):
        """A new report, and what `certify` alone says of the new draws."""
        before = dataclasses.replace(bare(stop_reason="done"), **self.KEPT, **changes)
        theta = sd * torch.randn(N, dtype=torch.float64)
        log_p, log_q = Normal(0.0, 1.0).log_prob(theta), Normal(0.0, sd).log_prob(theta)
        return recertified(before, log_p, log_q), certify(log_p, log_q, resampled=True, stop_reason="done")

    @pytest.mark.parametrize(("sd", "status"), [(1.0, "ok"), (1.5, "corrected")])
    @pytest.mark.parametrize("before", ["ok", "corrected"])
    def test_the_numbers_are_new_and_the_rest_stays(self, sd, status, before):
        found, fresh = self.again(sd, status=before)
        assert found == dataclasses.replace(fresh, **self.KEPT)
        assert (found.status, found.seconds, found.stop_reason) == (status, 4.0, "done")

    @pytest.mark.parametrize("before", ["suspect", "failed"])
    def test_doubts_stay(self, before):
        found, _ = self.again(1.0, status=before, sentence="a mode may be missing.")
        assert (found.status, found.sentence) == ("suspect", "a mode may be missing.")
