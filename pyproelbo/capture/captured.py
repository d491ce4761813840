"""One captured step: its graph, what has to hold for it to be right, and its replay."""

import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyproelbo.capture.cuda import CudaGraph
from pyproelbo.capture.graph import Graph, Step, capture, gradients
from pyproelbo.capture.options import Capture, CaptureWarning, Run
from pyproelbo.capture.structure import (
    Attributes,
    CannotCapture,
    modules_in,
    refilled,
    tensors_in,
)
from pyproelbo.sequences.opaque import kept_opaque

Program = Callable[..., Any]


class Call(NamedTuple):
    """A step to be made."""

    objective: Any  # a TermsELBO
    model: Program
    guide: Program
    args: tuple
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def records(self) -> dict[str, Any]:
        """What the last step has left."""
        return self.objective.records.all()

    def loss(self, tensors: list[Tensor]) -> Tensor:
        """The loss for other tensors as arguments."""
        args, kwargs = refilled((self.args, self.kwargs), iter(tensors))
        return self.objective.loss_with_graph(self.model, self.guide, *args, **kwargs)


class Replay(NamedTuple):
    """A step that a graph has made."""

    loss: Tensor
    leaves: list[Tensor]
    gradients: list[Tensor]

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
        """The loss, whose backward pass takes the gradients as they are.

        Args:
            at_backward: called at each of them.
        """
        return _Loss.apply(self, at_backward, *self.leaves)


