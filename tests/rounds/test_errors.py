"""Both errors against known distances, and what they advise."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from visbi import BoxUniform, VIPosterior
from visbi.core.random import seeded
from visbi.potentials import as_potential
from visbi.rounds import Errors, error_of_q, likelihood_spread, moved, reason_to_stop

BOX = BoxUniform(-9 * torch.ones(1), 9 * torch.ones(1))


def normal(mean: float, sd: float = 1.0):
    return lambda theta, x: Normal(mean, sd).log_prob(theta).sum(-1) + 100.0


class Members(nn.Module):
    """In the place of an ensemble: posteriors N(mean_k, 1) under a flat prior."""

    def __init__(self, *means: float) -> None:
        super().__init__()
        self.means = means

    def __len__(self) -> int:
        return len(self.means)

    def members_log_prob(self, x: Tensor, theta: Tensor) -> Tensor:
        return torch.stack([normal(mean + float(x))(theta, None) for mean in self.means])


def shift_distance(shift: float) -> float:
    """Total variation between N(0, 1) and N(shift, 1): 2 Phi(shift / 2) - 1."""
    return math.erf(abs(shift) / 2 / math.sqrt(2))


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_moved_is_the_total_variation(shift: float) -> None:
    with seeded(0):
        theta = torch.randn(50_000, 1)
    before, now = (as_potential(normal(mean), BOX) for mean in (shift, 0.0))
    assert moved(before, now, theta, torch.zeros(1, 1)) == pytest.approx(shift_distance(shift), abs=0.01)


def test_spread_of_two_networks() -> None:
    # N(-1, 1) and N(1, 1) are TV(2) apart; each is half of that from their average
    with seeded(0):
        theta = torch.randn(50_000, 1) + torch.randn(50_000, 1).sign()
    spread = likelihood_spread(Members(-1.0, 1.0), theta, torch.zeros(1, 1))  # type: ignore[arg-type]
    assert spread == pytest.approx(shift_distance(2.0) / 2, abs=0.01)
    moved_x = likelihood_spread(Members(-3.0, -1.0), theta, torch.full((1, 1), 2.0))  # type: ignore[arg-type]
    assert moved_x == pytest.approx(spread, abs=1e-6)


def test_networks_that_agree_have_none_and_one_network_does_not_know() -> None:
    theta = torch.linspace(-2, 2, 100)[:, None]
    assert likelihood_spread(Members(0.0, 0.0, 0.0), theta, torch.zeros(1, 1)) == pytest.approx(0)  # type: ignore[arg-type]
    assert likelihood_spread(Members(0.0), theta, torch.zeros(1, 1)) is None  # type: ignore[arg-type]


def test_error_of_a_raw_q_is_its_distance() -> None:
    posterior = VIPosterior(normal(0.0), BOX, q="gaussian")
    options = dict(max_num_iters=1, init="prior", quality_control=False, show_progress_bar=False)
    posterior.train(torch.zeros(1, 1), seed=0, **options)  # type: ignore[arg-type]
    with seeded(0):
        assert 0.1 < posterior.report.total_variation == error_of_q(posterior)


def test_error_of_corrected_draws_is_what_correction_leaves() -> None:
    def square(theta: Tensor, x: Tensor) -> Tensor:  # uniform on [-2, 2], smoothed: no Gaussian
        return -torch.nn.functional.softplus(40 * (theta.abs() - 2)).sum(-1)

    posterior = VIPosterior(square, BOX, q="auto").train(torch.zeros(1, 1), seed=0, show_progress_bar=False)
    assert posterior.report.status in ("ok", "corrected")
    assert error_of_q(posterior) < 0.01 < posterior.report.total_variation


ADVICE = [
    (Errors(0.01, 0.20, 0.1, "corrected"), "more simulations"),
    (Errors(0.20, 0.05, 0.1, "suspect"), "refine q"),
    (Errors(0.05, 0.20, 0.1, "suspect"), "more simulations"),
    (Errors(0.01, 0.01, 0.01, "suspect"), "refine q"),
    (Errors(0.01, 0.50, 0.1, "failed"), "refine q"),
    (Errors(0.01, 0.01, 0.01, "ok"), "nothing"),
    (Errors(0.01, 0.01, 0.3, "ok"), "more simulations"),
    (Errors(0.01, None, 0.01, "ok"), "more simulations"),
    (Errors(0.10, None, None, "suspect"), "refine q"),
    (Errors(0.01, 0.01, 0.01, "ok", 0.2), "nothing"),
    (Errors(0.01, 0.01, 0.01, "ok", 0.04), "more simulations"),  # the networks agree, new runs do not
    (Errors(0.01, 0.01, 0.01, "suspect", 0.04), "more simulations"),
    (Errors(0.20, 0.05, 0.1, "ok", 0.04), "refine q"),
    (Errors(0.01, 0.01, 0.01, "failed", 0.04), "refine q"),
]


@pytest.mark.parametrize(("errors", "advice"), ADVICE)
def test_what_to_spend_on(errors: Errors, advice: str) -> None:
    assert errors.spend_on == advice and str(errors).endswith(f"spend next on: {advice}")


def test_numbers_are_said() -> None:
    said = str(Errors(0.012, 0.234, 0.345, "corrected"))
    assert "error of q 0.012 (corrected)" in said and "likelihood 0.234" in said and "by 0.345" in said
    assert "round before" not in said
    tested = Errors(0.012, 0.234, 0.345, "corrected", 0.01, "it is biased (p = 0.01)")
    assert "its runs on the likelihood of the round before: it is biased (p = 0.01)" in str(tested)
    assert "not known" in str(Errors(0.0, None, None, "ok")) and "moved" not in str(
        Errors(0.0, None, None, "ok")
    )


@pytest.mark.parametrize(
    ("q", "likelihood", "last_move", "stops"),
    [
        (0.01, 0.10, 0.09, True),
        (0.01, 0.10, 0.10, False),
        (0.20, 0.10, 0.15, True),
        (0.01, None, 0.00, False),
        (0.01, 0.10, None, False),
    ],
)
def test_stops_below_its_own_error(
    q: float, likelihood: float | None, last_move: float | None, stops: bool
) -> None:
    first = Errors(0.01, 0.3, None, "ok", 0.001)  # what is said of an earlier likelihood does not count
    assert bool(reason_to_stop([first, Errors(q, likelihood, last_move, "ok")])) == stops
    assert reason_to_stop([]) == ""


@pytest.mark.parametrize(("p", "stops"), [(None, True), (0.05, True), (0.049, False)])
def test_goes_on_while_new_runs_contradict_the_likelihood(p: float | None, stops: bool) -> None:
    first = Errors(0.01, 0.3, None, "ok")
    assert bool(reason_to_stop([first, Errors(0.01, 0.1, 0.05, "ok", p)])) == stops


def test_an_earlier_round_does_not_count() -> None:
    calm, moving = Errors(0.01, 0.2, 0.1, "ok"), Errors(0.01, 0.1, 0.2, "ok")
    assert reason_to_stop([calm, moving]) == ""
