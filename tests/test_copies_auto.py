"""Copies of posteriors with q="auto": equal, independent, and as trainable as the original."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_cases import KINDS, auto, found, trained
from posterior_cases import OTHER, X, alone_and_seeded
from visbi import VIPosterior
from visbi.core.random import seeded

__all__ = ["alone_and_seeded"]


def through_torch(posterior: VIPosterior, **options: Any) -> VIPosterior:
    buffer = io.BytesIO()
    torch.save(posterior, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False, **options)


WAYS: dict[str, Callable[[VIPosterior], VIPosterior]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda posterior: pickle.loads(pickle.dumps(posterior)),
    "torch": through_torch,
}
EACH = pytest.mark.parametrize("way", WAYS)


def drawn(posterior: VIPosterior) -> list[Tensor]:
    """Corrected draws, raw ones with their densities, and weighted ones."""
    with seeded(2):
        theta, raw = posterior.sample((200,)), posterior.sample((200,), correct=False)
    return [theta, raw, posterior.log_prob(raw), *posterior.weighted_sample(100)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@EACH
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_equal_and_independent(kind: str, way: str) -> None:
    posterior = found(kind)
    duplicate = WAYS[way](posterior)
    before = drawn(posterior)
    assert equal(before, drawn(duplicate))
    assert (duplicate.report, duplicate.trace, repr(duplicate)) == (
        posterior.report,
        posterior.trace,
        repr(posterior),
    )
    assert duplicate._state.family is duplicate.q and duplicate.potential_fn.prior is duplicate.prior
    trained(duplicate, OTHER)
    assert torch.equal(posterior.default_x, X) and equal(before, drawn(posterior))
    assert not equal(before, drawn(duplicate)) and duplicate.report.n_values > 1000


@EACH
def test_a_copy_goes_on_as_the_original_would(way: str) -> None:
    for posterior in (auto(), trained(auto())):
        duplicate = WAYS[way](posterior)
        trained(posterior, seed=3), trained(duplicate, seed=3)
        assert equal(drawn(posterior), drawn(duplicate))


@EACH
def test_a_pool_that_grows_is_the_copys_own(way: str) -> None:
    posterior = found("mixture")
    duplicate = WAYS[way](posterior)
    n = len(posterior._state.draws.theta)
    duplicate.weighted_sample(n + 100)
    assert len(posterior._state.draws.theta) == n


@EACH
def test_before_training(way: str) -> None:
    with pytest.raises(ValueError, match=r"train\(\)"):
        WAYS[way](auto()).sample()


@pytest.mark.parametrize("kind", KINDS)
def test_map_location_moves_all_of_it(kind: str) -> None:
    elsewhere = through_torch(found(kind), map_location="meta")
    assert elsewhere._device == elsewhere.potential_fn.device == "meta"
    assert elsewhere.sample((3,)).device.type == elsewhere.default_x.device.type == "meta"
    assert elsewhere._state.draws.theta.device.type == "meta"
