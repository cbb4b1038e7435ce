"""Which simulator a store belongs to: by name, and by the text of its source as far as that can be seen.

Another name is another simulator, an error. Another text under the same name is a warning: it may be a typo
mended or a model changed, and nobody but the user knows. What the simulator calls is not looked at.
"""

import ast
import contextlib
import hashlib
import inspect
import textwrap
from functools import partial
from typing import Any

__all__ = ["code_of", "name_of"]


def name_of(simulator: Any) -> str:
    """Its qualified name, or that of its class.

    >>> name_of(partial(sum, start=1))
    'sum'
    """
    inner = _inner(simulator)
    return getattr(inner, "__qualname__", type(inner).__qualname__)


def code_of(simulator: Any) -> str | None:
    """A digest of its source, or of its class's, without comments and layout; None where there is no source.

    >>> code_of(print) is None, code_of(name_of) == code_of(name_of)
    (True, True)
    """
    inner = _inner(simulator)
    try:
        source = textwrap.dedent(inspect.getsource(inner if inspect.isroutine(inner) else type(inner)))
    except (OSError, TypeError):
        return None
    with contextlib.suppress(SyntaxError):  # the lines that a lambda was cut out of
        source = ast.unparse(ast.parse(source))
    return hashlib.sha256(source.encode()).hexdigest()


def _inner(simulator: Any) -> Any:
    while isinstance(simulator, partial):
        simulator = simulator.func
    return simulator
