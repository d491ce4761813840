"""The recording of what a function does with tensors, as a graph of their operations."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributions import Distribution
from torch.fx import Graph, GraphModule, Node, _symbolic_trace
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyproelbo._backend.layouts import Layout

VALIDATIONS = {f.__code__ for f in (Distribution.__init__, Distribution._validate_sample)}

Operation = OpOverload
assert_at_run: Operation = torch.ops.aten._assert_async.msg

_PURE = ("aten", "prims", "prim")  # where what has an effect says so
_aten = torch.ops.aten
_recorder: "ContextVar[Recorder | None]" = ContextVar("recorder", default=None)


class DispatchMode(TorchDispatchMode):
    """A mode whose own Python torch's compiler never looks at, and so need not be imported for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recorder:
    """Runs operations, and writes down each as a node of a graph.

    A tensor that neither is an argument nor has been computed here is an input of the graph, which
    therefore reads it anew each time; but those made of numbers, as by ``torch.tensor(2.0)``, are
    constants of the graph. Nodes hold the layout of their tensors: ``node.meta["layout"]``.

    Args:
        arguments: the tensors that the function takes, placeholders of the graph.

    Attributes:
        inputs: placeholders after the arguments.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        self._graph, self.inputs = Graph(), list[Tensor]()
        self._nodes = WeakTensorKeyDictionary()
        self._held: dict[int, Node] = {}  # by id, of inputs
        self._constants: dict[str, Tensor] = {}
        self._last: Node | None = None  # of the placeholders
        self.is_paused = False
        for i, x in enumerate(arguments):
            self._nodes[x] = self._placeholder(f"argument_{i}", x)

    def has_made(self, x: Tensor) -> bool:
        """Whether a tensor is an argument, or has been computed."""
        return x in self._nodes

    def run(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, as a dispatch mode of which this is the last act."""
        if self.is_paused:
            return operation(*args, **kwargs)
        if operation is _aten.lift_fresh.default:
            return self._constant(args[0])
        value = operation(*args, **kwargs)
        nodes = self._noded(args)  # which may make inputs, that come before it
        named = {name: self._noded(x) for name, x in kwargs.items()}
        node = self._graph.create_node("call_function", operation)
        node.args = nodes  # not there, where all that is given is looked through
        if named:
            node.kwargs = named
        if isinstance(value, Tensor):
            self._computed(value, node)
        elif isinstance(value, tuple | list):
            for i, x in enumerate(value):
                if isinstance(x, Tensor):
                    item = self._graph.create_node("call_function", operator.getitem, (node, i))
                    self._computed(x, item)
        return value

    def module(self, outputs: Iterable[Tensor]) -> GraphModule:
        """The graph as a function of the arguments, then of the inputs, to the outputs."""
        self._graph.output([self._node(x) for x in outputs])
        self._drop_detached()
        for node in reversed(self._graph.nodes):
            if not node.users and not _has_effect(node):
                self._graph.erase_node(node)
        used = {node.target for node in self._graph.nodes if node.op == "get_attr"}
        constants = {name: x for name, x in self._constants.items() if name in used}
        return _LazyGraphModule(constants, self._graph, "Step")  # Python once it is run

    def _drop_detached(self) -> None:
        """Take tensors in place of detached ones, which without autograd are the same memory.

        Not where an operation changes the shape of one of the two in place, nor what is returned.
        """
        reshaped = {node.args[0] for node in self._graph.nodes if _is_reshaping(node.target)}
        for node in self._graph.nodes:
            if node.target is not _aten.detach.default:
                continue
            is_returned = any(user.op == "output" for user in node.users)
            if not (is_returned or {node, *node.args} & reshaped):
                node.replace_all_uses_with(node.args[0])

    def _constant(self, x: Tensor) -> Tensor:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = x
        node = self._graph.create_node("get_attr", name)
        # each run has its own, which the program may write into
        copy = _aten.lift_fresh_copy.default
        value = copy(x)
        self._computed(value, self._graph.create_node("call_function", copy, (node,)))
        return value

    def _computed(self, x: Tensor, node: Node) -> None:
        if x.layout is torch.strided:
            node.meta["layout"] = Layout.of(x)
        self._nodes[x] = node

    def _placeholder(self, name: str, x: Tensor) -> Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(name)
        if x.layout is torch.strided:
            self._last.meta["layout"] = Layout.of(x)
        return self._last

    def _noded(self, value: Any) -> Any:
        """An argument of an operation with nodes in place of tensors."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, list | tuple):
            return type(value)([self._noded(x) for x in value])
        return value

    def _node(self, x: Tensor) -> Node:
        node = self._nodes.get(x) or self._held.get(id(x))
        if node is None:
            node = self._held[id(x)] = self._placeholder(f"input_{len(self.inputs)}", x)
            self.inputs.append(x)
        return node


def _is_reshaping(operation: object) -> bool:
    return isinstance(operation, OpOverload) and torch.Tag.inplace_view in operation.tags


def _has_effect(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    operation = node.target
    return isinstance(operation, OpOverload) and (
        operation.namespace not in _PURE
        or is_mutable(operation)
        or torch.Tag.nondeterministic_seeded in operation.tags
        or operation is assert_at_run
    )


@contextmanager
def recording(arguments: Sequence[Tensor]) -> Iterator[Recorder]:
    """While this lasts a step of these arguments is recorded.

    As it lasts torch takes itself to trace symbolically: compiled functions, whose operations
    nobody sees, then refuse to run.
    """
    is_cached = torch.is_autocast_cache_enabled()
    token = _recorder.set(recorder := Recorder(arguments))
    torch.set_autocast_cache_enabled(False)
    try:
        with _as_if_traced():
            yield recorder
    finally:
        torch.set_autocast_cache_enabled(is_cached)
        _recorder.reset(token)


@contextmanager
def _as_if_traced() -> Iterator[None]:
    context = getattr(_symbolic_trace, "_is_fx_tracing_context", None)
    if context is not None:  # from torch 2.14 on
        with context(True):
            yield
        return
    before = _symbolic_trace._is_fx_tracing_flag
    _symbolic_trace._is_fx_tracing_flag = True
    try:
        yield
    finally:
        _symbolic_trace._is_fx_tracing_flag = before


def recorder() -> Recorder | None:
    """What records the operations that this thread makes."""
    found = _recorder.get()
    return None if found is None or found.is_paused else found


@contextmanager
def untraced() -> Iterator[None]:
    """While this lasts operations run without being recorded."""
    found = recorder()
    if found is None:
        yield
        return
    found.is_paused = True
    try:
        yield
    finally:
        found.is_paused = False


def tensors_in(values: object) -> list[Tensor]:
    """The tensors in the arguments or in the results of an operation."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [x for value in values for x in tensors_in(value)]


def dispatch_of(kind: type[Tensor]) -> object:
    """What operations do with tensors of a class: that of Tensor, if nothing special."""
    return kind.__torch_dispatch__  # pyright: ignore


def is_mutable(operation: Operation) -> bool:
    """Whether an operation writes into arguments."""
    return operation._schema.is_mutable


def written(operation: Operation, args: tuple, kwargs: dict[str, object]) -> list[object]:
    """The arguments that an operation writes into."""
    arguments = operation._schema.arguments
    given = {**dict(zip((x.name for x in arguments), args, strict=False)), **kwargs}
    names = (x.name for x in arguments if x.alias_info and x.alias_info.is_write)
    return [given[name] for name in names if name in given]


@contextmanager
def with_autograd() -> Iterator[None]:
    """With gradients, also inside of an operation of torch's dispatcher."""
    functionality = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(functionality, False), torch.enable_grad():
        yield
