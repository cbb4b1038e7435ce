"""Fits of a named family abreast: as good as alone, each by itself."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from visbi.families import named_family
from visbi.families.base import LinkedFamily
from visbi.fitting.abreast import fit_abreast, goes_abreast
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import JUDGE, WINDOW, fit_gradient, make_optimizer
from visbi.objectives import reverse_kl
from visbi.priors import BoxUniform, coordinates

COORDS = coordinates(BoxUniform(-4 * torch.ones(2), 4 * torch.ones(2)))
PLACES = torch.tensor([[-1.0, 0.5], [0.0, 0.0], [1.5, -1.0]])
SD = 0.4
QUICK = TrainOptions(learning_rate=0.01, max_num_iters=600)
EVIDENCE = math.log(2 * math.pi * SD**2)


def log_p(theta: Tensor, which: Tensor) -> Tensor:
    return -0.5 * ((theta - PLACES[which][:, None]) / SD).square().sum(-1)


def families(name: str, n: int = 3) -> list[LinkedFamily]:
    return [named_family(name, COORDS, num_transforms=2, hidden_features=16) for _ in range(n)]


@pytest.mark.parametrize("name", ["gaussian", "gaussian_diag", "lowrank", "maf", "coupling", "mixture"])
def test_each_finds_its_own_posterior(name: str):
    torch.manual_seed(0)
    found = families(name)
    assert goes_abreast(found[0], "rKL", QUICK)
    traces = fit_abreast(found, log_p, QUICK)
    for q, place, trace in zip(found, PLACES, traces, strict=True):
        theta = q.sample((4000,))
        assert theta.mean(0).tolist() == pytest.approx(place.tolist(), abs=0.06)
        assert theta.std(0).tolist() == pytest.approx([SD, SD], abs=0.06)
        assert sum(trace.loss[-WINDOW:]) / WINDOW == pytest.approx(-EVIDENCE, abs=0.03)


def test_as_good_as_alone():
    """The same family, steps and rule of stopping; random numbers differ."""
    torch.manual_seed(1)
    abreast, alone = families("gaussian"), families("gaussian")
    traces = fit_abreast(abreast, log_p, QUICK)
    for i, q in enumerate(alone):
        one = torch.tensor([i])

        def own(theta: Tensor, one: Tensor = one) -> Tensor:
            return log_p(theta[None], one)[0]

        trace = fit_gradient(q, partial(reverse_kl, q, own, 256), *make_optimizer(q, QUICK), QUICK)
        assert trace.stop_reason == traces[i].stop_reason
        assert abs(trace.num_iters - traces[i].num_iters) <= 4 * WINDOW
        a, b = q.sample((4000,)), abreast[i].sample((4000,))
        assert a.mean(0).tolist() == pytest.approx(b.mean(0).tolist(), abs=0.05)


def test_one_fit_of_bad_numbers_harms_no_other():
    def broken(theta: Tensor, which: Tensor) -> Tensor:
        return torch.where((which == 1)[:, None], torch.nan, log_p(theta, which))

    torch.manual_seed(2)
    found = families("gaussian")
    before = found[1].sample((2000,)).std(0)
    traces = fit_abreast(found, broken, QUICK)
    assert "no finite loss" in traces[1].stop_reason
    assert traces[1].skipped == traces[1].num_iters and math.isnan(traces[1].loss[0])
    assert traces[1].excluded == QUICK.n_particles * traces[1].num_iters
    assert found[1].sample((2000,)).std(0).tolist() == pytest.approx(before.tolist(), rel=0.1)
    for i in (0, 2):
        assert found[i].sample((4000,)).mean(0).tolist() == pytest.approx(PLACES[i].tolist(), abs=0.06)
        assert traces[i].skipped == 0


def test_who_has_stopped_is_left_alone():
    """Fits leave the group when they stop, and the potential is asked no more about them."""
    asked: list[list[int]] = []

    def counted(theta: Tensor, which: Tensor) -> Tensor:
        asked.append(which.tolist())
        if bool((which == 0).any()):  # a loss that wanders without falling any further
            return torch.where((which == 0)[:, None], 0.0 * theta.sum(-1), log_p(theta, which))
        return log_p(theta, which)

    torch.manual_seed(3)
    traces = fit_abreast(families("gaussian"), counted, QUICK)
    first = traces[0].num_iters
    assert first < min(traces[1].num_iters, traces[2].num_iters)
    assert sum(0 in which for which in asked) == first + JUDGE
    assert asked[-1] != [0, 1, 2]


def test_the_length_of_gradients_is_each_fits_own():
    """A steep neighbour, whose gradient is clipped hard, does not slow the others down."""

    def steep(theta: Tensor, which: Tensor) -> Tensor:
        return log_p(theta, which) * torch.where(which == 1, 1e6, 1.0)[:, None]

    torch.manual_seed(4)
    found = families("gaussian")
    fit_abreast(found, steep, QUICK)
    for i in (0, 2):
        assert found[i].sample((4000,)).mean(0).tolist() == pytest.approx(PLACES[i].tolist(), abs=0.06)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("nsf", "rKL", {}),
        ("gaussian", "fKL", {}),
        ("gaussian", "rKL", {"stick_the_landing": False}),
        ("gaussian", "rKL", {"optimizer": torch.optim.SGD}),
        ("gaussian", "rKL", {"max_potential_evals": 1000}),
        ("gaussian", "rKL", {"init": "match"}),
    ],
)
def test_what_is_fitted_alone(name: str, method: str, options: dict):
    assert not goes_abreast(families(name, 1)[0], method, TrainOptions(**options))
