"""One graph of tensor operations for a training step: its loss, gradients and records."""

import gc
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from types import FrameType
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyproelbo._backend import tracing
from pyproelbo._backend.autograd import Walk
from pyproelbo._backend.torch_private import memory_of
from pyproelbo.capture.location import location
from pyproelbo.capture.structure import CannotCapture
from pyproelbo.capture.surroundings import without_autocast

_READS = "a number in a tensor is read, or makes a shape"
_UNSEEN = (Tensor.numpy, Tensor.__array__, Tensor.tolist)
_MANY = 100  # operations, beyond which one that reads numbers is refused
_MOST = 20_000  # operations of a step: capturing takes about a twentieth of a millisecond each
_SOME = 20  # operations, after which generators are looked at again
_ARITHMETIC = {
    *("add", "sub", "mul", "div", "pow", "neg", "abs", "exp", "log", "sqrt", "reciprocal"),
    *("__rsub__", "__rdiv__", "__rpow__", "remainder"),
}
_LIFT = torch.ops.aten.lift_fresh.default
_BY_INDEX = (torch.ops.aten.index.Tensor,)


class Computed(NamedTuple):
    """The results of a step."""

    loss: Tensor
    gradients: list[Tensor]
    records: list[Tensor]
    has_updated: bool = False


class Graph(NamedTuple):
    """A graph as a function of live tensors.

    Attributes:
        module: a function of the arguments' tensors, then of ``inputs``, to what is
            computed.
        inputs: what the program has read besides its arguments: parameters, buffers, data.
        leaves: the tensors with respect to which gradients are taken; arguments by their index.
        step: the results of the captured step.
    """

    module: GraphModule
    inputs: list[Tensor]
    leaves: list[Tensor | int]
    step: Computed


def gradients(loss: Tensor, leaves: list[Tensor], keep_graph: bool = True) -> list[Tensor]:
    """The gradients of the loss, each a separate tensor that an optimiser may change in place.

    Args:
        keep_graph: whether the graph of a tensor that the program closes over may be
            back-propagated again.
    """
    with without_autocast():
        found = torch.autograd.grad(loss, leaves, retain_graph=keep_graph) if leaves else ()
    seen: set[int] = set()
    own = []
    for gradient, leaf in zip(found, leaves, strict=True):
        is_own = gradient.stride() == leaf.stride() and gradient.data_ptr() not in seen
        own.append(gradient if is_own else torch.empty_like(leaf).copy_(gradient))
        seen.add(gradient.data_ptr())
    return own


def capture(
    step: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]],
    tensors: list[Tensor],
    numbers: Sequence[int],
    lines: Mapping[str, str],
) -> Graph:
    """The graph of ``step``, a function from tensors to a loss and records, with its gradients.

    Args:
        numbers: by index, which of the tensors stand for numbers.
        lines: the line of each sample site reached so far.

    Raises:
        CannotCapture: where the graph would differ from the step.
    """
    copies = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    walks: list[Walk] = []

    try:
        with _uncollected():
            with (
                pyro.validation_enabled(False),
                tracing.recording(copies) as recorder,
                _Step(recorder) as values,
                _Functions(values, [copies[i] for i in numbers]),
            ):
                loss, records = step(list(copies))
                walks.append(walk := Walk.of([loss]))
                leaves = [leaf for leaf in walk.leaves if _is_given(leaf, copies, recorder)]
                computed = Computed(loss.detach(), gradients(loss, leaves), records)
                values.refuse_other_randomness()
            module = recorder.module([computed.loss, *computed.gradients, *records])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        where = location(error, lines)
        if walks:
            traceback.clear_frames(error.__traceback__)  # they hold the loss
        raise CannotCapture(f"{reason}{where}") from error
    finally:
        for walk in walks:
            walk.end()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    if not all(placeholders[i].users for i in numbers):
        raise CannotCapture("Python inspects a number among its arguments, or nothing uses it")
    index = {id(copy): i for i, copy in enumerate(copies)}
    return Graph(module, recorder.inputs, [index.get(id(leaf), leaf) for leaf in leaves], computed)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without passes of the garbage collector, which take a quarter of the time of many nodes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_given(leaf: Tensor, arguments: Sequence[Tensor], recorder: tracing.Recorder) -> bool:
    """Whether a step's loss trains a leaf: not one that the step has made itself."""
    return not recorder.has_made(leaf) or any(leaf is x for x in arguments)


