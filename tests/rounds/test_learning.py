"""What a round learns from, and when its networks go on from those of the round before."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import LogNormal

from visbi.estimators import TrainedLikelihood, TrainingOptions, fit_likelihood
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.priors import BoxUniform, coordinates
from visbi.rounds import learning
from visbi.rounds.learning import Learning, learning_set
from visbi.simulators import Simulations

COORDS = coordinates(BoxUniform(-torch.ones(1), torch.ones(1)))
LEARNING = Learning(
    flow="maf",
    num_transforms=1,
    hidden_features=4,
    ensemble=1,
    options=TrainingOptions(max_epochs=1, learning_rate=1e-12, weight_decay=0.0),
)


def runs(n: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    theta = 2 * torch.rand(n, 1, generator=generator) - 1
    return theta, scale * (theta + torch.randn(n, 2, generator=generator))


def learn(n: int, scale: float, earlier: TrainedLikelihood | None) -> TrainedLikelihood:
    return LEARNING.learn(
        *runs(n, scale), COORDS, earlier=earlier, workers=1, seed=n, show_progress_bar=False
    )


@pytest.mark.parametrize(("scale", "goes_on"), [(1.0, True), (3.0, True), (0.6, True), (0.4, False)])
def test_goes_on_unless_x_has_become_narrow(scale: float, goes_on: bool) -> None:
    first = learn(200, 1.0, None)
    then = learn(300, scale, first)
    before, after = first.estimator.members[0], then.estimator.members[0]
    assert torch.equal(before.standardise_x.scale, after.standardise_x.scale) == goes_on
    weights = [next(member.flow.encoder.parameters()) for member in (before, after)]
    assert torch.allclose(*weights, atol=1e-6) == goes_on


def simulations(n: int) -> Simulations:
    theta, x = runs(n)
    return Simulations(theta, x, theta[:0], (), 0)


def test_all_rounds_are_learnt_from_in_order() -> None:
    first, second = simulations(40), simulations(30)
    theta, x, _ = learning_set([first, second], None)
    assert torch.equal(theta, torch.cat([first.theta, second.theta]))
    assert torch.equal(x, torch.cat([first.x, second.x]))


def test_usable_decides_by_x() -> None:
    runs = simulations(200)
    theta, x, _ = learning_set([runs], lambda x: x[:, 0] > 0)
    keep = runs.x[:, 0] > 0
    assert torch.equal(theta, runs.theta[keep]) and torch.equal(x, runs.x[keep])


def test_too_few() -> None:
    assert len(learning_set([simulations(50)], None)[0]) == 50
    with pytest.raises(ValueError, match="`simulations`: expected at least 50 successful runs; got 49"):
        learning_set([simulations(49)], None)


def test_theta_in_a_box_as_it_is_and_else_in_the_prior_s_coordinates() -> None:
    half_line = coordinates(LogNormal(torch.zeros(1), torch.ones(1)))
    theta, x = runs(100)
    by_box = LEARNING.learn(theta, x, COORDS, earlier=None, workers=1, seed=0, show_progress_bar=False)
    by_rate = LEARNING.learn(
        theta.exp(), x, half_line, earlier=None, workers=1, seed=0, show_progress_bar=False
    )
    box, rate = (trained.estimator.members[0] for trained in (by_box, by_rate))
    assert type(box.theta_embedding) is nn.Identity and box.config.z_score_theta == "independent"
    assert type(rate.theta_embedding) is PriorCoordinates and rate.config.z_score_theta == "none"


def options_for(n: int, flow: str, monkeypatch: pytest.MonkeyPatch) -> list[TrainingOptions]:
    """What networks are trained with that are new, go on, and go on with a user's own options."""
    seen = []
    monkeypatch.setattr(learning, "fit_likelihood", lambda *args, options, **kwargs: seen.append(options))
    usual = replace(LEARNING, options=None, flow=flow)
    plain = dict(workers=1, seed=0, show_progress_bar=False)
    theta, x = runs(n)
    earlier = fit_likelihood(theta, x, options=TrainingOptions(max_epochs=1), seed=0, show_progress_bar=False)
    usual.learn(theta, x, COORDS, earlier=None, **plain)
    usual.learn(theta, x, COORDS, earlier=earlier, **plain)
    LEARNING.learn(theta, x, COORDS, earlier=earlier, **plain)
    return seen


@pytest.mark.parametrize(
    ("n", "batch_size", "cool_after", "patience"), [(100, 50, 30, 80), (750, 50, 4, 11), (1999, 99, 3, 8)]
)
def test_affine_layers_of_few_runs_wait_for_the_held_out_loss(
    n: int, batch_size: int, cool_after: int, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting is 60 steps at least before the rate falls; networks that go on start at a quarter of it."""
    cold = TrainingOptions(
        learning_rate=1.6e-2, batch_size=batch_size, cool_after=cool_after, patience=patience, worth=2e-3
    )
    warm = replace(cold, learning_rate=cold.learning_rate / 4)
    assert options_for(n, "maf", monkeypatch) == [cold, warm, LEARNING.options]


@pytest.mark.parametrize(
    ("flow", "n", "batch_size", "epochs", "warm_epochs"),
    [
        ("maf", 2000, 100, 30, 15),
        ("nsf", 100, 50, 300, 150),
        ("nsf", 2000, 100, 30, 15),
        ("maf", 20_000, 400, 30, 15),
        ("maf", 40_000, 400, 30, 15),
        ("nsf", 75_000, 750, 30, 15),
        ("nsf", 120_000, 1000, 30, 15),
    ],
)
def test_others_are_trained_for_a_number_of_steps_that_is_known(
    flow: str, n: int, batch_size: int, epochs: int, warm_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 600 steps at least, networks that go on for half of it and from half of the rate."""
    cold = TrainingOptions(
        learning_rate=1.6e-2,
        schedule="linear",
        batch_size=batch_size,
        max_epochs=epochs,
        patience=epochs,
        weight_decay=0.01 if flow == "nsf" else 0.1,
    )
    warm = replace(cold, learning_rate=8e-3, max_epochs=warm_epochs, patience=warm_epochs)
    assert options_for(n, flow, monkeypatch) == [cold, warm, LEARNING.options]


@pytest.mark.parametrize(("flow", "asked", "layers"), [("nsf", None, 2), ("maf", None, 3), ("nsf", 5, 5)])
def test_layers(flow: str, asked: int | None, layers: int) -> None:
    of = replace(LEARNING, flow=flow, num_transforms=asked)
    learnt = of.learn(*runs(100), COORDS, earlier=None, workers=1, seed=0, show_progress_bar=False)
    assert learnt.estimator.members[0].config.num_transforms == layers
