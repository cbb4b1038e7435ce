"""Seeds: everything random runs under one explicit seed or under torch's global generator.

With a seed, the global generators are left exactly as they were; without one, torch's global
generator is the only source of randomness. CUDA's generators take part once CUDA is in use, and
seeding does not start it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import non_negative_int

__all__ = ["checked_seed", "fresh_seed", "root_seed", "seeded", "spawn_seeds"]


@contextmanager
def seeded(seed: int | Tensor | None) -> Iterator[None]:
    """Run a block under `seed` and restore torch's generators afterwards; None changes nothing.

    Raises:
        ValueError: `seed` is no whole number of at least 0.

    >>> with seeded(3):
    ...     a = torch.randn(2)
    >>> with seeded(3):
    ...     b = torch.randn(2)
    >>> bool((a == b).all())
    True
    """
    if seed is None:
        yield
        return
    number = checked_seed(seed)
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        # torch.manual_seed would also leave its seed behind for a CUDA that is started later
        torch.default_generator.manual_seed(number)
        if devices:
            torch.cuda.manual_seed_all(number)
        yield


def checked_seed(seed: int | Tensor) -> int:
    """`seed` as an int, or ValueError if it is no whole number of at least 0."""
    return non_negative_int("seed", seed.item() if isinstance(seed, Tensor) else seed)


def root_seed(seed: int | Tensor | None, kept: int | None) -> int:
    """The seed that was given, else that of work that was `kept`, else a fresh one.

    Raises:
        ValueError: `seed` is no whole number of at least 0.
    """
    if seed is not None:
        return checked_seed(seed)
    return fresh_seed() if kept is None else kept


def fresh_seed() -> int:
    """A seed drawn from torch's global generator (and so repeatable under `torch.manual_seed`)."""
    return int(torch.randint(2**31 - 1, ()).item())


def spawn_seeds(seed: int, n: int) -> list[int]:
    """`n` independent seeds derived from one; seed i does not depend on `n`.

    Raises:
        ValueError: `seed` is no whole number of at least 0.

    >>> spawn_seeds(0, 3) == spawn_seeds(0, 5)[:3]
    True
    """
    root = np.random.SeedSequence(non_negative_int("seed", seed))
    return [int(child.generate_state(1)[0]) for child in root.spawn(n)]
