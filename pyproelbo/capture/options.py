"""Options for capturing a training step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.fx import GraphModule

from pyproelbo._messages.warn import warn

GraphFunction = Callable[..., list[Tensor]]
Compiling = Callable[[], GraphFunction | None]  # to nothing, as long as there is nothing
Backend = Literal["inductor", "eager"] | Callable[[GraphModule, list[Tensor]], GraphFunction]


class CaptureWarning(UserWarning):
    """Steps that should have been captured run eagerly; the message gives the reason."""


@dataclass(frozen=True)
class Capture:
    r"""Options of a captured step: ``compile=Capture(...)``; ``compile=True`` uses the defaults.

    Model, guide and objective run once, recorded, with the gradients of the loss, and
    leave one graph of tensor operations. From then on the graph runs in place of the program: no
    effect handlers, no autograd, no Python of the program. See :mod:`pyproelbo.capture` for what
    can be captured.

    Args:
        backend: "inductor" compiles the graph; "eager" runs its operations one by one, which saves
            the time to compile, and all but the arithmetic of a step; or any function from a graph
            and example inputs to a function, as those of ``torch.compile``.
        options: options of inductor, as in ``torch.compile(options=...)``.
        background: whether inductor works in a separate process of the lowest priority, while the
            graph runs uncompiled. Otherwise the first captured step waits for it, and the rounding
            of all steps is the same in each run of the training.
        cuda_graph: whether, on a GPU, the compiled step is recorded as a CUDA graph.
        lazy_loss: ``loss_and_grads``, and so ``SVI.step``, return a captured step's loss as a
            tensor on its device, which ``float(loss)`` reads: no step waits for the GPU. There are
            then no warnings of losses that are not finite.
        check: how many steps of a new graph are compared with eager ones, at the cost of an eager
            step each. If they differ, a warning is given, and steps run eagerly from then on.
        max_graphs: the number of structures (shapes of arguments, modes and layers of modules)
            whose graphs are kept; steps of further ones run eagerly.
        max_nodes: graphs of more operations are not compiled, which takes seconds for each
            thousand, but run as with "eager".

    Raises:
        ValueError: for an invalid backend, and for numbers that are too small.
    """

    backend: Backend = "inductor"
    options: Mapping[str, object] = field(default_factory=dict)
    background: bool = True
    cuda_graph: bool = True
    lazy_loss: bool = False
    check: int = 1
    max_graphs: int = 8
    max_nodes: int = 4000

    def __post_init__(self) -> None:
        if not (callable(self.backend) or self.backend in ("inductor", "eager")):
            raise ValueError(
                f"backend should be 'inductor', 'eager' or a function, got {self.backend!r}"
            )
        for name, least in (("check", 0), ("max_graphs", 1), ("max_nodes", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} should be a whole number of at least {least}, got {value!r}"
                )

    def compiling(
        self, graph: GraphModule, inputs: list[Tensor], kept: Sequence[object]
    ) -> Compiling | None:
        """The compiled graph, once ready; None where it runs uncompiled.

        Args:
            kept: what the graph's capture has kept.
        """
        if self.backend == "eager":
            return None
        if len(graph.graph.nodes) > self.max_nodes:
            warn(
                f"a captured step of {len(graph.graph.nodes)} operations runs uncompiled, since "
                f"max_nodes is {self.max_nodes}: raise it, or take backend='eager' to silence this",
                CaptureWarning,
            )
            return None
        if callable(self.backend):
            run = self.backend(graph, inputs)
            return lambda: run
        from pyproelbo._backend.compilation import Compilation  # of torch's experimental parts

        compilation = Compilation(graph, inputs, kept, self.options)
        return compilation.result if self.background else compilation.wait


def as_capture(compile: "bool | Capture | Mapping[str, object]") -> Capture | None:
    """The options that ``compile`` represents, None for no capture.

    Raises:
        ValueError: for anything but False, True, a :class:`Capture` or inductor's options.
    """
    if isinstance(compile, Capture):
        return compile
    if isinstance(compile, Mapping):
        return Capture(options=compile)
    if isinstance(compile, bool):
        return Capture() if compile else None
    raise ValueError(
        f"compile should be True, False, pyproelbo.Capture(...) or inductor's options as a dict, "
        f"got {compile!r}"
    )
