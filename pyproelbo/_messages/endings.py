"""Why fits have stopped, for the report that runs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_noted: ContextVar[list[str] | None] = ContextVar("endings", default=None)


@contextmanager
def noting(endings: list[str]) -> Iterator[None]:
    """Within it each fit that stops adds the reason, whoever calls it."""
    token = _noted.set(endings)
    try:
        yield
    finally:
        _noted.reset(token)


def note(reason: str) -> None:
    """Record why a fit has stopped."""
    endings = _noted.get()
    if endings is not None:
        endings.append(reason)
