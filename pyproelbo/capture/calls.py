"""A step to make, and one made by a graph."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyproelbo._backend.autograd import Context
from pyproelbo._backend.torch_private import keeps_graph, scaled
from pyproelbo._backend.updates import Update
from pyproelbo._terms.nested import refilled, tensors_in, with_numbers
from pyproelbo._terms.traces import Program
from pyproelbo.capture.records import Records


class Parts(NamedTuple):
    """What a graph needs from an objective, besides its attributes.

    Attributes:
        loss: from the objective, model, guide and their arguments to the loss, with a graph.
        records: the records of a step.
        schedules: its weights by name.
        current_weights: the values of its weights at the current step.
        weighted_by: a context in which tensors replace them.
    """

    loss: Callable[..., Tensor]
    records: Records
    schedules: Mapping[str, object]
    current_weights: Callable[[], dict[str, float]]
    weighted_by: Callable[[dict[str, Tensor]], AbstractContextManager[object]]


class Call(NamedTuple):
    """A step to make.

    Attributes:
        objective: the one that makes the step.
        update: what follows the step, which a graph may make by itself.
        numbers: for each of ``tensors`` the Python float that it represents, or None.
    """

    objective: nn.Module
    model: Program
    guide: Program
    args: tuple
    kwargs: dict[str, object]
    parts: Parts
    update: Update | None = None
    numbers: tuple[float | None, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in the arguments of model and guide, in their order."""
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def records(self) -> dict[str, object]:
        """The records of the last step."""
        return self.parts.records.all()

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the terms."""
        return next(tensors_in(self.records), torch.empty(()))

    def with_tensors(self) -> "Call":
        """The same, with tensors for the Python floats in its arguments."""
        like, numbers = self.like, {}

        def number(value: float) -> Tensor:
            tensor = like.new_full((), value)
            numbers[id(tensor)] = value
            return tensor

        args, kwargs = with_numbers((self.args, self.kwargs), number)
        call = self._replace(args=args, kwargs=kwargs)
        return call._replace(numbers=tuple(numbers.get(id(x)) for x in call.tensors))

    def loss(self, tensors: Sequence[Tensor | float]) -> Tensor:
        """The loss for other tensors as arguments."""
        args, kwargs = refilled((self.args, self.kwargs), iter(tensors))
        return self.parts.loss(self.objective, self.model, self.guide, *args, **kwargs)


class Replay(NamedTuple):
    """A step made by a graph.

    Attributes:
        parameters: those that the programs use, by their names.
        has_updated: whether the update has been made as well, but where the loss is not finite and
            is going to be read.
    """

    loss: Tensor
    leaves: list[Tensor]
    gradients: list[Tensor]
    parameters: Mapping[str, Tensor]
    has_updated: bool = False

    def backward(self) -> None:
        """Add the gradients to ``.grad``, as the backward pass of the loss does."""
        for leaf, gradient in zip(self.leaves, self.gradients, strict=True):
            if not leaf.is_leaf:
                leaf.backward(gradient, retain_graph=True)
            elif leaf.grad is None:
                leaf.grad = gradient
            else:
                leaf.grad.add_(gradient)

    def differentiable(self, at_backward: Callable[[], None]) -> Tensor:
        """The loss, whose backward pass uses the computed gradients.

        Args:
            at_backward: called at each of them.
        """
        return _Loss.apply(self, at_backward, *self.leaves)


class _Step(Context):
    gradients: list[Tensor] | None
    at_backward: Callable[[], None]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Step, replay: Replay, at_backward: Callable[[], None], *leaves: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.at_backward = replay.gradients, at_backward
        return replay.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Step, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        gradients, scale = ctx.gradients, grads[0]
        if gradients is None:
            raise RuntimeError("the loss was back-propagated before, without retain_graph=True")
        ctx.at_backward()
        if not keeps_graph():
            ctx.gradients = None  # so that they become .grad without a copy
            if scale.device.type == "cpu" and scale.item() == 1.0:
                return None, None, *gradients
        return None, None, *scaled(gradients, scale)
