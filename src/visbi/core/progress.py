"""Progress bars, one way for all of them: tqdm's where one is shown, and nothing at all where none is."""

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar, or none.

    A tqdm that is told to show nothing still takes a lock and starts a thread. A process that is forked from
    this one shares the lock; if it is killed while it holds it, its siblings wait for ever. So where nothing
    is shown there is no tqdm.

    Args:
        show: whether there is a bar.
        steps: what iterating over it gives.
        **how: for tqdm.

    >>> with Progress(False, range(3)) as bar:
    ...     for step in bar:
    ...         bar.note(f"at {step}")
    """

    def __init__(self, show: bool, steps: Iterable[Any] | None = None, **how: Any) -> None:
        self._steps: Iterable[Any] = () if steps is None else steps
        self._bar: Any = None
        if show:
            from tqdm.auto import tqdm

            self._bar = tqdm(steps, **how)
            self._steps = self._bar

    def __iter__(self) -> Iterator[Any]:
        return iter(self._steps)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.update(n)

    def note(self, text: str) -> None:
        """Text behind the bar, shown when the bar next is."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def title(self, text: str) -> None:
        """Text before the bar, shown at once."""
        if self._bar is not None:
            self._bar.set_description_str(text)

    def close(self) -> None:
        """The bar is done."""
        if self._bar is not None:
            self._bar.close()
