"""Where VIPosterior means to differ from the sbi package's: both sides, once each.

docs/coming-from-sbi.md lists them by these names.
"""

import inspect
import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
pytest.importorskip("sbi")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sbi.diagnostics import run_sbc
    from sbi.inference import VIPosterior as TheirPosterior
    from sbi.inference.potentials.posterior_based_potential import PosteriorBasedPotential
    from sbi.samplers.vi import vi_divergence_optimizers as their_objectives
    from sbi.samplers.vi.vi_quality_control import psis_diagnostics
    from sbi.utils import BoxUniform

    from sbi_cases import NOISE, PRIOR, X_O, Exact, gaussian
    from visbi import VIPosterior
    from visbi.certificate import Report, certify
    from visbi.fitting.config import TrainOptions
    from visbi.objectives import reverse_kl

SHORT: dict[str, Any] = dict(max_num_iters=2, show_progress_bar=False, quality_control=False)
REAL = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
BOTH = pytest.mark.parametrize("kind", [VIPosterior, TheirPosterior], ids=["ours", "theirs"])


def made(kind: type, potential: Any = gaussian, prior: Any = PRIOR, **options: Any) -> Any:
    return kind(potential, prior, **{"q": "gaussian", **options})


def trained(kind: type, **options: Any) -> Any:
    return made(kind, **options).set_default_x(X_O).train(**SHORT)


# q="auto"


def test_differs_q_auto() -> None:
    """Theirs has no such name; ours finds a q, and corrects its draws unless told not to."""
    with pytest.raises((ValueError, AssertionError, KeyError, NotImplementedError)):
        made(TheirPosterior, q="auto")
    posterior = made(VIPosterior, q="auto").train(X_O, show_progress_bar=False, quality_control=False, seed=1)
    assert posterior.report.status == "ok"
    torch.manual_seed(0)
    raw = posterior.sample((2000,), correct=False)
    torch.manual_seed(0)
    assert not torch.equal(posterior.sample((2000,)), raw)
    torch.manual_seed(0)
    assert torch.equal(made_and_drawn(posterior), raw)


def made_and_drawn(posterior: VIPosterior) -> Tensor:
    return posterior.q.sample((2000,))


def test_differs_weights_of_draws() -> None:
    """What theirs does not have: weighted draws, corrected ones, and the density of the posterior itself."""
    assert not hasattr(TheirPosterior, "weighted_sample")
    for method, keyword in (("sample", "correct"), ("log_prob", "normalized")):
        assert keyword in inspect.signature(getattr(VIPosterior, method)).parameters
        assert keyword not in inspect.signature(getattr(TheirPosterior, method)).parameters
    posterior = trained(VIPosterior)
    theta, log_w = posterior.weighted_sample(1000)
    assert theta.shape == (1000, 2) and float(log_w.exp().sum()) == pytest.approx(1.0)
    assert posterior.sample((10,), correct=True).shape == (10, 2)
    difference = posterior.log_prob(theta, normalized="potential") - posterior.potential(theta)
    assert float(difference.std()) < 1e-3  # a constant, minus the log-evidence


# the gradient


def test_differs_stick_the_landing() -> None:
    """Ours has no noise where q is the posterior."""
    assert their_objectives.ElboOptimizer.__init__.__kwdefaults__["stick_the_landing"] is False
    for objective in (their_objectives.IWElboOptimizer, their_objectives.RenyiDivergenceOptimizer):
        assert inspect.signature(objective.__init__).parameters["dreg"].default is False
    posterior = VIPosterior(lambda theta, x_o: REAL.log_prob(theta), REAL, q="gaussian")

    def noise(**options: Any) -> float:
        parameters = posterior.q.trainable()
        loss = reverse_kl(posterior.q, REAL.log_prob, 64, **options)
        return max(float(g.abs().max()) for g in torch.autograd.grad(loss.surrogate, parameters))

    assert noise() < 1e-5 < 1e-2 < noise(stick_the_landing=False)
    assert TrainOptions.DEFAULT.stick_the_landing is None  # which means: as the objective has it


def test_differs_iw_is_iw(monkeypatch) -> None:
    """Their importance-weighted loss is never called: the steps are those of the reverse KL."""

    def called(*args: Any) -> Any:
        raise RuntimeError("called")

    def after(kind: type, method: str) -> Tensor:
        torch.manual_seed(0)
        posterior = made(kind, vi_method=method).set_default_x(X_O).train(**{**SHORT, "max_num_iters": 20})
        return posterior.log_prob(X_O)

    monkeypatch.setattr(their_objectives.IWElboOptimizer, "loss_rsample", called)
    assert torch.equal(after(TheirPosterior, "IW"), after(TheirPosterior, "rKL"))
    assert not torch.equal(after(VIPosterior, "IW"), after(VIPosterior, "rKL"))


