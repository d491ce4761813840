"""What a graph of autograd ends in, and a gradient that goes through some of its tensors alone."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """What a custom function keeps from its forward to its backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def leaves_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in which the graph of ``outputs`` ends, in the order in which they are found."""
    leaves, seen = [], set()
    queue = [y.grad_fn for y in outputs]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)  # type: ignore[attr-defined]
        queue += [following for following, _ in node.next_functions]
    return leaves


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
