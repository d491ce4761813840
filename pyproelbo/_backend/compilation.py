"""A graph that another process compiles while this one goes on.

The process has the lowest priority, and ends with this one, however that ends. What it makes lies
beside what torch compiles (``TORCHINDUCTOR_CACHE_DIR``), where later processes find it.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from pyproelbo._backend import of_graph
from pyproelbo._backend.compile_job import Job, Known
from pyproelbo._backend.operations import layouts
from pyproelbo._backend.packed_graph import packed
from pyproelbo._backend.torch_private import inductor_folder

JOB, ERROR = "job", "error"  # files
_AT_ONCE = max(1, (os.cpu_count() or 1) // 4)  # processes in the background


class Compilation:
    """A graph that is being compiled, or has been by an earlier process.

    Args:
        inputs: of the graph, as examples.
        kept: what the graph's capture has left.
        options: of inductor.

    Raises:
        Exception: where the graph or the options cannot be handed to another process.
    """

    def __init__(
        self,
        graph: GraphModule,
        inputs: Sequence[Tensor],
        kept: Sequence[object],
        options: Mapping[str, object],
    ) -> None:
        nodes, self._held = packed(graph)
        known = Known.now([*inputs, *self._held], options)
        folder = Path(inductor_folder()) / "pyproelbo"
        self._job = Job(nodes, known, layouts(kept), folder / known.key(nodes))
        self._work = None if self._job.is_done else _Work(self._job, folder)
        if self._work is not None:
            weakref.finalize(self, self._work.end, os.getpid())

    def result(self) -> Callable[..., list[Tensor]] | None:
        """The compiled function; None as long as there is none, for the process is at work.

        Raises:
            RuntimeError: if it could not be made, or not be loaded.
        """
        if self._work is not None:
            self._work.start_in_background()
            if not self._work.is_done():
                return None
        return self._loaded()

    def wait(self) -> Callable[..., list[Tensor]]:
        """The compiled function, once it is there.

        Raises:
            RuntimeError: if it could not be made, or not be loaded.
        """
        if self._work is not None:
            self._work.start(_FOREGROUND)
            self._work.wait()
        return self._loaded()

    def _loaded(self) -> Callable[..., list[Tensor]]:
        self._work, held = None, self._held
        with of_graph.run_with(self._job.operations):
            run = self._job.loaded()
        return lambda *tensors: run([*tensors, *held])


_BACKGROUND, _FOREGROUND = "19", "0"  # what is added to the number that is the less urgent


class _Work:
    """The other process, and the folder in which it works."""

    def __init__(self, job: Job, beside: Path) -> None:
        beside.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="job-", dir=beside))
        (self._folder / JOB).write_bytes(pickle.dumps(job))
        self._process: subprocess.Popen[bytes] | None = None

    def start_in_background(self) -> None:
        """Start the process, if it is not, unless enough others run."""
        if self._process is None and sum(p.poll() is None for p in _processes) < _AT_ONCE:
            _processes.add(self.start(_BACKGROUND))

    def start(self, priority: str) -> "subprocess.Popen[bytes]":
        """Start the process."""
        module = "pyproelbo._backend.compile_process"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(self._folder), priority],
            stdin=subprocess.PIPE,  # at whose end it ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": import_path()},
            start_new_session=True,  # so that Ctrl-C is not for it
        )
        return self._process

    def is_done(self) -> bool:
        """Whether the process has compiled the graph.

        Raises:
            RuntimeError: if it could not.
        """
        code = None if self._process is None else self._process.poll()
        if code:
            error = self._folder / ERROR
            raise RuntimeError(error.read_text() if error.exists() else f"it ended with {code}")
        return code is not None

    def wait(self) -> None:
        """Wait until the process has compiled the graph.

        Raises:
            RuntimeError: if it could not.
        """
        assert self._process is not None
        self._process.wait()
        self.is_done()

    def end(self, of: int) -> None:
        """End the process, with the compilers that it has started, and leave nothing.

        Args:
            of: the process that has started it; one that is forked from that has no say.
        """
        if of != os.getpid():
            return
        if self._process is not None:
            if self._process.poll() is None:
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
                self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def import_path() -> str:
    """Where this process finds modules, Python's own first.

    A module of the user's with a name of Python's, such as "types", which this process has imported
    before the user's folder was known, would be imported in its place.
    """
    own = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
    paths = [path or os.getcwd() for path in sys.path]
    is_own = [path.startswith(own) and "-packages" not in path for path in paths]
    first = [path for path, own in zip(paths, is_own, strict=True) if own]
    return os.pathsep.join([*first, *paths])


_processes: "weakref.WeakSet[subprocess.Popen[bytes]]" = weakref.WeakSet()
