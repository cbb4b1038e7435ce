"""The sbi package's diagnostics, figures and samplers on our posteriors."""

import warnings
from dataclasses import asdict
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
pytest.importorskip("sbi")
matplotlib.use("Agg")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sbi.analysis import ActiveSubspace, conditional_corrcoeff, pairplot
    from sbi.diagnostics import check_sbc, check_tarp, run_sbc, run_tarp
    from sbi.inference import (
        NLE,
        NPE,
        EnsemblePosterior,
        ImportanceSamplingPosterior,
        MCMCPosterior,
        RejectionPosterior,
        likelihood_estimator_based_potential,
        simulate_for_sbi,
    )
    from sbi.inference.posteriors import VIPosteriorParameters as TheirParameters
    from sbi.neural_nets.factory import ZukoFlowType as TheirFlowType
    from sbi.utils import RestrictedPrior, get_density_thresholder

    from sbi_cases import AMORTIZED, GOOD, NOISE, PRIOR, X_O, Exact, fitted, gaussian, moments, simulator
    from visbi import CustomPotential, RefittingPosterior, VIPosterior

QUIET: dict[str, Any] = dict(show_progress_bar=False)


def narrow(theta: Tensor, x_o: Tensor) -> Tensor:
    """Wrong: half the standard deviation."""
    return 4 * gaussian(theta, x_o)


def shifted(theta: Tensor, x_o: Tensor) -> Tensor:
    """Wrong: one standard deviation aside."""
    return gaussian(theta - NOISE, x_o)


def refitting(potential: Any) -> RefittingPosterior:
    posterior = VIPosterior(potential, PRIOR, q="gaussian")
    return RefittingPosterior(posterior, init="match", max_num_iters=5, seed=1)


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, Tensor]:
    """theta from the prior and x, 100 of each."""
    torch.manual_seed(5)
    theta = PRIOR.sample((100,))
    return theta, simulator(theta)


@pytest.fixture(scope="module")
def amortised(simulations) -> dict[str, VIPosterior]:
    """The right potential and two wrong ones."""
    return {
        p.__name__: VIPosterior(p, PRIOR).train_amortized(*simulations, **AMORTIZED)
        for p in (gaussian, narrow, shifted)
    }


@pytest.fixture(scope="module")
def fixed() -> VIPosterior:
    return fitted(gaussian, PRIOR)


# calibration


def test_regression_02_run_sbc(pairs) -> None:
    """Every x gets a fit of its own, and the ranks tell a right posterior from a wrong one."""
    theta, x = pairs
    right, wrong = refitting(gaussian), refitting(narrow)
    checks = {}
    for posterior in (right, wrong):
        ranks, averaged = run_sbc(theta, x, posterior, num_posterior_samples=100, **QUIET)
        assert ranks.shape == averaged.shape == (100, 2)
        checks[posterior] = check_sbc(
            ranks, theta, averaged, num_posterior_samples=100, num_c2st_repetitions=1
        )
    assert float(checks[right]["ks_pvals"].min()) > 0.01 > float(checks[wrong]["ks_pvals"].max())
    fits = [right.at(row) for row in x]
    assert len({id(fit) for fit in fits}) == 100
    for row, fit in zip(x[:5], fits, strict=False):
        assert torch.equal(fit.default_x, row[None])
        assert (fit.sample((500,)).mean(0) - row).abs().max() < 0.5 * NOISE or bool((row.abs() > 1.5).any())


@pytest.mark.parametrize("batched", [True, False])
def test_expected_coverage_of_refits(batched: bool, pairs) -> None:
    theta, x = (t[:10] for t in pairs)
    posterior = refitting(gaussian)
    functions = [posterior.log_prob, lambda theta, x: theta[:, 0]]
    ranks, _ = run_sbc(theta, x, posterior, 50, reduce_fns=functions, use_batched_sampling=batched, **QUIET)
    assert ranks.shape == (10, 2) and 0 < float(ranks.mean()) < 50


def test_a_fit_to_one_observation_says_what_to_do(pairs, fixed) -> None:
    with pytest.raises(ValueError, match="RefittingPosterior"):
        run_sbc(*pairs, fixed, 10, **QUIET)


@pytest.mark.parametrize("batched", [True, False])
def test_sbc_of_an_amortised_posterior(batched: bool, pairs, amortised) -> None:
    theta, x = pairs
    p = {}
    for name in ("gaussian", "narrow"):
        ranks, averaged = run_sbc(theta, x, amortised[name], 100, use_batched_sampling=batched, **QUIET)
        checks = check_sbc(ranks, theta, averaged, num_posterior_samples=100, num_c2st_repetitions=1)
        p[name] = checks["ks_pvals"]
    assert float(p["gaussian"].min()) > 0.01 > float(p["narrow"].max())


