"""What the capture of the graph that runs has left: its opaque functions, by their numbers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

_of_graph: ContextVar[Sequence[object]] = ContextVar("of_graph", default=())


def run_with(kept: Sequence[object]) -> AbstractContextManager[None]:
    """While this lasts a graph runs whose capture has left ``kept``."""
    return _run_with(kept) if kept or _of_graph.get() else nullcontext()


@contextmanager
def _run_with(kept: Sequence[object]) -> Iterator[None]:
    token = _of_graph.set(kept)
    try:
        yield
    finally:
        _of_graph.reset(token)


def kept_by_graph() -> Sequence[object]:
    """What it has left."""
    return _of_graph.get()