# whether a backward pass has retain_graph=True; where torch cannot tell, it may have
_autograd: Any = torch._C._autograd  # pyright: ignore
_keeps_graph = getattr(_autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, replay: Replay, at_backward: Callable[[], None], *leaves: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.at_backward = replay.gradients, at_backward
        return replay.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore
        gradients, scale = ctx.gradients, grads[0]
        if gradients is None:
            raise RuntimeError("the loss has been taken back before, without retain_graph=True")
        ctx.at_backward()
        if not _keeps_graph():
            ctx.gradients = None  # so that they become .grad without a copy
            if scale.device.type == "cpu" and scale.item() == 1.0:
                return None, None, *gradients
        return None, None, *torch._foreach_mul(gradients, scale)  # pyright: ignore


class Captured:
    """The step of a call, for all calls of its structure.

    To make it advances no random numbers, and no buffers.

    Raises:
        CannotCapture: where the graph would not be the step.
    """

    def __init__(self, call: Call, options: Capture) -> None:
        objective, tensors = call.objective, call.tensors
        like = next(tensors_in(call.records))
        self._values = objective.current_weights()
        self._weights = {name: like.new_tensor(value) for name, value in self._values.items()}
        self._num_checks, self._num_replays = options.check, 0

        def step(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with objective.weighted_by(self._weights):
                return call.loss(tensors), list(tensors_in(call.records))

        before = Attributes([*modules_in(call.model), *modules_in(call.guide), objective])
        with _undone(before.buffers()), _Seen() as seen, kept_opaque() as self._kept:
            try:
                graph = capture(step, tensors)
            finally:
                changed = before.changed()
                for attribute in changed:
                    attribute.restore()
        for attribute in changed:
            was = attribute.value
            if not isinstance(was, Tensor) or any(was is x for x in graph.inputs):
                raise CannotCapture(f"{attribute} changes within the step: make it a buffer")
        self.attributes = Attributes([*before.modules, *seen.modules], but_for=changed)
        self._records = call.records
        self._inputs, self._leaves = graph.inputs, graph.leaves
        owned = {id(p) for module in self.attributes.modules for p in module._parameters.values()}
        self._parameters = [(n, x, id(x) in owned) for n, x in seen.parameters.items()]
        self._leaves_in(tensors)
        self._run = self._compiled(graph, tensors, options)

    def holds(self) -> bool:
        """Whether modules and parameters are those that were captured."""
        known = pyro.get_param_store()._params
        for name, leaf, is_owned in self._parameters:
            now = known.get(name)
            if now is not leaf and not (now is None and is_owned and not am_i_wrapped()):
                return False
        return self.attributes.are_same()

    def replay(self, call: Call) -> Replay:
        """Make the step.

        Raises:
            CannotCapture: if an eager step at the same random numbers has other results.
        """
        tensors = call.tensors
        # the first one follows its own capture, and would see no change
        is_checked = 0 < self._num_replays <= self._num_checks
        expected = self._eager(call, tensors) if is_checked else None
        for name, value in call.objective.current_weights().items():
            if value != self._values[name]:
                self._weights[name].fill_(value)
                self._values[name] = value
        if am_i_wrapped():
            for name, leaf, _ in self._parameters:
                _show(leaf, name=name)
        step = self._made(self._run, tensors)
        if expected is not None:
            _check(step, expected)
        self._num_replays += 1
        records = step.records  # without the gradients, which are freed with .grad
        call.objective.records.later(lambda: refilled(self._records, iter(records)))
        return Replay(step.loss, self._leaves_in(tensors), step.gradients)

    def _made(self, run: Run, tensors: list[Tensor]) -> Step:
        with torch.no_grad():
            loss, *rest = run(*tensors, *self._inputs)
        num = len(self._leaves)
        return Step(loss, rest[:num], rest[num:])

    def _eager(self, call: Call, tensors: list[Tensor]) -> Step:
        """The step by the program itself, undone."""
        with _undone(self.attributes.buffers()), torch.enable_grad():
            loss = call.loss(tensors)
            return Step(loss.detach(), gradients(loss, self._leaves_in(tensors)), [])

    def _leaves_in(self, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [tensors[leaf] if isinstance(leaf, int) else leaf for leaf in self._leaves]
        if any(x._backward_hooks or x._post_accumulate_grad_hooks for x in leaves):
            raise CannotCapture("a parameter has a hook, as of register_hook")
        return leaves

    def _compiled(self, graph: Graph, tensors: list[Tensor], options: Capture) -> Run:
        """The graph compiled, if that can be done and gives what the graph gives."""
        inputs = [x.detach() for x in (*tensors, *graph.inputs)]
        try:
            with _undone([]):
                run = options.compiled(graph.module, inputs)
            if options.cuda_graph and all(x.is_cuda for x in inputs):
                with _undone(self.attributes.buffers()), torch.no_grad():
                    run = CudaGraph(run, inputs[: len(tensors)], self._inputs)
            with _undone(self.attributes.buffers()):
                _check(self._made(run, tensors), graph.step)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"a captured step runs uncompiled, for {options.backend!r} failed on it: {reason}",
                CaptureWarning,
                stacklevel=2,
            )
            return graph.module
        return run


@effectful(type="param")
def _show(leaf: Tensor) -> Tensor:
    """What ``pyro.param`` does for SVI, which trains the leaves that it sees."""
    leaf.unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
    return leaf


class _Seen(Messenger):
    """The parameters and modules that a program has used."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Tensor] = {}
        self.modules: list[nn.Module] = []

    def __enter__(self) -> Any:
        self._hook = register_module_forward_pre_hook(lambda m, _: self.modules.append(m))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self._hook.remove()
        super().__exit__(*args)

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters[msg["name"]] = msg["value"].unconstrained()


@contextmanager
def _undone(buffers: list[Tensor]) -> Iterator[None]:
    """Random numbers and buffers are afterwards what they were before."""
    copies = [x.clone() for x in buffers]
    states = random.getstate(), np.random.get_state()
    num_devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    try:
        with torch.random.fork_rng(devices=range(num_devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        with torch.no_grad():
            for x, copy in zip(buffers, copies, strict=True):
                x.copy_(copy)


def _check(step: Step, expected: Step) -> None:
    """
    Raises:
        CannotCapture: if the two are not equal but for rounding.
    """
    gradients = torch.stack([x.norm().to(expected.loss) for x in expected.gradients])
    total = gradients.nan_to_num().norm()
    for ours, theirs in zip(
        (step.loss, *step.gradients), (expected.loss, *expected.gradients), strict=True
    ):
        near = 1e-9 if theirs.dtype == torch.float64 else 1e-3
        least = 100 * torch.finfo(theirs.dtype).eps * total  # of a gradient that should be 0
        size = near * theirs.nan_to_num().norm() + least
        if not torch.allclose(ours, theirs, rtol=near, atol=float(size), equal_nan=True):
            raise CannotCapture(
                "its graph does not compute what the program does: does the program change by "
                "itself from step to step, by a counter or a cache, say?"
            )
