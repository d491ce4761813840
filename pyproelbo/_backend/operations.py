"""The two operations that a captured graph has for an opaque function."""

from collections.abc import Callable, Sequence
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pyproelbo._backend import rng, tracing
from pyproelbo._backend.autograd import Context, leaves_of

Function = Callable[..., Sequence[Tensor]]


def as_operation(
    function: Function, tensors: Sequence[Tensor], kept: list[object]
) -> Sequence[Tensor]:
    """``function(*tensors)`` as one operation of the graph that is being captured.

    Args:
        kept: is added what the graph needs for as long as it is used.
    """
    mode = tracing.mode()
    if mode is None:
        return function(*tensors)
    with tracing.untraced(), rng.put_aside(), torch.enable_grad():
        copies = _copies(tensors)
        with _Inputs(mode.tracer) as inputs:
            operation = _Operation(function, copies)
    if inputs.are_computed:
        return function(*tensors)
    kept.append(operation)
    _operations[key := next(_keys)] = operation
    return _Call.apply(key, *tensors, *operation.parameters)


class _Operation:
    """A function of tensors, and its last run until that is taken back."""

    def __init__(self, function: Function, copies: Sequence[Tensor]) -> None:
        self._function, self._num = function, len(copies)
        outputs = function(*copies)
        self.parameters = [x for x in leaves_of(outputs) if all(x is not copy for copy in copies)]
        self.outputs = [_layout(y.detach().clone()) for y in outputs]
        self.gradients = [_layout(torch.zeros_like(x)) for x in (*copies, *self.parameters)]
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


class _Inputs(tracing.TorchDispatchMode):
    """Whether operations read anything that the step being captured has computed."""

    def __init__(self, tracer: tracing.Tracer) -> None:
        super().__init__()
        self._tracer, self.are_computed = tracer, False

    def __torch_dispatch__(
        self,
        func: tracing.Operation,
        types: object,
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensors = tracing.tensors_in((args, kwargs))
        self.are_computed |= any(tracing.has_proxy(x, self._tracer) for x in tensors)
        return func(*args, **kwargs)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]


def _layout(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device


_keys = count()
_operations: WeakValueDictionary[int, _Operation] = WeakValueDictionary()

_library = torch.library.Library("pyproelbo", "DEF")
_tags = (torch.Tag.nondeterministic_seeded,)
for _schema in (
    "opaque(int key, Tensor[] tensors) -> Tensor[]",
    "opaque_backward(int key, Tensor[] after, Tensor[] gradients) -> Tensor[]",
):
    _library.define(_schema, tags=_tags)


def _empty(layouts: list[tuple]) -> list[Tensor]:
    return [
        torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for shape, stride, dtype, device in layouts
    ]


def _run(key: int, tensors: list[Tensor]) -> list[Tensor]:
    return _operations[key].run(tensors)


def _back(key: int, after: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return _operations[key].back(gradients)


_library.impl("opaque", _run, "CompositeExplicitAutograd")
_library.impl("opaque_backward", _back, "CompositeExplicitAutograd")


@torch.library.register_fake("pyproelbo::opaque", lib=_library)
def _like_outputs(key: int, tensors: list[Tensor]) -> list[Tensor]:
    return _empty(_operations[key].outputs)


@torch.library.register_fake("pyproelbo::opaque_backward", lib=_library)
def _like_gradients(key: int, after: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return _empty(_operations[key].gradients)
