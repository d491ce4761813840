r"""A function that a captured step keeps as one operation, such as a loop over time.

A capture has each operation of a loop's T steps, and again those of their gradients: graphs
that take minutes to compile, and longer for larger T. :func:`opaque` makes two operations of a
function, one that runs it and one that takes its gradients back. Each replay then runs the
function itself, with autograd, as eagerly. A graph knows its opaque functions by their number, so
that what has been compiled of it in one process is right in others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from pyproelbo._backend.of_graph import run_with

Function = Callable[..., Sequence[Tensor]]

_kept: ContextVar[list[object] | None] = ContextVar("kept", default=None)


def opaque(function: Function, *tensors: Tensor) -> Sequence[Tensor]:
    """``function(*tensors)``; while a step is captured, as one operation.

    Args:
        function: from tensors to tensors. It may close over parameters and modules, which get
            their gradients. If it closes over what the step has computed, its operations are
            captured one by one.
    """
    kept = _kept.get()
    if kept is None:
        return function(*tensors)
    from pyproelbo._backend.operations import as_operation  # of torch's experimental parts

    return as_operation(function, tensors, kept)


@contextmanager
def kept_opaque() -> Iterator[list[object]]:
    """While this lasts captures have opaque functions as such.

    The list is of what the graph needs for as long as it is used.
    """

    kept: list[object] = []
    token = _kept.set(kept)
    try:
        with run_with(kept):
            yield kept
    finally:
        _kept.reset(token)
