"""Seeds: repeatable inside, nothing changed outside."""

import numpy as np
import pytest
import torch

from visbi.core.random import fresh_seed, seeded, spawn_seeds


def draw(seed):
    with seeded(seed):
        return torch.randn(5)


def test_a_seed_repeats_and_another_differs():
    assert torch.equal(draw(3), draw(3))
    assert torch.equal(draw(3), draw(torch.tensor(3)))
    assert torch.equal(draw(3), draw(np.int64(3)))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("seed", [-1, torch.tensor(-1), 0.5])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="`seed`: expected a whole number >= 0"):
        draw(seed)


def test_the_global_generator_is_as_it_was():
    before = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_as_it_was_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(3):
        never_returns(torch.randn(5))
    assert torch.equal(torch.get_rng_state(), before)


def never_returns(_):
    raise ZeroDivisionError


def test_no_seed_draws_from_the_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = torch.randn(5)
        torch.manual_seed(11)
        assert torch.equal(draw(None), expected)
        assert not torch.equal(draw(None), expected)


def test_a_seed_inside_a_seed_leaves_the_outer_stream_alone():
    def outer(between):
        with seeded(1):
            return torch.randn(2), between(), torch.randn(2)

    plain, nested = outer(lambda: None), outer(lambda: draw(2))
    assert torch.equal(plain[0], nested[0])
    assert torch.equal(plain[2], nested[2])
    assert torch.equal(nested[1], draw(2))


def never(*_):
    raise AssertionError("CUDA was touched")


def test_cuda_is_left_alone_until_it_is_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("device_count", "get_rng_state", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, never)
    assert torch.equal(draw(3), draw(3))


def test_cuda_in_use_is_seeded_and_restored(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append((state, device)))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", calls.append)
    draw(3)
    assert calls == [3, ("state 0", 0), ("state 1", 1)]


def test_fresh_seeds_follow_the_global_generator():
    with seeded(5):
        a = [fresh_seed() for _ in range(3)]
    with seeded(5):
        assert [fresh_seed() for _ in range(3)] == a
    assert len(set(a)) == 3


def test_spawned_seeds_do_not_depend_on_how_many():
    seeds = spawn_seeds(7, 100)
    assert spawn_seeds(7, 3) == seeds[:3]
    assert len(set(seeds)) == 100
    assert spawn_seeds(8, 100) != seeds
    assert all(0 <= seed < 2**32 for seed in seeds)  # NumPy's legacy generator takes no more
    assert spawn_seeds(7, 0) == []


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_spawning_needs_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"^`seed`: expected a whole number >= 0; got "):
        spawn_seeds(seed, 2)
