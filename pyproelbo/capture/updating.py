"""A captured step that also updates the parameters, in place of their optimiser."""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx import GraphModule

from pyproelbo._backend.layouts import Layout
from pyproelbo._backend.torch_private import memory_of
from pyproelbo._backend.updates import Update, with_update
from pyproelbo.capture.options import GraphFunction
from pyproelbo.capture.structure import CannotCapture

_MOST = 64  # parameters: the more there are, the less is saved, and the longer compilers take


class Updating:
    """The update with which a step ends.

    Args:
        update: that of ``leaves``.
        leaves: of the step's graph.
        inputs: of the graph, after the arguments.
        num_arguments: the number of tensors in these.
    """

    def __init__(
        self, update: Update, leaves: list[Tensor], inputs: list[Tensor], num_arguments: int
    ) -> None:
        self.update, self._leaves, self._inputs = update, leaves, inputs
        places = {id(x): num_arguments + i for i, x in enumerate(inputs)}
        self._places = [places[id(p)] for p in leaves]
        self._rule, self._layouts = update.rule, _laid_out(update)
        self._written = {memory_of(p) for p in leaves}
        self._addresses = list(map(Tensor.data_ptr, inputs))

    @classmethod
    def of(
        cls,
        update: Update,
        leaves: Sequence[Tensor | int],
        arguments: Sequence[Tensor],
        inputs: list[Tensor],
    ) -> "Updating | None":
        """None where a graph cannot make the update.

        Args:
            leaves: of the graph; an argument by its number.
        """
        known = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        are_strided = all(x.layout == torch.strided for x in (*arguments, *inputs))
        if not (are_strided and len(known) == len(leaves) <= _MOST and update.takes(known)):
            return None
        ids = {*map(id, known)}
        others = {memory_of(x) for x in inputs if id(x) not in ids}
        updating = cls(update, known, inputs, len(arguments))
        return updating if updating._written.isdisjoint(others) else None

    def takes(self, update: Update, tensors: Sequence[Tensor]) -> bool:
        """Whether this is the update after a step with such arguments."""
        if update is not self.update:
            is_alike = update.rule == self._rule and update.takes(self._leaves)
            if not is_alike or _laid_out(update) != self._layouts:
                return False
            self.update = update
        return (
            update.is_made()
            and update.is_same_rule()
            and list(map(Tensor.data_ptr, self._inputs)) == self._addresses  # as by p.data = ...
            and self._written.isdisjoint(map(memory_of, tensors))
        )

    def module(self, module: GraphModule, is_checked: bool) -> GraphModule:
        """The graph, and the update where a loss that ``is_checked`` is finite."""
        return with_update(module, self.update, self._places, is_checked)

    @property
    def changed(self) -> list[Tensor]:
        """What it changes."""
        return [*self.update.params, *self.update.states]

    def check(self, updated: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
        """The seconds that the optimiser itself takes.

        Args:
            updated: what ``changed`` was after an update by these gradients, which is undone.

        Raises:
            CannotCapture: if the optimiser would make other ones of them.
        """
        start = perf_counter()
        expected = self.update.by_torch(gradients)
        seconds = perf_counter() - start
        ours_of_all = updated[: len(expected)]
        for p, ours, theirs in zip(self.update.params, ours_of_all, expected, strict=True):
            eps = torch.finfo(p.dtype).eps
            change = (theirs - p.detach()).nan_to_num().abs()
            near = 10 * eps * p.detach().nan_to_num().abs().max() + 1e-4 * change.max()
            if not torch.allclose(ours, theirs, rtol=0.0, atol=float(near), equal_nan=True):
                raise CannotCapture("its graph does not make the update of the optimiser")
        return seconds


class WithUpdate:
    """A function of a graph's inputs that makes its step, and the update."""

    def __init__(self, run: GraphFunction, updating: Updating) -> None:
        self._run, self.updating = run, updating

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """What the graph returns."""
        update = self.updating.update
        results = self._run(*tensors, *update.inputs)
        increment_version(update.params)  # for backward passes that need what they were
        return results


def _laid_out(update: Update) -> list[Layout]:
    return [Layout.of(x) for x in update.inputs]