def test_defect_07_amortised_survives_run_sbc(pairs, amortised) -> None:
    posterior = amortised["gaussian"]
    before = [t.detach().clone() for t in posterior.q.parameters()]
    trace, q, x_o = posterior.trace, posterior.q, posterior.default_x
    ranks, _ = run_sbc(*pairs, posterior, 100, reduce_fns=posterior.log_prob, **QUIET)
    run_sbc(*pairs, posterior, 100, reduce_fns=[posterior.log_prob], **QUIET)
    assert posterior.trace is trace and posterior.q is q and posterior.default_x is x_o
    assert all(map(torch.equal, before, posterior.q.parameters()))
    assert posterior.sample((3,), pairs[1][:2]).shape == (3, 2, 2)
    assert abs(float(ranks.mean()) - 50) < 15  # and the coverage is right


def gap(theta: Tensor, x: Tensor, posterior: Any, units: Tensor | float = 1.0) -> float:
    """Largest distance between expected and nominal coverage, seen from references on one side of x."""
    torch.manual_seed(1)
    ecp, alpha = run_tarp(units * theta, x, posterior, units * (x + 2 * NOISE), 200, num_bins=10, **QUIET)
    p = check_tarp(ecp, alpha)[1]
    assert 0 <= p <= 1
    return float((ecp - alpha).abs().max())


def test_regression_20_tarp(pairs, amortised) -> None:
    """Calibrated and biased are told apart, also in units of which one is a thousandth of the other."""
    units = torch.tensor([1.0, 1000.0])

    class InUnits:
        def __init__(self, posterior: VIPosterior) -> None:
            self.posterior = posterior

        def sample_batched(self, sample_shape: Any, x: Tensor, **options: Any) -> Tensor:
            return units * self.posterior.sample_batched(sample_shape, x, **options)

    gaps = {name: gap(*pairs, posterior) for name, posterior in amortised.items()}
    assert gaps["gaussian"] < 0.15 and gaps["shifted"] > 0.3
    for name, expected in gaps.items():  # their z-scoring takes the references along
        assert gap(*pairs, InUnits(amortised[name]), units) == pytest.approx(expected, abs=0.02)


def test_tarp_of_refits(pairs) -> None:
    theta, x = (t[:60] for t in pairs)
    assert gap(theta, x, refitting(gaussian)) < 0.2 < 0.3 < gap(theta, x, refitting(shifted))


# samplers


@pytest.mark.parametrize("learned", [True, False])
def test_proposal_of_importance_sampling(learned: bool, nets) -> None:
    """A proposal that is somewhat off is mended by their weights."""
    if learned:
        target, _ = likelihood_estimator_based_potential(nets["NLE"], PRIOR, X_O)
    else:
        target, _ = likelihood_estimator_based_potential(Exact(), PRIOR, X_O)
    proposal = fitted(lambda theta, x_o: gaussian(theta, x_o + 0.1) / 2, PRIOR)
    mean, std = moments(lambda theta: target(theta))
    theta = ImportanceSamplingPosterior(target, proposal=proposal).sample((2000,))
    assert (theta.mean(0) - mean).abs().max() < 0.03 and (theta.std(0) - std).abs().max() < 0.03
    assert (proposal.sample((2000,)).mean(0) - mean).abs().max() > 0.05
    weighted = ImportanceSamplingPosterior(target, proposal=proposal, method="importance")
    theta, log_weights = weighted.sample((4000,))
    assert ((log_weights.detach().softmax(0)[:, None] * theta).sum(0) - mean).abs().max() < 0.03


def test_our_potential_in_their_samplers(fixed) -> None:
    potential = CustomPotential(gaussian, PRIOR, X_O)
    theirs = ImportanceSamplingPosterior(potential, proposal=fixed).set_default_x(X_O)
    assert (theirs.sample((2000,)).mean(0) - X_O).abs().max() < 0.03
    chain = MCMCPosterior(
        potential, proposal=fixed, method="slice_np_vectorized", num_chains=20, warmup_steps=20, thin=1
    )
    theta = chain.sample((2000,), x=X_O, show_progress_bars=False)
    assert (theta.mean(0) - X_O).abs().max() < 0.06 and (theta.std(0) - NOISE).abs().max() < 0.06


