"""Which keywords of which method have a test that shows their effect."""

from collections.abc import Callable
from typing import Any

__all__ = ["Shown"]


class Shown:
    """`@shows(method, keyword, ...)` marks a test that fails when one of the keywords loses its effect."""

    def __init__(self) -> None:
        self.pairs: set[tuple[str, str]] = set()

    def __call__(self, method: str, *keywords: str) -> Callable[[Any], Any]:
        self.pairs.update((method, keyword) for keyword in keywords)
        return lambda test: test

    def of(self, method: str) -> set[str]:
        """The keywords of a method that are shown."""
        return {keyword for name, keyword in self.pairs if name == method}
