"""A graph that is to be compiled, in a form that another process can read.

It becomes a library without Python. Where inductor cannot make one, as for GPUs without CUDA's
headers, it is compiled into torch's own cache, from which a process takes some seconds to load it.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._backend import inductor, of_graph
from pyproelbo._backend.layouts import Layout
from pyproelbo._backend.operations import Layouts
from pyproelbo._backend.packed_graph import PackedNode, unpacked
from pyproelbo._backend.torch_private import inductor_settings

_LIBRARY, _DONE = "step.so", "done"  # files
_SOURCES = tuple(
    f"{name}.py"
    for name in (
        *("inductor", "decompositions", "products", "operations", "layouts"),
        *("compile_job", "compile_process"),
    )
)


class Known(NamedTuple):
    """What a compiled graph depends on besides the graph.

    Attributes:
        inputs: how those of the graph are laid out, and what it holds.
        options: of inductor, as those of ``torch.compile(options=...)``.
        settings: of inductor as they are in this process.
        num_threads: for which it is made.
        precision: of products of float32 matrices.
        is_deterministic: whether algorithms have to be.
    """

    inputs: list[Layout]
    options: dict[str, object]
    settings: dict[str, object]
    num_threads: int
    precision: str
    is_deterministic: bool

    @classmethod
    def now(cls, inputs: Sequence[Tensor], options: Mapping[str, object]) -> "Known":
        """As it is in this process."""
        return cls(
            [Layout.of(x) for x in inputs],
            dict(sorted(options.items())),
            inductor_settings(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def key(self, graph: list[PackedNode]) -> str:
        """What tells a library from all others."""
        gpus = {x.device for x in self.inputs if x.device.type == "cuda"}
        known = (
            graph,
            self,
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
            [str(torch.cuda.get_device_properties(device)) for device in gpus],
            [(Path(__file__).parent / name).read_bytes() for name in _SOURCES],
        )
        return sha256(repr(known).encode()).hexdigest()


class Job(NamedTuple):
    """A graph, and where what it is compiled to is to lie.

    Attributes:
        operations: what the graph's opaque functions return.
    """

    graph: list[PackedNode]
    known: Known
    operations: list[Layouts]
    folder: Path

    @property
    def is_done(self) -> bool:
        """Whether it has been compiled."""
        return (self.folder / _DONE).exists()

    def compile(self) -> None:
        """Compile the graph."""
        library = str(self.folder / _LIBRARY)
        self.folder.mkdir(exist_ok=True)
        with of_graph.run_with(self.operations):
            try:
                graph, inputs = unpacked(self.graph), self._inputs()
                inductor.compiled_library(graph, inputs, self.known.options, library)
            except Exception:
                (self.folder / _LIBRARY).unlink(missing_ok=True)
                self._by_torch()
        (self.folder / _DONE).touch()

    def loaded(self) -> Callable[[list[Tensor]], list[Tensor]]:
        """What :meth:`compile` has made.

        Raises:
            RuntimeError: if it is no library that can be loaded.
        """
        library = self.folder / _LIBRARY
        if not library.exists():
            return self._by_torch()
        try:
            return inductor.library(str(library), self._device())
        except RuntimeError:
            shutil.rmtree(self.folder, ignore_errors=True)  # so that the next process makes another
            raise

    def _by_torch(self) -> Callable[[list[Tensor]], list[Tensor]]:
        return inductor.compiled(unpacked(self.graph), self._inputs(), self.known.options)

    def _inputs(self) -> list[Tensor]:
        return [layout.empty() for layout in self.known.inputs]

    def _device(self) -> torch.device:
        devices = [layout.device for layout in self.known.inputs]
        return next((d for d in devices if d.type != "cpu"), devices[0])
