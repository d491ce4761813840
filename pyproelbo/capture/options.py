"""How a training step is captured."""

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
    """Steps that should have been captured run eagerly; the message says why."""


@dataclass(frozen=True)
class Capture:
    r"""Options of a captured step: ``compile=Capture(...)``; ``compile=True`` takes the defaults.

    Model, guide and objective run once under ``make_fx``, with the gradients of the loss, and
    leave one graph of tensor operations. From then on the graph runs in place of the program: no
    effect handlers, no autograd, no Python of the program. See :mod:`pyproelbo.capture` for what
    can be captured.

    Args:
        backend: "inductor" compiles the graph; "eager" runs its operations one by one, which
            spares the time to compile, and all but the arithmetic of a step; or any function
            from a graph and example inputs to a function, as those of ``torch.compile``.
        options: options of inductor, as of ``torch.compile(options=...)``.
        background: whether inductor works in a process of its own, of the lowest priority, while
            the graph runs uncompiled. Otherwise the first captured step waits for it, and the
            rounding of all steps is the same in each run of the training.
        cuda_graph: whether, on a GPU, the compiled step is recorded as a CUDA graph.
        lazy_loss: ``loss_and_grads``, and so ``SVI.step``, return a captured step's loss as a
            tensor on its device, which ``float(loss)`` reads, so that no step waits for the GPU.
            There are no warnings of losses that are not finite then.
        check: how many steps of a new graph are compared with eager ones, which each cost an
            eager step. Steps that differ warn, and run eagerly from then on.
        max_graphs: of how many structures (shapes of arguments, modes and layers of modules) the
            graphs are kept; steps of further ones run eagerly.
        max_nodes: graphs of more operations are not compiled, as that takes seconds for each
            thousand, but run as by "eager".

    Raises:
        ValueError: for a backend that is none, and for numbers that are too small.
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
        """What the graph becomes, once it is there; None where it runs as it is.

        Args:
            kept: what the graph's capture has left.
        """
        if self.backend == "eager":
            return None
        if len(graph.graph.nodes) > self.max_nodes:
            warn(
                f"a captured step of {len(graph.graph.nodes)} operations runs uncompiled, for "
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
    """The options that ``compile`` stands for, None for no capture.

    Raises:
        ValueError: if it is none of False, True, a :class:`Capture` or inductor's options.
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
