"""Certificates and corrected draws of q(theta | x) at many x."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.distributions import Independent, Normal

from posterior_cases import alone_and_seeded
from visbi import VIPosterior, amortized
from visbi.certificate.report import GOOD
from visbi.core.random import seeded
from visbi.fitting.state import AmortizedFit
from visbi.potentials import BasePotential, pairs

__all__ = ["alone_and_seeded"]

PRIOR = Independent(Normal(torch.zeros(2), 1.0), 1)
FAR = torch.tensor([[4.0, -4.0]])


def narrow(theta, x):
    """The posterior at x: N(x, .3^2), whatever the prior."""
    return -0.5 * ((theta - x) / 0.3).square().sum(-1)


def like_the_prior(potential=narrow, **options):
    """A posterior whose q(theta | x) is the prior at every x."""
    posterior = VIPosterior(potential, PRIOR, q="gaussian")
    x = torch.randn(10, 2)
    return posterior.train_amortized(
        x, x, max_num_iters=1, learning_rate=1e-12, show_progress_bar=False, seed=0, **options
    )


def test_each_x_has_its_own_report():
    posterior = like_the_prior(lambda theta, x: -0.5 * ((theta - x) / 0.9).square().sum(-1))
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [8.0, 0.0]])
    reports = posterior.certify(x, n_draws=20_000)
    assert [report.status for report in reports] == ["ok", "corrected", "failed"]
    assert {report.stop_reason for report in reports} == {posterior.trace.stop_reason}
    kl = 0.5 * 0.5 / 0.81 + 2 * (0.5 / 0.81 - 0.5 + torch.tensor(0.9).log())  # KL(N(0, 1), N(x, .9^2)), D = 2
    assert reports[1].kl_reverse == pytest.approx(float(kl), abs=0.02)


def test_x_in_parts(monkeypatch):
    posterior = like_the_prior(lambda theta, x: -0.5 * ((theta - x) / 0.9).square().sum(-1))
    x = 0.3 * torch.randn(7, 2)
    with seeded(1):
        whole = posterior.certify(x, n_draws=4000)
    monkeypatch.setattr(amortized, "_AT_ONCE", 8000)
    monkeypatch.setattr(pairs, "_AT_ONCE", 999)
    with seeded(1):
        parts = posterior.certify(x, n_draws=4000)
    assert len(parts) == 7
    for one, other in zip(whole, parts, strict=True):
        assert one.log_evidence == pytest.approx(other.log_evidence, abs=0.03)


def test_where_weights_are_unsound_a_q_of_that_x_is_found(monkeypatch):
    found = []
    fit_auto = amortized.fit_auto

    def spy(problem, x, options):
        found.append(x)
        assert options.init.shape[1] == 2
        return fit_auto(problem, x, options)

    monkeypatch.setattr(amortized, "fit_auto", spy)
    posterior = like_the_prior()
    x = torch.cat([torch.zeros(1, 2), FAR])
    assert [r.status in GOOD for r in posterior.certify(x)] == [True, False]
    theta = posterior.sample((4000,), x, correct=True)
    assert len(found) == 1 and torch.equal(found[0], FAR)
    assert (theta.mean(0) - x).abs().max() < 0.03 and (theta.std(0) - 0.3).abs().max() < 0.02
    assert theta[:, 0].unique(dim=0).shape[0] > 3500  # a pool that is large enough
    assert isinstance(posterior._state, AmortizedFit)


def test_where_more_draws_weigh_otherwise_than_the_certificate_s_a_q_of_that_x_is_found(monkeypatch):
    found = []
    fit_auto = amortized.fit_auto
    monkeypatch.setattr(amortized, "fit_auto", lambda *args: found.append(args[1]) or fit_auto(*args))
    seen = []

    def late(theta, x):
        """The prior at first, and something far out which the first draws say nothing of."""
        seen.append(len(theta))
        more = 20.0 if sum(seen) > amortized.POOL else 0.0
        return PRIOR.log_prob(theta) + more * (theta.sum(-1) > 4.0)

    posterior = like_the_prior(late)
    seen.clear()
    assert posterior.sample((20_000,), torch.zeros(1, 2), correct=True).shape == (20_000, 2)
    assert len(found) == 1
    seen.clear()
    posterior.sample((100,), torch.zeros(1, 2), correct=True)  # these do not ask for more
    assert len(found) == 1


def test_draws_that_nothing_certifies_are_said_aloud(monkeypatch):
    posterior = like_the_prior()

    def poor(problem, x, options):
        fit = fit_auto(problem, x, options)
        return replace(fit, report=replace(fit.report, status="suspect"))

    fit_auto = amortized.fit_auto
    monkeypatch.setattr(amortized, "fit_auto", poor)
    x = torch.cat([torch.zeros(1, 2), FAR, -FAR])
    with pytest.warns(
        UserWarning, match=r"draws at 2 of 3 observations \(rows 1, 2 of x\) are not certified"
    ):
        assert posterior.sample((5,), x, correct=True).shape == (5, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample((5,), x[:1], correct=True)


def test_equal_seeds_give_equal_draws():
    posterior = like_the_prior()
    x = torch.cat([torch.zeros(1, 2), FAR])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(posterior.sample((50,), x, correct=True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_report_is_the_certificate_of_the_default_x():
    posterior = like_the_prior(lambda theta, x: -0.5 * ((theta - x) / 0.9).square().sum(-1))
    for row, status in (([0.0, 0.0], "ok"), ([0.5, 0.5], "corrected"), ([8.0, 0.0], "failed")):
        posterior.set_default_x(torch.tensor(row))
        certificates = [
            lambda: posterior.report,
            lambda: posterior.certify()[0],
            lambda: evaluated(posterior),
        ]
        reports = []
        for certificate in certificates:
            with seeded(5):
                reports.append(certificate())
        assert [repr(report) for report in reports] == [repr(reports[0])] * 3 and reports[0].status == status


def evaluated(posterior):
    return posterior.evaluate(N=16_384)


def test_a_fit_to_one_observation_has_one_report():
    posterior = VIPosterior(narrow, PRIOR, q="auto").train(FAR / 4, seed=0, show_progress_bar=False)
    (report,) = posterior.certify(n_draws=3000)
    assert report.n_draws == 3000 and report.status in ("ok", "corrected")
    assert report.rung == posterior.report.rung
    with pytest.raises(ValueError, match="`x`"):
        posterior.certify(FAR)


def test_the_refined_posterior_lives_in_the_coordinates_of_the_amortised_one():
    from torch.distributions import AffineTransform

    posterior = VIPosterior(
        narrow,
        PRIOR,
        q="gaussian",
        theta_transform=AffineTransform(1.0, 2.0, event_dim=1),
        z_score_theta="none",
    )
    x = torch.randn(10, 2)
    posterior.train_amortized(x, x, max_num_iters=1, show_progress_bar=False, seed=0)
    refined = posterior.refine(FAR / 4, seed=0)
    theta = torch.randn(3, 2)
    torch.testing.assert_close(refined.theta_transform(theta), posterior.theta_transform(theta))
    assert refined.z_score_theta == "none"
    assert (refined.sample((2000,)).mean(0) - FAR / 4).abs().max() < 0.05


def test_families_of_the_state_are_not_touched():
    """`certify` and corrected draws leave weights and options as they are."""
    posterior = like_the_prior()
    before = {name: value.clone() for name, value in posterior.q.state_dict().items()}
    posterior.certify(FAR, n_draws=100)
    posterior.sample((3,), torch.zeros(1, 2), correct=True)
    assert all(torch.equal(value, before[name]) for name, value in posterior.q.state_dict().items())
    assert not posterior.q.training


def test_refine_takes_this_prior_and_starts_from_q_there(monkeypatch):
    """Not the prior that the potential has of its own."""

    class Own(BasePotential):
        def evaluate(self, theta, x=None, *, x_is_iid=None):
            return narrow(theta, x)

    wide = Independent(Normal(torch.zeros(2), 5.0), 1)
    posterior = VIPosterior(Own(wide), PRIOR, q="gaussian")
    x = torch.randn(200, 2)
    posterior.train_amortized(x, x, max_num_iters=400, learning_rate=0.02, show_progress_bar=False, seed=0)
    given = {}

    def train(self, x=None, **keywords):
        given.update(keywords, x=x, posterior=self)
        return self

    monkeypatch.setattr(VIPosterior, "train", train)
    here = torch.tensor([[1.0, -1.0]])
    assert posterior.refine(here, seed=4) is given["posterior"]
    assert given["posterior"].prior is posterior.prior and given["seed"] == 4
    assert torch.equal(given["x"], here)
    assert (given["init"].sample((2000,)).mean(0) - here[0]).abs().max() < 0.2


class TestStacking:
    """Draws of exp(potential)^a q^(1 - a), a from simulations that nothing was trained on."""

    BETWEEN = 0.5 + torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))  # theta of every x
    X = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))

    @staticmethod
    def beside(theta, x):
        """N(1, 1) at every x, where q is N(0, 1): their even pool is N(.5, 1)."""
        return -0.5 * (theta - 1).square().sum(-1)

    def test_two_estimates_on_either_side(self):
        posterior = like_the_prior(self.beside)
        assert posterior.stack(self.BETWEEN, self.X) == pytest.approx(0.5, abs=0.06)
        theta = posterior.sample((8000,), self.X[:2], correct=True)
        assert (theta.mean(0) - 0.5).abs().max() < 0.08 and (theta.std(0) - 1).abs().max() < 0.04
        assert (posterior.sample((8000,), self.X[:1]).mean(0)).abs().max() < 0.06  # q is as it was
        assert posterior.certify(self.X[:1])[0].kl_reverse == pytest.approx(1.0, abs=0.05)  # so is this

    def test_a_potential_that_is_right_stays_alone(self):
        posterior = like_the_prior(lambda theta, x: -0.5 * (theta - 0.5).square().sum(-1))
        assert posterior.stack(self.BETWEEN, self.X) == 1.0
        same = like_the_prior(lambda theta, x: -0.5 * theta.square().sum(-1))
        assert same.stack(self.BETWEEN, self.X) == 1.0  # nothing is gained by anything else

    def test_a_potential_that_is_wrong_is_left(self):
        posterior = like_the_prior(lambda theta, x: -0.5 * (theta + 3).square().sum(-1))
        assert posterior.stack(self.BETWEEN, self.X) == 0.0
        theta = posterior.sample((8000,), self.X[:1], correct=True)
        assert theta.mean(0).abs().max() < 0.06

    @pytest.mark.parametrize("bad", [-1e9, -torch.inf, torch.nan])
    def test_one_row_far_from_the_others_does_not_decide(self, bad):
        def potential(theta, x):
            return torch.where(theta[:, 0] > 30, bad, self.beside(theta, x))

        theta = self.BETWEEN.clone()
        theta[0] = 40.0
        posterior = like_the_prior(potential)
        # q has -800 nats there, which is far, too
        assert posterior.stack(theta, self.X) == pytest.approx(0.5, abs=0.06)

    def test_in_parts(self, monkeypatch):
        posterior = like_the_prior(self.beside)
        monkeypatch.setattr(amortized, "_AT_ONCE", 5000)
        monkeypatch.setattr(pairs, "_AT_ONCE", 999)
        assert posterior.stack(self.BETWEEN, self.X) == pytest.approx(0.5, abs=0.06)

    def test_where_weights_are_unsound_a_q_of_the_pool_is_found(self):
        posterior = like_the_prior()
        posterior._state = replace(posterior._state, share=0.5)
        theta = posterior.sample((4000,), 2 * FAR, correct=True)
        precision = 0.5 / 0.09 + 0.5
        assert (theta.mean(0) - 2 * FAR * (0.5 / 0.09) / precision).abs().max() < 0.03
        assert (theta.std(0) - precision**-0.5).abs().max() < 0.02

    def test_training_again_forgets_it(self):
        posterior = like_the_prior(self.beside)
        posterior.stack(self.BETWEEN, self.X)
        posterior.train_amortized(self.X, self.X, max_num_iters=1, show_progress_bar=False)
        assert posterior._state.share == 1.0

    def test_what_cannot_be_told(self):
        with pytest.raises(ValueError, match="stack"):
            VIPosterior(narrow, PRIOR).stack(self.BETWEEN, self.X)
        for value in (torch.nan, torch.inf, -torch.inf):
            posterior = like_the_prior(lambda theta, x, value=value: torch.full_like(theta[:, 0], value))
            with pytest.raises(ValueError, match="finite, most of them"):
                posterior.stack(self.BETWEEN, self.X)
        with pytest.raises(ValueError, match="`theta` and `x`"):
            posterior.stack(self.BETWEEN[:5], self.X)
        with pytest.raises(ValueError, match="n_draws"):
            posterior.stack(self.BETWEEN, self.X, n_draws=3)
