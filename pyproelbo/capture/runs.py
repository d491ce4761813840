"""The runner of a captured graph: first the graph itself, then its compiled form."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from pyproelbo._messages.warn import warn
from pyproelbo.capture.graph import Computed
from pyproelbo.capture.options import CaptureWarning, Compiling, GraphFunction

_TURNS = 5  # of each, of which the best counts
_SLOWER = 1.5  # so large that chance, which would change rounding, does not decide


class Runs:
    """The function that makes a step, which is replaced once a compiler has finished.

    The compiled function must agree with the graph. The two then alternate for some steps, which
    agree up to rounding, and the compiled one stays unless it is slower.

    Args:
        function: runs the uncompiled graph.
        compiling: its compiled form, once ready; None for none.
        made: the step that a function makes from the arguments' tensors.
        checked: raises where a compiled function differs from the graph, and returns the seconds
            that a step of the graph leaves to others; None where the step at hand cannot tell.
        name: of the compiler, for messages.
    """

    def __init__(
        self,
        function: GraphFunction,
        compiling: Compiling | None,
        made: Callable[[GraphFunction, list[Tensor]], Computed],
        checked: Callable[[GraphFunction, list[Tensor]], float | None],
        name: str,
    ) -> None:
        self.function = function
        self._compiling, self._compiled = compiling, None
        self._made, self._checked, self._name = made, checked, name
        self._left_to_others = 0.0
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
        """Check whether the compiler has finished, and whether its result makes this step."""
        if self._compiling is None:
            return
        try:
            compiled = self._compiling()
            if compiled is None:
                return
            seconds = self._checked(compiled, tensors)
            if seconds is None:
                return
            self._left_to_others = seconds
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
            if min(others) < _SLOWER * (min(own) + self._left_to_others):
                self.function = compiled
            else:
                warn(
                    f"a captured step runs uncompiled, since {self._name!r} makes it slower: "
                    f"{1e3 * min(others):.3g} ms in place of {1e3 * min(own):.3g}; "
                    "backend='eager' saves the time to compile it",
                    CaptureWarning,
                )
        return step


def uncompiled(name: object, error: Exception) -> str:
    """The message that a compiler has failed."""
    reason = str(error).partition("\n")[0]
    return f"a captured step runs uncompiled, since {name!r} failed on it: {reason}"
