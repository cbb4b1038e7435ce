"""Finding out how a simulator wants to be called."""

import functools

import numpy as np
import pytest
import torch

from visbi.simulators.calling import CallStyle, call, detect
from visbi.simulators.generators import all_generators

THETA = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)) + 0.5
TIMES = torch.linspace(0, 1, 5)


def unpacks(theta):
    mu, sigma = theta
    return mu + sigma * torch.randn(4)


def two_statistics(theta):
    return torch.stack([theta[0] + theta[1], theta[0] * theta[1]]) + torch.randn(2)


def shared_noise(theta):
    return theta + torch.randn(())


def mixes_rows(theta):
    return theta.softmax(0)


def columns(theta):
    return theta[:, 0] + torch.randn(len(theta))


def ellipsis_index(theta):
    return theta[..., :1] * TIMES + torch.randn(*theta.shape[:-1], 5)


def elementwise(theta):
    return theta + torch.randn_like(theta)


def elementwise_numpy(theta):
    return np.exp(theta) + np.random.normal(size=theta.shape)


def numpy_columns(theta):
    return np.stack([theta[:, 0], np.random.poisson(theta[:, 1])], axis=-1)


def numpy_unpacks(theta):
    a, b = theta
    return np.ones(3) * a + b


def bernoulli(theta):
    return torch.bernoulli(theta.clamp(0.3, 0.7))


def float_answer(theta):
    return float(theta[0].exp())


def always_two_rows(theta):
    return torch.zeros(2, 3)


SINGLE_TORCH = [unpacks, two_statistics, shared_noise, mixes_rows, float_answer, always_two_rows]
BATCH_TORCH = [columns, ellipsis_index, elementwise, bernoulli]


@pytest.mark.parametrize("simulator", SINGLE_TORCH)
def test_single_torch(simulator):
    assert detect(simulator, THETA, 0) == CallStyle(batched=False, numpy=False)


@pytest.mark.parametrize("simulator", BATCH_TORCH)
@pytest.mark.parametrize("seed", range(5))
def test_batched_torch(simulator, seed):
    assert detect(simulator, THETA, seed) == CallStyle(batched=True, numpy=False)


def test_a_builtin_without_a_signature():
    assert detect(torch.exp, THETA, 0) == CallStyle(batched=True, numpy=False)


@pytest.mark.parametrize("simulator", [elementwise_numpy, numpy_columns])
def test_batched_numpy(simulator):
    assert detect(simulator, THETA, 0) == CallStyle(batched=True, numpy=True)


def test_single_numpy():
    assert detect(numpy_unpacks, THETA, 0) == CallStyle(batched=False, numpy=True)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_width_of_theta_does_not_confuse(width):
    theta = torch.rand(12, width)
    assert not detect(lambda t: t.sum() + torch.randn(2), theta, 0).batched
    assert not detect(lambda t: t.sum() + torch.randn(8), theta, 0).batched
    assert detect(lambda t: t.sum(-1, keepdim=True) + torch.randn(len(t), 2), theta, 0, batched=True).batched


def test_undecidable_asks_the_user():
    with pytest.raises(ValueError, match="`batched`: expected True or False"):
        detect(lambda t: t.sum(-1) + torch.randn(len(t)), THETA, 0)


def test_the_user_decides():
    assert detect(elementwise, THETA, 0, batched=False) == CallStyle(batched=False, numpy=False)
    assert detect(shared_noise, THETA, 0, batched=True) == CallStyle(batched=True, numpy=False)


def test_failing_rows_are_passed_over():
    def fails_often(theta):
        if theta.copy()[0] < THETA[:, 0].median():
            raise ArithmeticError
        return np.ones(3)

    assert detect(fails_often, THETA, 0) == CallStyle(batched=False, numpy=True)


class Callable:
    def __call__(self, theta, *, rng):
        return rng.normal(theta, 1.0)


@pytest.mark.parametrize(
    ("simulator", "keywords"),
    [
        (lambda theta, seed: theta + seed, ("seed",)),
        (lambda theta, seed=None, rng=None: theta, ("rng", "seed")),
        (Callable(), ("rng",)),
        (functools.partial(lambda scale, theta, rng: scale * theta, 2.0), ("rng",)),
        (lambda seed: seed * 1.0, ()),
        (np.exp, ()),
    ],
)
def test_keywords(simulator, keywords):
    assert detect(simulator, THETA, 0).keywords == keywords


def test_call_hands_over_generator_and_seed():
    def simulator(theta, rng, seed):
        assert isinstance(theta, np.ndarray) and theta.dtype == np.float64
        return seed, rng.random()

    with all_generators(0):
        seed, value = call(simulator, CallStyle(True, True, ("rng", "seed")), THETA, 7)
    assert seed == 7 and value == np.random.default_rng(7).random()


def test_detect_leaves_generators_alone_and_is_silent(recwarn):
    state = torch.get_rng_state()
    detect(elementwise_numpy, THETA, 0)
    assert torch.equal(state, torch.get_rng_state()) and not recwarn.list
