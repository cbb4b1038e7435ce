"""What `VIPosterior` says when it refuses, warns or prints, word by word: users search for it."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import nn

from auto_cases import auto, found
from posterior_cases import GOOD, SHORT, X, alone_and_seeded, box, fitted, log_p, made, real
from visbi import VIPosterior
from visbi.families import FAMILY_NAMES

__all__ = ["alone_and_seeded"]


@cache
def amortised() -> VIPosterior:
    """Never changed by those who ask for it."""
    theta = box().sample((20,))
    options = dict(flow_type="gaussian", max_num_iters=2, hidden_features=4, num_transforms=1, n_particles=2)
    return made().train_amortized(theta, theta.clone(), **options, show_progress_bar=False)


def own() -> td.Distribution:
    return td.Independent(td.Normal(torch.zeros(2, requires_grad=True), torch.ones(2)), 1)


FAMILIES = ", ".join(map(repr, ("auto", *FAMILY_NAMES)))
AMORTISED = "VIPosterior(D=2, fitted by amortised rKL in 2 steps)"
ONE = "a fit to one observation; got an amortised one"
PLACES = "'proposal', 'posterior', 'prior'; got 'q'"
REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no prior": (
        lambda: VIPosterior(log_p),
        ValueError,
        "`prior`: expected a Distribution (neither `potential_fn` nor `q` carries one); got None",
    ),
    "transforms": (
        lambda: made(num_transforms=0),
        ValueError,
        "`num_transforms`: expected a whole number >= 1; got 0",
    ),
    "features": (
        lambda: made(hidden_features=0),
        ValueError,
        "`hidden_features`: expected a whole number >= 1; got 0",
    ),
    "z-score of x": (
        lambda: made(z_score_x="some"),
        ValueError,
        "`z_score_x`: expected one of 'none', 'independent', 'structured'; got 'some'",
    ),
    "method": (
        lambda: made(vi_method="KL"),
        ValueError,
        "`vi_method`: expected one of 'rKL', 'fKL', 'IW', 'alpha'; got 'KL'",
    ),
    "family": (
        lambda: made(q="mafia"),
        ValueError,
        f"`q`: expected one of {FAMILIES}, a Distribution, a VIPosterior or a callable; got 'mafia'",
    ),
    "no family": (
        lambda: made(q=3),
        ValueError,
        f"`q`: expected one of {FAMILIES}, a Distribution, a VIPosterior or a callable; got 3",
    ),
    "refine one": (
        lambda: fitted().refine(X),
        ValueError,
        "`refine`: expected an amortised fit; got one to a single observation",
    ),
    "a start to refine": (
        lambda: amortised().refine(X, init="match"),
        TypeError,
        "`init`: expected no start: it is drawn from q(theta | x); got one",
    ),
    "few draws to certify": (
        lambda: amortised().certify(X, n_draws=24),
        ValueError,
        "`n_draws`: expected at least 25 draws; got 24",
    ),
    "no draws to certify": (
        lambda: amortised().certify(X, n_draws=0),
        ValueError,
        "`n_draws`: expected a whole number >= 1; got 0",
    ),
    "few draws with weights": (
        lambda: fitted().weighted_sample(24),
        ValueError,
        "`n`: expected at least 25 draws; got 24",
    ),
    "parameters": (
        lambda: made(parameters=[torch.ones(2)]),
        ValueError,
        "`parameters`: expected None, since this q brings its own; got some",
    ),
    "modules": (
        lambda: made(q=made(), modules=[nn.Linear(1, 1)]),
        ValueError,
        "`modules`: expected None, since this q brings its own; got some",
    ),
    "both": (
        lambda: made(q=made().q, parameters=[torch.ones(2)], modules=[nn.Linear(1, 1)]),
        ValueError,
        "`parameters`: expected None, since this q brings its own; got some",
    ),
    "amortised start": (
        lambda: made(q=amortised()),
        ValueError,
        f"`q`: expected a posterior that was not amortised: q(theta | x) lends no q(theta); got {AMORTISED}",
    ),
    "longer start": (
        lambda: made(q=made(prior=box(3))),
        ValueError,
        "`q`: expected a posterior over 2 parameters, as the prior; got 3",
    ),
    "no x": (
        lambda: made().train(),
        ValueError,
        "`x`: expected an observation (pass x or call set_default_x); got None",
    ),
    "x with gaps": (
        lambda: made().train(torch.tensor([1.0, torch.nan])),
        ValueError,
        "`x`: expected finite numbers; got 1 of 2 NaN or Inf",
    ),
    "a number": (
        lambda: fitted().sample(5),  # type: ignore[arg-type]
        TypeError,
        "`sample_shape`: expected a shape such as (100,); got 5",
    ),
    "less than nothing": (
        lambda: fitted().sample((2, -1)),
        ValueError,
        "`sample_shape`: expected no negative number; got (2, -1)",
    ),
    "few weighted": (
        lambda: fitted().weighted_sample(24),
        ValueError,
        "`n`: expected at least 25 draws; got 24",
    ),
    "no weighted": (
        lambda: fitted().weighted_sample(0),
        ValueError,
        "`n`: expected a whole number >= 1; got 0",
    ),
    "amortised weights": (
        lambda: amortised().weighted_sample(25, X),
        ValueError,
        f"`weighted_sample`: expected {ONE}",
    ),
    "amortised evidence": (
        lambda: amortised().log_prob(torch.zeros(1, 2), X, normalized="potential"),
        ValueError,
        f"`normalized`: expected {ONE}",
    ),
    "normalised": (
        lambda: fitted().log_prob(torch.zeros(1, 2), normalized="p"),
        ValueError,
        "`normalized`: expected one of 'q', 'potential'; got 'p'",
    ),
    "many at once": (
        lambda: fitted().sample_batched((2,), X),
        NotImplementedError,
        "This q belongs to one observation. Use train_amortized() before sample_batched(), "
        "or RefittingPosterior(posterior), which fits a q to each observation.",
    ),
    "nothing at once": (
        lambda: amortised().sample_batched((2,), X, max_sampling_batch_size=0),
        ValueError,
        "`max_sampling_batch_size`: expected a whole number >= 1; got 0",
    ),
    "starts of the map": (
        lambda: fitted().map(init_method="q"),
        ValueError,
        f"`init_method`: expected one of {PLACES}",
    ),
    "starts with gaps": (
        lambda: fitted().map(init_method=torch.tensor([[0.0, torch.nan]])),
        ValueError,
        "`init_method`: expected finite numbers; got 1 of 2 NaN or Inf",
    ),
    "number of starts": (
        lambda: fitted().map(num_init_samples=0),
        ValueError,
        "`num_init_samples`: expected a whole number >= 1; got 0",
    ),
    "metric": (
        lambda: fitted().evaluate("khat"),
        ValueError,
        "`quality_control_metric`: expected one of 'psis', 'prop', 'prop_prior'; got 'khat'",
    ),
    "no draws": (lambda: fitted().evaluate(N=0), ValueError, "`N`: expected a whole number >= 1; got 0"),
    "few draws": (
        lambda: fitted().evaluate(N=24),
        ValueError,
        "`N`: expected at least 25 draws; got 24",
    ),
    "theta of words": (
        lambda: fitted().log_prob("theta"),  # type: ignore[arg-type]
        TypeError,
        "`theta`: expected a tensor; got str",
    ),
    "theta's length": (
        lambda: fitted().potential(torch.zeros(4, 3)),
        ValueError,
        "`theta`: expected shape (batch, 2); got (4, 3)",
    ),
    "theta's axes": (
        lambda: fitted().log_prob(torch.zeros(1, 4, 2)),
        ValueError,
        "`theta`: expected shape (batch, 2); got (1, 4, 2)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal(case: str) -> None:
    attempt, error, message = REFUSALS[case]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        attempt()


def test_a_device_that_is_not_here(tmp_path: Any) -> None:
    fitted().save(tmp_path / "it")
    message = (
        "`device`: expected a device that is here (the posterior was saved on another: pass device='cpu'); "
        "got 'cuda:99'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VIPosterior.load(tmp_path / "it", potential_fn=log_p, device="cuda:99")


@contextmanager
def saying(pattern: str, category: type[Warning] = UserWarning) -> Iterator[None]:
    """One warning, to the letter, that points to the line in the block."""
    with pytest.warns(category) as caught:
        yield
    assert len(caught) == 1 and caught[0].category is category and caught[0].filename == __file__
    assert re.fullmatch(pattern, str(caught[0].message))


def test_warnings() -> None:
    with saying(r"`x_shape` is deprecated and ignored\.", DeprecationWarning):
        VIPosterior(log_p, box(), x_shape=torch.Size([2]))
    theta = box().sample((20,))
    posterior = made().train_amortized(theta, theta, flow_type="gaussian", max_num_iters=1, n_particles=2)
    with saying(r"train\(\) replaces the amortised fit by one to a single observation\."):
        posterior.train(X, **SHORT)


@pytest.mark.parametrize("method", ["rKL", "IW"])
def test_options_of_no_use_to_the_automatic_fit(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the first fit, too
        posterior = found("mixture", auto(vi_method=method), allow_failed=True)
    idle = "`n_particles`, `gamma`" if method == "rKL" else "`vi_method`, `n_particles`, `gamma`"
    options = dict(allow_failed=True, show_progress_bar=False, quality_control=False)
    with saying(f"{idle}: of no use to q='auto', which takes no steps of this kind."):
        posterior.train(X, n_particles=7, gamma=0.5, **options)


def still(scale: float) -> VIPosterior:
    """q is `scale` times as wide as the posterior N(X, 0.5^2) in both directions, and stays so."""
    q = td.Independent(td.Normal(X[0].clone().requires_grad_(), torch.full((2,), scale * 0.5)), 1)
    return made(prior=real(), q=q)


def test_quality_control() -> None:
    options = {**SHORT, "max_num_iters": 1, "learning_rate": 1e-9, "quality_control": True}
    with saying(r"Quality of q: k-hat 0\.[67]\d\. q covers the posterior poorly; .* family\."):
        still(0.5).train(X, **options)
    advice = r"q is not proportional to the potential there\. Train longer, or use a richer family\."
    for metric in ("prop", "prop_prior"):
        with saying(rf"Quality of q: {metric} r\^2 -?\d+\.\d\d\. {advice}"):
            still(2.0).train(X, **options, quality_control_metric=metric)


def test_lines_of_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    exact = made(prior=real()).train(X, **{**GOOD, "max_num_iters": 500})
    for posterior in (exact, fitted(still(2.0), learning_rate=1e-9)):
        report = posterior.evaluate()
        assert capsys.readouterr().out == f"k-hat {report.khat:.3f} ({report.status}): {report.sentence}\n"
        assert report.proportionality is None and report.n_draws == 50_000
        for metric in ("prop", "prop_prior"):
            report = posterior.evaluate(metric, 1000)
            good, r2 = posterior is exact, report.proportionality
            assert r2 is not None and (r2 > 0.9 if good else r2 < 0.8) and report.n_draws == 1000
            advice = (
                report.sentence
                if good
                else "q is not proportional to the potential there. Train longer, or use a richer family."
            )
            assert capsys.readouterr().out == f"{metric} r^2 {r2:.3f} (1 is best): {advice}\n"
