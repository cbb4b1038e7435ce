"""The two-sample test of a learned likelihood: silent where it is right, and clear about how it is wrong."""

import pytest
import torch
from torch import Tensor, nn

from visbi.core.random import seeded
from visbi.rounds import likelihood_test
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


def test_repeatable(runs: Simulations) -> None:
    before = torch.random.get_rng_state()
    assert verdict(Known(), runs).p_value == verdict(Known(), runs).p_value
    assert torch.equal(before, torch.random.get_rng_state())


def test_refuses(runs: Simulations) -> None:
    with pytest.raises(ValueError, match=r"`theta_o`: expected shape \(2,\); got \(3,\)"):
        likelihood_test(Known(), runs, torch.zeros(3))  # type: ignore[arg-type]