def test_rejection_and_ensembles(fixed) -> None:
    target, _ = likelihood_estimator_based_potential(Exact(), PRIOR, X_O)
    rejection = RejectionPosterior(target, proposal=fixed, max_sampling_batch_size=1000)
    assert rejection.sample((50,), show_progress_bars=False).shape == (50, 2)
    both = EnsemblePosterior([fixed, fitted(gaussian, PRIOR)])
    assert both.sample((20,)).shape == (20, 2)


def test_proposals_of_rounds(fixed, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    theta, x = simulate_for_sbi(simulator, fixed, 300, **QUIET)
    assert (theta.mean(0) - X_O).abs().max() < 0.1
    trainer = NLE(PRIOR, show_progress_bars=False).append_simulations(theta, x)
    target, _ = likelihood_estimator_based_potential(trainer.train(max_num_epochs=1), PRIOR, X_O)
    second = VIPosterior(target, q=fixed).train(**{**GOOD, "max_num_iters": 5})
    theta, x = simulate_for_sbi(simulator, second, 10, **QUIET)
    assert x.shape == (10, 2)


def test_truncated_proposals(fixed) -> None:
    accept = get_density_thresholder(fixed, quantile=1e-2, num_samples_to_estimate_support=2000)
    truncated = RestrictedPrior(PRIOR, accept, sample_with="rejection", device="cpu")
    assert (truncated.sample((200,)) - X_O).norm(dim=1).max() < 5 * NOISE


def test_their_rounds_of_npe_want_their_classes(fixed, tmp_path, monkeypatch) -> None:
    """A difference that stays: the correction for the proposal takes a posterior of theirs."""
    monkeypatch.chdir(tmp_path)
    theta, x = simulate_for_sbi(simulator, fixed, 300, **QUIET)
    trainer = NPE(PRIOR, show_progress_bars=False).append_simulations(theta, x, proposal=fixed)
    with pytest.raises(TypeError, match="proposal"):
        trainer.train(max_num_epochs=1)


def test_a_posterior_that_they_built(fixed, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    theta = PRIOR.sample((300,))
    trainer = NLE(PRIOR, show_progress_bars=False).append_simulations(theta, simulator(theta))
    trainer.train(max_num_epochs=1)
    options = TheirParameters(q="nsf", vi_method="fKL", num_transforms=2, hidden_features=16)
    built = trainer.build_posterior(posterior_parameters=options)
    with pytest.raises(TypeError, match=r"got VIPosterior \(give its `potential_fn`\)"):
        VIPosterior(built, PRIOR)
    posterior = VIPosterior(built.potential_fn, PRIOR, **asdict(options))
    assert posterior.vi_method == "fKL" and posterior.num_transforms == 2
    posterior.train(X_O, **{**GOOD, "max_num_iters": 2, "quality_control": False})
    assert posterior.sample((3,), x=X_O.tolist()).shape == (3, 2)


def test_their_options_of_amortised_fits(simulations) -> None:
    few: dict[str, Any] = {**AMORTIZED, "max_num_iters": 2}
    options = TheirParameters(q="nsf", num_transforms=2, hidden_features=16)
    posterior = VIPosterior(gaussian, PRIOR).train_amortized(
        *simulations, params=options, **{**few, "flow_type": None}
    )
    assert posterior.q.config.hidden_features == 16
    posterior = VIPosterior(gaussian, PRIOR).train_amortized(
        *simulations, **{**few, "flow_type": TheirFlowType.NICE}
    )
    assert posterior.sample((3,), X_O).shape == (3, 2)
    with pytest.raises(ValueError, match=r"`flow_type`: expected one of .*; got 'bpf'"):
        VIPosterior(gaussian, PRIOR).train_amortized(*simulations, **{**few, "flow_type": TheirFlowType.BPF})


# looking at it


def test_pairplot(fixed, amortised) -> None:
    figure, axes = pairplot([fixed.sample((200,)), amortised["gaussian"].sample((200,), X_O)], figsize=(3, 3))
    assert axes.shape == (2, 2)
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("kind", ["fixed", "amortised"])
def test_sensitivity_and_conditionals(kind: str, fixed, amortised) -> None:
    posterior = fixed if kind == "fixed" else amortised["gaussian"].set_default_x(X_O)
    eigenvalues, directions = ActiveSubspace(posterior).find_directions(posterior_log_prob_as_property=True)
    assert eigenvalues.shape == (2,) and directions.shape == (2, 2)
    limits = torch.tensor([[-2.0, 2.0], [-2.0, 2.0]])
    correlation = conditional_corrcoeff(posterior, limits, posterior.sample((1,)))
    torch.testing.assert_close(correlation, torch.eye(2), atol=0.2, rtol=0)
