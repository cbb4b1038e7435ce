"""Seeds: everything random runs under one explicit seed or under torch's global generator.

With a seed, the global generators are left exactly as they were; without one, torch's global
generator is the only source of randomness.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["fresh_seed", "seeded", "spawn_seeds"]


@contextmanager
def seeded(seed: int | Tensor | None) -> Iterator[None]:
    """Run a block under `seed` and restore torch's generators afterwards; None changes nothing.

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
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield


def fresh_seed() -> int:
    """A seed drawn from torch's global generator (and so repeatable under `torch.manual_seed`)."""
    return int(torch.randint(2**31 - 1, ()).item())


def spawn_seeds(seed: int, n: int) -> list[int]:
    """`n` independent seeds derived from one; seed i does not depend on `n`.

    >>> spawn_seeds(0, 3) == spawn_seeds(0, 5)[:3]
    True
    """
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(n)]
