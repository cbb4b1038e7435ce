"""The two-sample test of a learned likelihood: silent where it is right, and clear about how it is wrong."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from visbi import BoxUniform
from visbi.core.random import seeded
from visbi.estimators import LikelihoodEnsemble, TrainingOptions, fit_likelihood
from visbi.potentials import as_potential
from visbi.rounds import likelihood_test
from visbi.rounds.local import place_to_test
from visbi.simulators import Simulations

N = 600


class Known(nn.Module):
    """In the place of an ensemble: x = theta + shift(theta) + scale * noise."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0, beyond: float = 0.0) -> None:
        super().__init__()
        self.shift, self.scale, self.beyond = shift, scale, beyond

    def sample(self, theta: Tensor, n: int, *, seed: int | None = None) -> Tensor:
        with seeded(seed):
            noise = torch.randn(n, *theta.shape)
        return theta + self.shift * (theta > self.beyond) + self.scale * noise


@pytest.fixture(scope="module")
def runs() -> Simulations:
    with seeded(0):
        theta = torch.randn(N, 2)
        x = theta + torch.randn(N, 2)
    return Simulations(theta, x, theta[:0], (), 0)


def verdict(known: Known, runs: Simulations, at: float = 1.0):
    return likelihood_test(known, runs, torch.full((2,), at), n_null=40)  # type: ignore[arg-type]


def test_right(runs: Simulations) -> None:
    test = verdict(Known(), runs)
    assert test.verdict == "calibrated" and test.p_value > 0.05


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (Known(scale=0.6), "over-confident"),
        (Known(scale=1.6), "under-confident"),
        (Known(shift=0.7, beyond=-9.0), "biased"),
    ],
)
def test_wrong(runs: Simulations, known: Known, expected: str) -> None:
    test = verdict(known, runs)
    assert test.verdict == expected and test.p_value < 0.05
    if expected == "biased":  # x would have to move back
        assert float(test.shift.max()) < -0.2


def test_it_is_local(runs: Simulations) -> None:
    elsewhere = Known(shift=1.5, beyond=0.7)
    near, far = (verdict(elsewhere, runs, at).statistic for at in (1.5, -1.5))
    assert near > 3 * far


def fresh(seed: int, n: int = N) -> Simulations:
    with seeded(seed):
        theta = torch.randn(n, 2)
        x = theta + torch.randn(n, 2)
    return Simulations(theta, x, theta[:0], (), 0)


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Of 60 tests of a right likelihood at the level .05; 7 or more have probability .03."""
    alarms = 0
    for seed in range(60):
        test = likelihood_test(Known(), fresh(seed, 150), torch.ones(2), n_null=40, seed=seed)  # type: ignore[arg-type]
        alarms += test.verdict != "calibrated"
    assert alarms < 7


def test_it_says_what_is_wrong_with_which_entry(runs: Simulations) -> None:
    said = str(verdict(Known(scale=0.6), runs))
    assert said.startswith("the learned likelihood is over-confident: the simulator's x[")
    assert "times as wide as the learned likelihood's" in said
    said = str(verdict(Known(shift=0.7, beyond=-9.0), runs))
    assert said.startswith("the learned likelihood is biased") and "moved by -" in said
    assert str(verdict(Known(), runs)).startswith("a classifier cannot tell the simulator from")


def test_draws_that_overflow(runs: Simulations) -> None:
    class Overflows(Known):
        def sample(self, theta: Tensor, n: int, *, seed: int | None = None) -> Tensor:
            x = super().sample(theta, n, seed=seed)
            x[..., 0] = torch.where(x[..., 0] > 1, torch.inf, x[..., 0])
            x[..., 1] = torch.where(x[..., 1] > 2, torch.nan, x[..., 1])
            return x

    assert verdict(Overflows(), runs).verdict != "calibrated"


def test_x_of_any_shape() -> None:
    class Square(Known):
        def sample(self, theta: Tensor, n: int, *, seed: int | None = None) -> Tensor:
            return super().sample(theta, n, seed=seed)[..., None].expand(n, -1, 2, 3) + 1.0

    runs = fresh(0, 200)
    runs = replace(runs, x=runs.x[..., None].expand(-1, 2, 3))
    assert "the simulator's x[" in str(test := verdict(Square(), runs)) and "x[1, 2]" in test.names


def test_an_ensemble_is_tested_as_the_average_that_it_is() -> None:
    """Two networks that are both wrong and right together: x = theta +- 2 + noise, each knows one sign."""
    with seeded(3):
        theta = torch.randn(400, 1)
        x = theta + torch.randn(400, 1) + 2 * torch.randn(400, 1).sign()
    options = dict(options=TrainingOptions(max_epochs=60), flow="maf", num_transforms=1, hidden_features=8)
    learnt = [
        fit_likelihood(theta[mine], x[mine], seed=0, show_progress_bar=False, **options).estimator.members[0]  # type: ignore[arg-type]
        for mine in (((x - theta) > 0)[:, 0], ((x - theta) < 0)[:, 0])
    ]
    with seeded(4):
        theta = torch.randn(400, 1)
        x = theta + torch.randn(400, 1) + 2 * torch.randn(400, 1).sign()
    runs, at = Simulations(theta, x, theta[:0], (), 0), torch.zeros(1)
    both = likelihood_test(LikelihoodEnsemble(learnt), runs, at, seed=0)
    assert both.verdict == "calibrated" and both.p_value > 0.05
    assert likelihood_test(LikelihoodEnsemble(learnt[:1]), runs, at, seed=0).verdict == "biased"


def test_the_place_is_the_likeliest_of_the_runs() -> None:
    prior = BoxUniform(-9 * torch.ones(1), 9 * torch.ones(1))

    def two_modes(theta: Tensor, x: Tensor) -> Tensor:  # the mean, 0, is in neither
        return torch.logaddexp(-8 * (theta - 2).square().sum(-1), -8 * (theta + 2).square().sum(-1) - 1)

    theta = torch.tensor([[0.0], [-1.9], [2.2], [float("nan")]])
    assert place_to_test(as_potential(two_modes, prior), theta, torch.zeros(1, 1)) == 2.2


def test_repeatable(runs: Simulations) -> None:
    before = torch.random.get_rng_state()
    assert verdict(Known(), runs).p_value == verdict(Known(), runs).p_value
    assert torch.equal(before, torch.random.get_rng_state())


def test_refuses(runs: Simulations) -> None:
    with pytest.raises(ValueError, match=r"`theta_o`: expected shape \(2,\); got \(3,\)"):
        likelihood_test(Known(), runs, torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`runs`: expected at least 100 successful runs; got 99"):
        likelihood_test(Known(), fresh(0, 99), torch.zeros(2))  # type: ignore[arg-type]