def test_differs_weight_transform() -> None:
    """Ours sees weights of mean 1, theirs those of the potential as it is."""

    def largest(kind: type, shift: float) -> float:
        seen: list[Tensor] = []

        def look(weights: Tensor) -> Tensor:
            seen.append(weights.detach().clone())  # theirs changes them in place
            return weights

        torch.manual_seed(0)
        posterior = made(kind, lambda theta, x_o: gaussian(theta, x_o) + shift, vi_method="fKL")
        posterior.set_default_x(X_O).train(**SHORT, weight_transform=look, warm_up_rounds=0)
        return float(seen[0].max())

    assert largest(VIPosterior, 5.0) == pytest.approx(largest(VIPosterior, 0.0), rel=1e-4)
    assert largest(TheirPosterior, 5.0) == pytest.approx(
        math.exp(5.0) * largest(TheirPosterior, 0.0), rel=1e-4
    )


# the certificate


@pytest.mark.parametrize("s", [0.5, 0.6])
def test_differs_khat_by_excesses(s: float) -> None:
    """q = N(0, s^2) for a standard normal has weights of shape k = 1 - s^2."""
    torch.manual_seed(0)
    q = Independent(Normal(torch.zeros(1), s * torch.ones(1)), 1)
    p = Independent(Normal(torch.zeros(1), torch.ones(1)), 1)
    theta = q.sample((50_000,))
    ours = certify(p.log_prob(theta), q.log_prob(theta)).khat
    theirs = psis_diagnostics(p.log_prob, q)
    truth = 1 - s**2
    assert abs(ours - truth) < 0.15 < 0.3 < truth - theirs
    assert theirs < 0.5 < ours  # "good" there


@pytest.mark.parametrize("kind", [VIPosterior, TheirPosterior], ids=["ours", "theirs"])
def test_differs_evaluate_returns_a_report(kind: type, capsys) -> None:
    report = trained(kind).evaluate(N=1000)
    assert len(capsys.readouterr().out) > 0
    assert hasattr(report, "khat") if kind is VIPosterior else report is None


def test_differs_quality_control_never_retrains(monkeypatch) -> None:
    """A score that fails: theirs trains again by other options, ours would warn."""
    calls: dict[type, list[dict[str, Any]]] = {VIPosterior: [], TheirPosterior: []}
    for kind, seen in calls.items():
        inner = kind.train

        def train(self: Any, *args: Any, _inner: Any = inner, _seen: Any = seen, **options: Any) -> Any:
            _seen.append(options)
            return _inner(self, *args, **options) if len(_seen) == 1 else self

        monkeypatch.setattr(kind, "train", train)
    flat = made(TheirPosterior).set_default_x(X_O)
    monkeypatch.setattr(flat, "evaluate", lambda **options: 1 / 0)
    flat.train(**{**SHORT, "quality_control": True})
    ours = made(VIPosterior).set_default_x(X_O)
    with pytest.warns(UserWarning, match="Quality of q"):
        ours.train(**{**SHORT, "quality_control": True})
    assert len(calls[VIPosterior]) == 1
    assert [set(c) for c in calls[TheirPosterior][1:]] == [
        {"learning_rate", "retrain_from_scratch", "reset_optimizer"}
    ]


# arguments


def test_differs_unknown_keyword() -> None:
    trained(TheirPosterior).train(**SHORT, n_partcles=3)
    with pytest.raises(TypeError, match="`n_particles`"):
        trained(VIPosterior).train(**SHORT, n_partcles=3)


def test_differs_options_of_the_optimizer() -> None:
    """They are bound to it, not passed through."""
    options = dict(betas=(0.5, 0.9))
    made(TheirPosterior).set_default_x(X_O).train(**SHORT, **options)
    with pytest.raises(TypeError, match="betas"):
        made(VIPosterior).train(X_O, **SHORT, **options)
    made(VIPosterior).train(X_O, **SHORT, optimizer=partial(torch.optim.Adam, **options))


def test_differs_eps_on_the_first_call() -> None:
    theirs = made(TheirPosterior).set_default_x(X_O).train(**SHORT, eps=0.5)
    assert theirs._optimizer.eps == 1e-5  # overwritten
    ours = made(VIPosterior).train(X_O, **SHORT, eps=0.5)
    assert ours._state.options.eps == 0.5


def test_differs_train_sets_the_default_x() -> None:
    ours, theirs = made(VIPosterior).train(X_O, **SHORT), made(TheirPosterior).train(X_O, **SHORT)
    assert torch.equal(ours.default_x, X_O) and theirs.default_x is None
    assert ours.sample().shape == (2,)
    with pytest.raises(ValueError, match="needed when a default has not been set"):
        theirs.sample()


@BOTH
def test_x_must_match(kind: type) -> None:
    """Alike in both; ours looks at the shape too."""
    posterior = trained(kind)
    with pytest.raises(ValueError, match=r"not fit on|was fitted to"):
        posterior.sample((3,), X_O + 1e-3)
    twice = torch.cat([X_O, X_O])
    if kind is VIPosterior:
        with pytest.raises(ValueError, match="was fitted to"):
            posterior.sample((3,), twice)
    else:
        assert posterior.sample((3,), twice).shape == (3, 2)


