"""Options of a fit: what each may be, and what an error says."""

import dataclasses
import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch

from visbi.fitting import TrainOptions
from visbi.fitting.config import INITS, METHODS, QUALITY_METRICS
from visbi.posterior import VIPosterior

BAD = {
    "n_particles": [0, -1, 2.5, math.nan, math.inf, "8", None, True],
    "learning_rate": [0, -1e-3, math.nan, math.inf, "fast", None],
    "gamma": [0.0, -0.5, 1.0001, math.nan, "x"],
    "max_num_iters": [0, -1, 1.5, math.inf],
    "min_num_iters": [-1, 0.5, math.nan],
    "clip_value": [0, -1.0, math.inf, math.nan],
    "warm_up_rounds": [-1, 0.5, None],
    "retrain_from_scratch": [1, None, "yes"],
    "reset_optimizer": [0, None],
    "show_progress_bar": ["no", 1],
    "check_for_convergence": [None, 1.0],
    "quality_control": [2, "psis"],
    "quality_control_metric": ["PSIS", "khat", None, 3],
    "eps": [-1e-9, math.inf, math.nan, "small"],
    "retain_graph": [None, 1],
    "optimizer": ["adam", None, 3],
    "scheduler": ["cosine", None],
    "alpha": [-0.1, math.inf, math.nan, "half"],
    "K": [0, -2, 1.5, math.inf],
    "stick_the_landing": [1, "yes"],
    "dreg": [0, "no"],
    "weight_transform": ["clamp", 3.0],
    "init": ["posterior", None, torch.zeros(3), torch.zeros(1, 2), torch.full((4, 2), torch.nan)],
    "seed": ["one", 1.5],
    "max_potential_evals": [0, -5, 1.5, math.inf, "many", True],
    "max_seconds": [0, -1.0, math.nan, math.inf, "long"],
    "allow_failed": [None, 1, "yes"],
}
GOOD = {
    "n_particles": [1, np.int64(7), 8.0],
    "learning_rate": [1e-9, 10, np.float64(0.1)],
    "gamma": [1, 1.0, 1e-6],
    "max_num_iters": [1],
    "min_num_iters": [0, 10**9],
    "clip_value": [1e-9, 5],
    "warm_up_rounds": [0],
    "quality_control_metric": list(QUALITY_METRICS),
    "eps": [0.0, 3],
    "optimizer": [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.5)],
    "alpha": [0.0, 1.0, 2],
    "K": [1, 32],
    "stick_the_landing": [None, True, False],
    "dreg": [None, True, False],
    "weight_transform": [None, torch.sqrt],
    "init": [*INITS, torch.zeros(2, 3)],
    "seed": [None, 0, np.int64(3), torch.tensor(4)],
    "max_potential_evals": [None, 1, np.int64(7), 1e5],
    "max_seconds": [None, 1, 0.5, np.float64(2.0)],
    "allow_failed": [True, False],
}


def test_every_field_is_tested():
    assert set(BAD) == {field.name for field in dataclasses.fields(TrainOptions)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_values(name, value):
    with pytest.raises((ValueError, TypeError), match=f"^`{name}`: expected .*; got "):
        TrainOptions(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_good_values(name, value):
    kept = getattr(TrainOptions(**{name: value}), name)
    assert kept is value or kept == value


@pytest.mark.parametrize("name", ["n_particles", "max_num_iters", "min_num_iters", "warm_up_rounds", "K"])
def test_whole_numbers_are_kept_as_int(name):
    assert type(getattr(TrainOptions(**{name: 12.0}), name)) is int


@pytest.mark.parametrize(
    ("given", "meant"),
    [("n_partcles", "n_particles"), ("learning_rte", "learning_rate"), ("k", None), ("Eps", "eps")],
)
def test_unknown_keywords(given, meant):
    with pytest.raises(TypeError, match=rf"`{given}`: expected a keyword of train\(\)") as caught:
        TrainOptions.from_keywords({"seed": 1, given: 3})
    assert (f"Did you mean `{meant}`?" in str(caught.value)) is (meant is not None)


def test_from_keywords_keeps_every_one():
    options = TrainOptions.from_keywords({"seed": 3, "K": 2, "eps": 0.5})
    assert (options.seed, options.K, options.eps) == (3, 2, 0.5)
    assert options.n_particles == TrainOptions.DEFAULT.n_particles


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainOptions().alpha = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainOptions(8)  # type: ignore[misc]


def test_defaults_stand_once():
    signature = inspect.signature(VIPosterior.train).parameters
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    shared = set(signature) & set(defaults)
    assert len(shared) >= 13
    assert all(signature[name].default == defaults[name] for name in shared)


def test_published_defaults():
    published = dict(
        n_particles=256,
        learning_rate=1e-3,
        gamma=0.999,
        max_num_iters=2000,
        min_num_iters=10,
        clip_value=10.0,
        warm_up_rounds=100,
        retrain_from_scratch=False,
        reset_optimizer=False,
        show_progress_bar=True,
        check_for_convergence=True,
        quality_control=True,
        quality_control_metric="psis",
    )
    assert {name: getattr(TrainOptions.DEFAULT, name) for name in published} == published
    assert METHODS == ("rKL", "fKL", "IW", "alpha")
