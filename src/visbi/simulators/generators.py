"""One seed for every generator that a simulator may use without being asked.

Simulators draw from torch's global generator, NumPy's legacy global generator or Python's `random`.
`all_generators` seeds the three for the length of a block and puts the three back afterwards.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from visbi.core.random import seeded

__all__ = ["all_generators", "reseed"]

# the generators belong to the process: under a threading backend, runs take turns
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def all_generators(seed: int) -> Iterator[None]:
    """Run a block with torch, NumPy and `random` seeded; restore all three afterwards.

    Args:
        seed: a whole number in [0, 2**32).

    >>> with all_generators(1):
    ...     a = (torch.rand(()).item(), np.random.rand(), random.random())
    >>> with all_generators(1):
    ...     b = (torch.rand(()).item(), np.random.rand(), random.random())
    >>> a == b
    True
    """
    with _ONE_AT_A_TIME, seeded(seed):
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            reseed(seed)
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def reseed(seed: int) -> None:
    """Seed the three generators anew, inside a block of `all_generators`."""
    # torch.manual_seed formats a stack trace for CUDA's sake, 200 times the price of this
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)
