"""What the capture of the graph that runs has left: its opaque functions, by their numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_of_graph: ContextVar[Sequence[object]] = ContextVar("of_graph", default=())


@contextmanager
def run_with(kept: Sequence[object]) -> Iterator[None]:
    """While this lasts a graph runs whose capture has left ``kept``."""
    token = _of_graph.set(kept)
    try:
        yield
    finally:
        _of_graph.reset(token)


def kept_by_graph() -> Sequence[object]:
    """What it has left."""
    return _of_graph.get()