def test_differs_map_of_an_x() -> None:
    ours, theirs = trained(VIPosterior), trained(TheirPosterior)
    with pytest.raises(ValueError, match="deprecated"):
        theirs.map(X_O)
    other = X_O + 0.5
    assert (ours.map(other, num_iter=200) - other).abs().max() < 0.01
    assert (ours.map(init_method="prior", num_iter=200) - X_O).abs().max() < 0.01
    with pytest.raises(ValueError, match=r"^$"):
        theirs.map(init_method="prior", num_iter=1)


def test_differs_a_posterior_as_q() -> None:
    ours, theirs = (
        made(kind, vi_method="fKL").set_default_x(X_O).train(**SHORT)
        for kind in (VIPosterior, TheirPosterior)
    )
    second, their_second = made(VIPosterior, q=ours), made(TheirPosterior, q=theirs)
    assert second.vi_method == "fKL" and their_second.vi_method == "rKL"
    assert second.default_x is None and torch.equal(their_second.default_x, X_O)


# densities


def test_differs_outside_the_support() -> None:
    outside = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    ours, theirs = (trained(kind).log_prob(outside) for kind in (VIPosterior, TheirPosterior))
    assert float(ours[0]) == -math.inf and math.isfinite(ours[1])
    assert math.isfinite(theirs[0])


def test_differs_double_precision() -> None:
    prior = BoxUniform(-2 * torch.ones(2, dtype=torch.float64), 2 * torch.ones(2, dtype=torch.float64))
    seen: list[Tensor] = []

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        seen.append(x_o)
        return gaussian(theta, x_o)

    made(VIPosterior, potential, prior).train(X_O.double() + 1e-12, **SHORT)
    assert seen[-1].dtype == torch.float64 and float(seen[-1][0, 0]) != 0.4
    made(TheirPosterior, potential, PRIOR).set_default_x(X_O.double() + 1e-12).train(**SHORT)
    assert seen[-1].dtype == torch.float32


# amortised


def test_differs_sequences_and_embeddings() -> None:
    """x of any shape, (num_obs, ...), summarised by a network of one's own."""
    torch.manual_seed(0)
    theta = PRIOR.sample((200,))
    x = theta[:, None] + NOISE * torch.randn(200, 5, 2)  # five trials each

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        return -0.5 * ((theta[:, None] - x) / NOISE).square().sum((-1, -2))

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    options: dict[str, Any] = dict(flow_type="maf", max_num_iters=2, show_progress_bar=False)
    ours = VIPosterior(potential, PRIOR).train_amortized(theta, x, embedding_net=Mean(), **options)
    assert ours.sample((3,), x[:4]).shape == (3, 4, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        TheirPosterior(potential, PRIOR).train_amortized(theta, x, **options)


def test_differs_amortised_fits_stay_in_the_support() -> None:
    torch.manual_seed(0)
    theta = PRIOR.sample((200,))
    x = theta + NOISE * torch.randn_like(theta)
    options: dict[str, Any] = dict(flow_type="maf", max_num_iters=2, show_progress_bar=False)
    ours, theirs = (
        kind(gaussian, PRIOR).train_amortized(theta, x, **options).set_default_x(X_O)
        for kind in (VIPosterior, TheirPosterior)
    )
    assert bool((ours.sample((2000,)).abs() <= 2).all())
    assert not bool((theirs.sample((2000,)).abs() <= 2).all())
    assert isinstance(ours.evaluate(N=1000), Report)
    with pytest.raises(AssertionError, match="not within the prior support"):
        theirs.evaluate(N=1000)


def test_differs_run_sbc_leaves_the_fit_alone(monkeypatch) -> None:
    """With a function to reduce by, theirs trains a posterior of theirs at every x, also an amortised one."""
    torch.manual_seed(0)
    theta = PRIOR.sample((100,))
    x = theta + NOISE * torch.randn_like(theta)
    options: dict[str, Any] = dict(flow_type="maf", max_num_iters=2, show_progress_bar=False)
    calls = []
    for kind in (VIPosterior, TheirPosterior):
        posterior = kind(gaussian, PRIOR).train_amortized(theta, x, **options)
        monkeypatch.setattr(kind, "train", lambda self, *args, **options: calls.append(type(self)))
        run_sbc(theta[:3], x[:3], posterior, 5, reduce_fns=posterior.log_prob, show_progress_bar=False)
    assert set(calls) == {TheirPosterior} and len(calls) >= 3


# other objects


def test_differs_trials_of_npe() -> None:
    """Independent trials; in theirs each is paired with a particle."""
    x = X_O + NOISE * torch.randn(7, 2)
    options: dict[str, Any] = dict(**SHORT, n_particles=64, warm_up_rounds=0)
    with pytest.raises(AssertionError, match="Batch size mismatch"):
        TheirPosterior(PosteriorBasedPotential(Exact(), PRIOR), q="gaussian").train(x, **options)
    VIPosterior(PosteriorBasedPotential(Exact(), PRIOR), q="gaussian").train(x, **options)


def test_differs_families_of_amortised_fits() -> None:
    from sbi.neural_nets.factory import ZukoFlowType as TheirFlowType

    from visbi import ZukoFlowType

    assert {f.name for f in TheirFlowType} - {f.name for f in ZukoFlowType} == {"BPF", "NCSF"}
