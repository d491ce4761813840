"""Why fits have ended, told to the report that has asked for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_noted: ContextVar[list[str] | None] = ContextVar("endings", default=None)


@contextmanager
def noting(endings: list[str]) -> Iterator[None]:
    """Within it each fit that ends adds why it has, whoever calls it."""
    token = _noted.set(endings)
    try:
        yield
    finally:
        _noted.reset(token)


def note(reason: str) -> None:
    """Say why a fit has ended."""
    endings = _noted.get()
    if endings is not None:
        endings.append(reason)
