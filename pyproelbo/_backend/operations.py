"""The two operations that a captured graph has for an opaque function."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._backend import rng, tracing
from pyproelbo._backend.autograd import Context, Walk
from pyproelbo._backend.layouts import Layout
from pyproelbo._backend.of_graph import kept_by_graph

Function = Callable[..., Sequence[Tensor]]


def as_operation(
    function: Function, tensors: Sequence[Tensor], kept: list[object]
) -> Sequence[Tensor]:
    """``function(*tensors)`` as one operation of the graph that is being captured.

    Args:
        kept: is added what the graph needs for as long as it is used.
    """
    recorder = tracing.recorder()
    if recorder is None:
        return function(*tensors)
    with tracing.untraced(), rng.put_aside(), torch.enable_grad():
        copies = _copies(tensors)
        with _Inputs(recorder) as inputs:
            operation = _Operation(function, copies)
    if inputs.are_computed:
        return function(*tensors)
    kept.append(operation)
    return _Call.apply(len(kept) - 1, *tensors, *operation.parameters)


class Layouts(NamedTuple):
    """Those of what the two operations of an opaque function return, all that a compiler asks."""

    outputs: list[Layout]
    gradients: list[Layout]


def layouts(kept: Sequence[object]) -> list[Layouts]:
    """Those of the operations that a capture has left."""
    return [each.layouts for each in kept if isinstance(each, _Operation)]


class _Operation:
    """A function of tensors, and its last run until that is taken back."""

    def __init__(self, function: Function, copies: Sequence[Tensor]) -> None:
        self._function, self._num = function, len(copies)
        outputs = function(*copies)
        walk = Walk.of(outputs)
        self.parameters = [x for x in walk.leaves if all(x is not copy for copy in copies)]
        self.layouts = Layouts(
            [Layout.of(y.detach().clone()) for y in outputs],
            [Layout.of(torch.zeros_like(x)) for x in (*copies, *self.parameters)],
        )
        del outputs
        walk.end()
        self._run: tuple[list[Tensor], Sequence[Tensor]] | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with tracing.with_autograd():
            # a compiled graph may write over its tensors before they are taken back
            copies = _copies([x.clone() for x in tensors[: self._num]])
            outputs = self._function(*copies)
        self._run = copies, outputs
        return [y.detach().clone() for y in outputs]

    def back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        assert self._run is not None
        (copies, outputs), self._run = self._run, None
        pairs = [p for p in zip(outputs, gradients, strict=True) if p[0].requires_grad]
        inputs = [*copies, *self.parameters]
        wanted = [x for x in inputs if x.requires_grad]
        with tracing.with_autograd():
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [gradient for _, gradient in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        left = iter(found)
        each = [next(left) if x.requires_grad else None for x in inputs]
        return [
            torch.zeros_like(x) if gradient is None else torch.empty_like(x).copy_(gradient)
            for x, gradient in zip(inputs, each, strict=True)
        ]


class _Called(Context):
    key: int


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Called, key: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = torch.ops.pyproelbo.opaque(key, list(tensors))
        ctx.key = key
        ctx.save_for_backward(*outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: _Called, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outputs = list(ctx.saved_tensors)  # so that it comes after the forward pass
        return None, *torch.ops.pyproelbo.opaque_backward(ctx.key, outputs, list(grads))


class _Inputs(tracing.DispatchMode):
    """Whether operations read anything that the step being captured has computed."""

    def __init__(self, recorder: tracing.Recorder) -> None:
        super().__init__()
        self._recorder, self.are_computed = recorder, False

    def __torch_dispatch__(
        self,
        func: tracing.Operation,
        types: object,
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensors = tracing.tensors_in((args, kwargs))
        self.are_computed |= any(self._recorder.has_made(x) for x in tensors)
        return func(*args, **kwargs)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]


_library = torch.library.Library("pyproelbo", "DEF")
_tags = (torch.Tag.nondeterministic_seeded,)
for _schema in (
    "opaque(int key, Tensor[] tensors) -> Tensor[]",
    "opaque_backward(int key, Tensor[] after, Tensor[] gradients) -> Tensor[]",
):
    _library.define(_schema, tags=_tags)


def _run(key: int, tensors: list[Tensor]) -> list[Tensor]:
    return _operation(key).run(tensors)


def _back(key: int, after: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return _operation(key).back(gradients)


def _operation(key: int) -> _Operation:
    operation = kept_by_graph()[key]
    assert isinstance(operation, _Operation)
    return operation


def _layouts(key: int) -> Layouts:
    operation = kept_by_graph()[key]  # its layouts alone, where another process compiles
    return operation if isinstance(operation, Layouts) else _operation(key).layouts


_library.impl("opaque", _run, "CompositeExplicitAutograd")
_library.impl("opaque_backward", _back, "CompositeExplicitAutograd")


@torch.library.register_fake("pyproelbo::opaque", lib=_library)
def _like_outputs(key: int, tensors: list[Tensor]) -> list[Tensor]:
    return [each.empty() for each in _layouts(key).outputs]


@torch.library.register_fake("pyproelbo::opaque_backward", lib=_library)
def _like_gradients(key: int, after: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [each.empty() for each in _layouts(key).gradients]
