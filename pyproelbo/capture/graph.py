"""One graph of tensor operations for a training step: its loss, gradients and records."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyproelbo.capture.location import location
from pyproelbo.capture.structure import CannotCapture
from pyproelbo.sequences.opaque import leaves_of


class Step(NamedTuple):
    """What a step computes."""

    loss: Tensor
    gradients: list[Tensor]
    records: list[Tensor]


class Graph(NamedTuple):
    """A graph as a function of live tensors.

    Attributes:
        module: a function of the arguments' tensors, then of ``inputs``, to the tensors of a Step.
        inputs: what the program has read besides its arguments: parameters, buffers, data.
        leaves: with respect to what the gradients are; arguments by their index.
        step: what the step that was captured has computed.
    """

    module: GraphModule
    inputs: list[Tensor]
    leaves: list[Tensor | int]
    step: Step


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of the loss, each a tensor of its own, as an optimiser may change it in place."""
    found = torch.autograd.grad(loss, leaves)
    seen: set[int] = set()
    own = []
    for gradient, leaf in zip(found, leaves, strict=True):
        is_own = gradient.stride() == leaf.stride() and gradient.data_ptr() not in seen
        own.append(gradient if is_own else torch.empty_like(leaf).copy_(gradient))
        seen.add(gradient.data_ptr())
    return own


def capture(
    step: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]], tensors: list[Tensor]
) -> Graph:
    """The graph of ``step``, a function from tensors to a loss and records, with its gradients.

    Raises:
        CannotCapture: where the graph would not be the step.
    """
    copies = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    done: list[tuple[Step, list[Tensor]]] = []

    def whole(*copies: Tensor) -> list[Tensor]:
        with _NoValues():
            loss, records = step(list(copies))
            leaves = leaves_of([loss])
            computed = Step(loss.detach(), gradients(loss, leaves), records)
        done.append((computed, leaves))
        return [computed.loss, *computed.gradients, *computed.records]

    try:
        with pyro.validation_enabled(False), _no_other_randomness():
            module = make_fx(whole)(*copies)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CannotCapture(f"{reason}{location(error)}") from error
    ((computed, leaves),) = done
    inputs = _lift(module)
    for x in inputs:
        if not x.is_leaf:
            raise CannotCapture(
                f"it reads a tensor of shape {tuple(x.shape)} that needs a gradient and has been "
                "computed outside of it: pass it as an argument"
            )
    index = {id(copy): i for i, copy in enumerate(copies)}
    return Graph(module, inputs, [index.get(id(leaf), leaf) for leaf in leaves], computed)


def _lift(module: GraphModule) -> list[Tensor]:
    """Make the tensors that the graph holds its inputs, but for constants, and return them."""
    graph, inputs, placeholders = module.graph, [], {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    lifted = [node for node in graph.nodes if node.op == "get_attr" and not _is_constant(node)]
    for node in lifted:
        tensor = getattr(module, node.target)
        if id(tensor) not in placeholders:
            with graph.inserting_before(first):
                placeholders[id(tensor)] = graph.placeholder(node.target)
            inputs.append(tensor)
        node.replace_all_uses_with(placeholders[id(tensor)])
    for node in lifted:
        graph.erase_node(node)
    for name in {node.target for node in lifted} - {node.target for node in graph.nodes}:
        delattr(module, name)
    module.recompile()
    return inputs


def _is_constant(node: Node) -> bool:
    return all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)


class _NoValues(TorchDispatchMode):
    """No number is read out of a tensor, and none makes a shape, but for those of constants."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[int, Tensor] = {}  # by storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _storages((args, kwargs))
        is_constant = torch.Tag.nondeterministic_seeded not in func.tags and (
            func is torch.ops.aten.lift_fresh.default or inputs.keys() <= self._constants.keys()
        )
        if _reads(func, args):
            if not is_constant:
                raise CannotCapture("a number in a tensor is read, or makes a shape")
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise CannotCapture("random numbers come from a generator other than torch's default")
        value = func(*args, **kwargs)
        if is_constant:
            self._constants |= _storages(value)
        elif func._schema.is_mutable:
            for storage in inputs:
                self._constants.pop(storage, None)
        return value


def _storages(values: Any) -> dict[int, Tensor]:
    tensors = (x for x in tree_leaves(values) if isinstance(x, Tensor))
    return {x.untyped_storage()._cdata: x for x in tensors}


def _reads(func: Any, args: tuple) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


@contextmanager
def _no_other_randomness() -> Iterator[None]:
    before = _other_generators()
    yield
    if _other_generators() != before:
        raise CannotCapture("it draws from the generator of Python or of NumPy: use torch's")


def _other_generators() -> tuple:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), position
