"""What a graph of autograd ends in, and a gradient that goes through some of its tensors alone."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node


class Context(FunctionCtx):
    """What a custom function keeps from its forward to its backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class Walk(NamedTuple):
    """What there is in a graph.

    Since torch 2.12 a node that Python has seen takes those after it with it, when it goes, by
    recursion: of tens of thousands, as those of a loop over time, the stack overflows. They have
    to be let go one by one, which :meth:`end` does once the graph's tensors are gone.

    Attributes:
        leaves: the tensors in which the graph ends.
        nodes: each before those that follow.
    """

    leaves: list[Tensor]
    nodes: list[Node]

    @classmethod
    def of(cls, outputs: Iterable[Tensor]) -> "Walk":
        """Through the whole graph of ``outputs``."""
        nodes, seen = list[Node](), set[Node]()
        stack = [(y.grad_fn, False) for y in outputs]
        while stack:
            node, is_done = stack.pop()
            if node is None:
                continue
            if is_done:
                nodes.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(following, False) for following, _ in node.next_functions]
        nodes.reverse()
        return cls(_leaves(nodes), nodes)

    def end(self) -> None:
        """Let the nodes go."""
        self.nodes.reverse()
        while self.nodes:
            self.nodes.pop()


def some_leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Tensors in which the graph of ``outputs`` ends: of so many nodes, from the outputs on.

    So few may go by recursion (see :class:`Walk`).
    """
    nodes = dict.fromkeys(y.grad_fn for y in outputs if y.grad_fn is not None)
    queue = deque(nodes)
    while queue and len(nodes) < _FEW:
        for following, _ in queue.popleft().next_functions:
            if following is not None and following not in nodes:
                nodes[following] = None
                queue.append(following)
    return _leaves(nodes)


_FEW = 5000


def _leaves(nodes: Iterable[Node]) -> list[Tensor]:
    return [node.variable for node in nodes if hasattr(node, "variable")]  # type: ignore[attr-defined]


def holdable(value: Tensor) -> Tensor:
    """The same tensor, which :func:`through` can take for a variable by itself."""
    return _Holdable.apply(value)  # type: ignore[return-value]


def is_holdable(value: Tensor) -> bool:
    """Whether this is what :func:`holdable` has returned."""
    return hasattr(value.grad_fn, "is_held")


def through(value: Tensor, variables: Iterable[Tensor]) -> Tensor:
    """A scalar with the gradient sum_i (d value / d z_i) dz_i of a scalar ``value``.

    Each derivative is for all other variables, and all else, as they are.

    Args:
        variables: z_i, which :func:`holdable` has returned.
    """
    variables = list(variables)
    if not variables:
        return value.new_zeros(())
    nodes: list[_Held] = [z.grad_fn for z in variables]  # type: ignore[misc]
    for node in nodes:
        node.is_held = True
    gradients = torch.autograd.grad(value, variables, retain_graph=True, allow_unused=True)
    for node in nodes:
        node.is_held = False
    pairs = zip(gradients, variables, strict=True)
    parts = [(gradient * z).sum() for gradient, z in pairs if gradient is not None]
    return sum(parts[1:], start=parts[0]) if parts else value.new_zeros(())


class _Held(Context):
    is_held: bool


class _Holdable(torch.autograd.Function):
    """The identity, whose gradient goes no further while it is held."""

    @staticmethod
    def forward(ctx: _Held, value: Tensor) -> Tensor:
        ctx.is_held = False
        return value.view_as(value)

    @staticmethod
    def backward(ctx: _Held, *grads: Tensor) -> Tensor | None:
        return None if ctx.is_held else grads[0]
