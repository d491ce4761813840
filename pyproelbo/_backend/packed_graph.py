"""A graph in a form that can be pickled as it is, and compiled to a library.

A pickled ``GraphModule`` is traced again where it is read, which runs what has no tensor among its
arguments: random numbers would become constants. What a graph holds becomes inputs, for inductor
loses it where it makes a library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from pyproelbo._backend import operations, products

OWN = (operations, products)  # which make operations of torch that graphs have


class Name(str):
    """The name of a node, among the arguments of another one, or of an operation of torch."""

    def __repr__(self) -> str:
        return f"<{self}>"


class Format(str):
    """That of a ``torch.memory_format``, for pickle may find it in another module than torch."""


class PackedNode(NamedTuple):
    """A node of a graph, with names in place of other nodes."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any

    def __repr__(self) -> str:
        """The same in all processes."""
        target, name = self.target, getattr(self.target, "__name__", None)
        named = target if name is None else f"{target.__module__}.{name}"
        return repr((self.op, self.name, named, self.args, self.kwargs))


def packed(module: GraphModule) -> tuple[list[PackedNode], list[Tensor]]:
    """The nodes of a graph of tensor operations, and what it holds, as inputs after its own."""
    inputs, held, others, tensors = [], [], [], []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs.append(PackedNode(node.op, node.name, node.name, (), {}))
        elif node.op == "get_attr":
            held.append(PackedNode("placeholder", node.name, node.name, (), {}))
            tensors.append(getattr(module, node.target).detach())
        else:
            target = Name(node.target) if isinstance(node.target, OpOverload) else node.target
            args, kwargs = (map_aggregate(x, _name) for x in (node.args, node.kwargs))
            others.append(PackedNode(node.op, node.name, target, args, kwargs))
    return [*inputs, *held, *others], tensors


def unpacked(nodes: list[PackedNode]) -> GraphModule:
    """The graph again."""
    graph, known = Graph(), {}
    for node in nodes:
        args, kwargs = (
            map_aggregate(x, lambda y: _unpacked(y, known)) for x in (node.args, node.kwargs)
        )
        target = _operation(node.target) if isinstance(node.target, Name) else node.target
        known[node.name] = graph.create_node(node.op, target, args, kwargs, node.name)
    return GraphModule({}, graph)


def _name(x: Any) -> Any:
    if isinstance(x, torch.memory_format):
        return Format(x)
    return Name(x.name) if isinstance(x, Node) else x


def _unpacked(x: Any, known: dict[str, Node]) -> Any:
    if isinstance(x, Format):
        return getattr(torch, x.removeprefix("torch."))
    return known[x] if isinstance(x, Name) else x


def _operation(name: str) -> Callable[..., Any]:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found
