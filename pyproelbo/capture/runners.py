"""The functions that run a captured graph: as it is, compiled, and with an update at its end."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyproelbo._backend.of_graph import run_with
from pyproelbo._backend.products import with_fast_products
from pyproelbo._messages.warn import warn
from pyproelbo.capture.cuda import CudaGraph
from pyproelbo.capture.graph import Computed
from pyproelbo.capture.options import Capture, CaptureWarning, Compiling, GraphFunction
from pyproelbo.capture.runs import Runs, uncompiled
from pyproelbo.capture.surroundings import without_autocast
from pyproelbo.capture.updating import Updating, WithUpdate

_NODES = 25  # of an update for each parameter, at most


class Steps(NamedTuple):
    """What a captured step does with a function that runs its graph.

    Attributes:
        made: the step that a function makes from the arguments' tensors.
        checked: raises where a compiled function does not make the step of the graph; see
            :class:`~pyproelbo.capture.runs.Runs`.
        undone: a context that restores random numbers, buffers, and further tensors.
    """

    made: Callable[[GraphFunction, list[Tensor]], Computed]
    checked: Callable[[GraphFunction, list[Tensor]], float | None]
    undone: Callable[[Sequence[Tensor]], AbstractContextManager[object]]


class Runners:
    """The functions that run a graph, each of which is compiled once it is needed.

    Args:
        module: the graph.
        arguments: the tensors in those of the first step.
        inputs: those of the graph, which follow them.
        kept: what the graph's capture has left.

    Attributes:
        function: runs the graph uncompiled.
    """

    def __init__(
        self,
        module: GraphModule,
        arguments: list[Tensor],
        inputs: list[Tensor],
        kept: Sequence[object],
        options: Capture,
        steps: Steps,
    ) -> None:
        self._inputs, self._kept, self._options, self._steps = inputs, kept, options, steps
        is_fast = options.backend == "inductor"
        self._module = with_fast_products(module) if is_fast else module
        self._runs: dict[bool, Runs] = {}  # without an update, and with it
        self.function: GraphFunction = self._module
        try:
            self.function = self._recorded(self._module, arguments, None)
        except Exception as error:
            self._warn(error)

    @property
    def all(self) -> list[Runs]:
        """Those that there are."""
        return list(self._runs.values())

    def of(self, updating: Updating | None, arguments: list[Tensor]) -> Runs:
        """What runs the graph, or the graph with an update that it may make."""
        runs = self._runs.get(updating is not None)
        if runs is None:
            runs = self._runs[updating is not None] = self._started(updating, arguments)
            runs.look(arguments)
        return runs

    def may_update(self, num_parameters: int) -> bool:
        """Whether the graph is compiled with an update of so many parameters."""
        if self._kept or self._options.backend != "inductor":
            return False  # nothing tells when an opaque function reads a parameter
        return len(self._module.graph.nodes) + _NODES * num_parameters <= self._options.max_nodes

    def _started(self, updating: Updating | None, arguments: list[Tensor]) -> Runs:
        """The runner of the graph, which is compiled meanwhile where possible."""
        module, inputs = self._module, [*arguments, *self._inputs]
        if updating is not None:
            module = updating.module(module, is_checked=not self._options.lazy_loss)
            inputs += updating.update.inputs
        compiled: Compiling | None = None
        try:
            with self._steps.undone(()), without_autocast(), run_with(self._kept):
                examples = [x.detach() for x in inputs]
                compiling = self._options.compiling(module, examples, self._kept)
            if compiling is not None:
                compiled = lambda: self._compiled(compiling(), arguments, updating)  # noqa: E731
        except Exception as error:
            self._warn(error)
        made, checked = self._steps.made, self._steps.checked
        return Runs(self.function, compiled, made, checked, str(self._options.backend))

    def _compiled(
        self, run: GraphFunction | None, arguments: list[Tensor], updating: Updating | None
    ) -> GraphFunction | None:
        if run is None:
            return None
        recorded = self._recorded(run, arguments, updating)
        return recorded if updating is None else WithUpdate(recorded, updating)

    def _recorded(
        self, run: GraphFunction, arguments: list[Tensor], updating: Updating | None
    ) -> GraphFunction:
        """The function as a CUDA graph, if all is on a GPU."""
        changed = [] if updating is None else updating.changed
        inputs = [*self._inputs, *([] if updating is None else updating.update.inputs)]
        if not (self._options.cuda_graph and all(x.is_cuda for x in (*arguments, *inputs))):
            return run
        with self._steps.undone(changed), torch.no_grad(), run_with(self._kept):
            gradients = range(1, 1 + (0 if updating is None else len(updating.update.params)))
            return CudaGraph(run, [x.detach() for x in arguments], inputs, passing=gradients)

    def _warn(self, error: Exception) -> None:
        warn(uncompiled(self._options.backend, error), CaptureWarning)
