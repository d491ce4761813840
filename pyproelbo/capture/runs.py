"""What runs a captured graph: the graph itself at first, and what it is compiled to once there."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter

import torch
from torch import Tensor

from pyproelbo._messages.warn import warn
from pyproelbo.capture.compared import check
from pyproelbo.capture.graph import Computed
from pyproelbo.capture.options import CaptureWarning, Compiling, GraphFunction

_TURNS = 5  # of each, whose best counts
_SLOWER = 1.5  # so that chance, which would change the rounding from run to run, has no say


class Runs:
    """The function that makes a step, which is another one once a compiler is done.

    The compiled function has to make the step that the graph makes. Then the two take turns for
    some steps, which are the same but for rounding, and the compiled one stays unless it is slower.

    Args:
        function: runs the graph as it is.
        compiling: what it is compiled to, as far as that is there; None for nothing.
        made: the step that a function makes of the arguments' tensors.
        undone: a context after which random numbers and buffers are what they were.
        near: how far apart steps may be, relative to their size.
        name: of the compiler, for messages.
    """

    def __init__(
        self,
        function: GraphFunction,
        compiling: Compiling | None,
        made: Callable[[GraphFunction, list[Tensor]], Computed],
        undone: Callable[[], AbstractContextManager[object]],
        near: float,
        name: str,
    ) -> None:
        self.function = function
        self._compiling, self._compiled = compiling, None
        self._made, self._undone, self._near, self._name = made, undone, near, name
        self._times: tuple[list[float], list[float]] = [], []

    @property
    def is_compiling(self) -> bool:
        """Whether the compiler is still at work."""
        return self._compiling is not None

    def step(self, tensors: list[Tensor]) -> Computed:
        """Make the step."""
        if self._compiling is not None:
            self.look(tensors)
        if self._compiled is not None:
            return self._turn(self._compiled, tensors)
        return self._made(self.function, tensors)

    def look(self, tensors: list[Tensor]) -> None:
        """See whether the compiler is done, and whether what it has made makes this step."""
        if self._compiling is None:
            return
        try:
            compiled = self._compiling()
            if compiled is None:
                return
            with self._undone():
                expected = self._made(self.function, tensors)
            with self._undone():
                check(self._made(compiled, tensors), expected, self._near)
        except Exception as error:
            warn(uncompiled(self._name, error), CaptureWarning)
            self._compiling = None
            return
        self._compiling, self._compiled = None, compiled

    def _turn(self, compiled: GraphFunction, tensors: list[Tensor]) -> Computed:
        own, others = self._times
        is_others = len(others) <= len(own)
        start = perf_counter()
        step = self._made(compiled if is_others else self.function, tensors)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        (others if is_others else own).append(perf_counter() - start)
        if len(own) == _TURNS:
            self._compiled = None
            if min(others) < _SLOWER * min(own):
                self.function = compiled
            else:
                warn(
                    f"a captured step runs uncompiled, for {self._name!r} makes it slower: "
                    f"{1e3 * min(others):.3g} ms in place of {1e3 * min(own):.3g}; "
                    "backend='eager' spares the time to compile it",
                    CaptureWarning,
                )
        return step


def uncompiled(name: object, error: Exception) -> str:
    """That a compiler has failed."""
    reason = str(error).partition("\n")[0]
    return f"a captured step runs uncompiled, for {name!r} failed on it: {reason}"
