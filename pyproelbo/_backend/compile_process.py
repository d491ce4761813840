"""Compile one graph: ``python -m pyproelbo._backend.compile_process FOLDER PRIORITY``.

The folder has the job. The process ends when its standard input does.
"""

import os
import pickle
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock

from pyproelbo._backend.compilation import ERROR, JOB
from pyproelbo._backend.compile_job import Job
from pyproelbo._backend.torch_private import set_inductor


def main(work: Path) -> None:
    """Compile the job in the folder ``work``, unless another process has done so meanwhile."""
    job: Job = pickle.loads((work / JOB).read_bytes())
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{job.folder}.lock"):
        if not job.is_done:
            torch.set_num_threads(job.known.num_threads)
            torch.set_float32_matmul_precision(job.known.precision)
            torch.use_deterministic_algorithms(job.known.is_deterministic)
            set_inductor(job.known.settings)
            job.compile()


_in_folder = threading.Lock()


def _end_with_input(work: Path) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    _in_folder.acquire()  # for good: nothing may be written there while it is removed
    shutil.rmtree(work, ignore_errors=True)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # with the compilers that run
    os._exit(1)


def _yield(priority: str) -> None:
    if hasattr(os, "nice"):
        os.nice(int(priority))
    with suppress(OSError):  # Linux shares the processors out by sessions first, and this has one
        Path("/proc/self/autogroup").write_text(priority)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    threading.Thread(target=_end_with_input, args=(here,), daemon=True).start()
    _yield(sys.argv[2])
    try:
        main(here)
    except BaseException as error:
        with _in_folder:
            (here / ERROR).write_text(f"{type(error).__name__}: {error}")
        raise
