"""Pieces of work over joblib's workers.

Which backend runs them (loky processes, threads, Dask, Ray) is for the caller's `joblib.parallel_config` to
say. Pieces finish in any order, so each must say which one it is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from visbi.core.checks import violation

__all__ = ["check_workers", "in_parallel", "n_workers", "one_thread"]

T = TypeVar("T")


def check_workers(workers: Any) -> int | None:
    """`workers` if it is a number of processes, -1 for all cores, or None for the enclosing configuration.

    Raises:
        ValueError: anything else.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers == 0):
        expected = "a whole number >= 1, -1 for all cores, or None"
        raise ValueError(violation("workers", expected, repr(workers)))
    return workers


def in_parallel(
    function: Callable[..., T], arguments: Iterable[tuple[Any, ...]], workers: int | None
) -> Iterator[T]:
    """What `function` returns for each tuple of arguments, as it comes.

    Args:
        function: can be sent to another process, as can what it takes and gives.
        arguments: one tuple for each call; taken as workers become free.
        workers: see `check_workers`.

    >>> list(in_parallel(pow, [(2, 3), (2, 4)], 1))
    [8, 16]
    """
    from joblib import Parallel, delayed

    tasks = (delayed(function)(*each) for each in arguments)
    try:
        parallel = Parallel(n_jobs=workers, return_as="generator_unordered")
    except ValueError:  # a backend that hands over whole lists only: give it a few pieces at a time
        parallel = Parallel(n_jobs=workers)
        for wave in _waves(tasks, 4 * n_workers(workers)):
            yield from parallel(wave)  # type: ignore[misc]
        return
    yield from parallel(tasks)  # type: ignore[misc]


def n_workers(workers: int | None) -> int:
    """How many processes `workers` are, see `check_workers`, where they are asked for."""
    from joblib import effective_n_jobs

    return effective_n_jobs(workers)  # type: ignore[arg-type]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch in one thread: workers share the cores, and sums come out the same wherever they are made."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _waves(tasks: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(tasks)
    while wave := list(islice(iterator, size)):
        yield wave