class _Step(tracing.DispatchMode):
    """Records operations. Refuses to read numbers from tensors, or make shapes of them.

    Except for constants. Also refuses random numbers from generators other than torch's.
    """

    def __init__(self, recorder: tracing.Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._constants: dict[int, Tensor] = {}  # by storage
        self._generators = _other_generators()
        self._num = 0

    def __torch_dispatch__(
        self,
        func: tracing.Operation,
        types: Sequence[type[Tensor]],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        if any(tracing.dispatch_of(x) is not tracing.dispatch_of(Tensor) for x in types):
            return NotImplemented  # what operations do with these comes first
        kwargs = kwargs or {}
        if self._num % _SOME == 0 or func is _LIFT or any(isinstance(x, float) for x in args):
            self.refuse_other_randomness()
        self._num += 1
        if self._num > _MOST:
            raise CannotCapture(
                f"it has more than {_MOST:,} operations: make a loop over time one operation, as "
                "MarkovChain and opaque of pyproelbo.sequences do if the loop closes over "
                "parameters and arguments only"
            )
        is_constant = torch.Tag.nondeterministic_seeded not in func.tags and (
            func is _LIFT or self.are_constants((args, kwargs))
        )
        if func in _BY_INDEX and self.are_constants(masks := _masks(args)):
            args = (args[0], _indices(args[1], masks), *args[2:])
        if _reads(func, args, kwargs):
            if not (is_constant or _is_validation()):
                raise CannotCapture(_READS)
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise CannotCapture("random numbers come from a generator other than torch's default")
        value = self._recorder.run(func, args, kwargs)
        if is_constant:
            self._constants |= _storages(value)
        elif tracing.is_mutable(func):
            for storage in _storages(tracing.written(func, args, kwargs)):
                self._constants.pop(storage, None)
        return value

    def refuse_other_randomness(self) -> None:
        """
        Raises:
            CannotCapture: if Python or NumPy has drawn a number; close to where it has.
        """
        if _other_generators() != self._generators:
            raise CannotCapture("it draws from the generator of Python or of NumPy: use torch's")

    def are_constants(self, values: object) -> bool:
        """Whether the tensors in there are the same ones at each step, with the same numbers."""
        return _storages(values).keys() <= self._constants.keys()


class _Functions(TorchFunctionMode):
    """Avoids reading numbers in functions that are not operations, where possible.

    Args:
        numbers: tensors that represent numbers. As equal numbers are equal wherever computed, the
            same arithmetic on these gives one and the same tensor.
    """

    def __init__(self, values: _Step, numbers: list[Tensor]) -> None:
        super().__init__()
        self._values = values
        self._numbers = {id(x): x for x in numbers}
        self._results: dict[tuple, Tensor] = {}

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if tracing.recorder() is None:
            return func(*args, **kwargs)
        if func is functional.one_hot:
            return _one_hot(*args, **kwargs)
        if func in (torch.cumprod, Tensor.cumprod) and args and args[0].requires_grad:
            return _cumprod(func, *args, **kwargs)
        is_read = func in _UNSEEN and not self._values.are_constants(args)
        if is_read and not _is_validation():
            raise CannotCapture(_READS)
        # x *= 2 makes another number of x, and leaves the one that others have
        name = getattr(func, "__name__", "")
        name = name if name.endswith("__") else name.removesuffix("_")
        if name in _ARITHMETIC and not kwargs and self._are_numbers(args):
            return self._number(name, args)
        return func(*args, **kwargs)

    def _are_numbers(self, args: tuple) -> bool:
        first, *rest = args
        is_number = (id(x) in self._numbers or isinstance(x, int | float) for x in rest)
        return id(first) in self._numbers and all(is_number)

    def _number(self, name: str, args: tuple) -> Tensor:
        """The result of arithmetic on numbers only, computed once."""
        key = name, *(id(x) if isinstance(x, Tensor) else (type(x), x) for x in args)
        if key not in self._results:
            result = self._results[key] = getattr(Tensor, name)(*args)
            self._numbers[id(result)] = result
        return self._results[key]


def _one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        return functional.one_hot(x, num_classes)
    is_class = (x >= 0) & (x < num_classes)
    message = f"one_hot: a class is out of bounds, of {num_classes}"
    tracing.assert_at_run(is_class.all(), message)
    return x.new_zeros(*x.shape, num_classes).scatter(-1, x.unsqueeze(-1), 1)


def _cumprod(function: Callable[..., Tensor], x: Tensor, dim: int, **kwargs: object) -> Tensor:
    if kwargs or not 0 < x.shape[dim] <= _MANY:
        return function(x, dim, **kwargs)
    # whose backward pass looks for zeros; a product after the other does not
    return torch.stack(list(accumulate(x.unbind(dim), mul)), dim)


def _storages(values: object) -> dict[int, Tensor]:
    return {memory_of(x): x for x in tracing.tensors_in(values)}


def _masks(args: tuple) -> list[Tensor]:
    return [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]


def _indices(by: Sequence[Tensor | None], masks: list[Tensor]) -> list[Tensor | None]:
    """The indices equivalent to masks."""
    indices: list[Tensor | None] = []
    for x in by:
        if any(x is mask for mask in masks):
            indices += [i.clone() for i in x.nonzero().unbind(-1)]  # type: ignore[union-attr]
        else:
            indices.append(x)
    return indices


def _reads(func: tracing.Operation, args: tuple, kwargs: dict[str, object]) -> bool:
    if func in _BY_INDEX:
        return bool(_masks(args))
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _is_validation() -> bool:
    """Whether a distribution validates its arguments, which an eager step has done before."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in tracing.VALIDATIONS:
            return True
        frame = frame.f_back
    return False


def _other_generators() -> tuple:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), position
