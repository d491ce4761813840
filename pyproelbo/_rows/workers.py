"""What runs in a worker of an executor: a function of batches, within the setting of a report.

A job, the function with the programs and their parameters, is sent to each worker once, and kept
there for further batches. Everything is sent as bytes, so that no executor has to know tensors.
"""

import io
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from torch import Tensor

from pyproelbo._backend import rng
from pyproelbo._rows import evaluating
from pyproelbo._rows.evaluating import Setting
from pyproelbo._terms.nested import refilled, tensors_in

T = TypeVar("T")

_DEVICES = ("cpu", "cuda")


class Job(NamedTuple):
    """A function of items, and everything around it that its results depend on.

    Attributes:
        of: the function.
        setting: of the report.
        store: the state of Pyro's parameter store.
        settings: of Pyro.
        dtype: torch's default.
        autocast: the dtype of each kind of device where autocast is on.
        num_threads: of torch, in a worker; None for the worker's own.
    """

    of: Callable[[Any], object]
    setting: Setting
    store: dict[str, Any]
    settings: dict[str, Any]
    dtype: torch.dtype
    autocast: dict[str, torch.dtype]
    num_threads: int | None

    @classmethod
    def here(cls, of: Callable[[Any], object], num_threads: int | None) -> "Job":
        """The job of the report that is being made, as this process would do it."""
        setting = evaluating.setting()
        assert setting is not None, "no report is being made"
        on = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        return cls(
            of,
            setting,
            dict(pyro.get_param_store().get_state()),
            dict(pyro.settings.get()),
            torch.get_default_dtype(),
            {device: torch.get_autocast_dtype(device) for device in on},
            num_threads,
        )

    @contextmanager
    def entered(self, found: dict[str, object]) -> Iterator[None]:
        """Within this context the function has the results of the process that made the job.

        Args:
            found: what has been found about the programs so far.
        """
        dtype, num_threads = torch.get_default_dtype(), torch.get_num_threads()
        token = evaluating.report.set(found)
        try:
            torch.set_default_dtype(self.dtype)
            if self.num_threads is not None:
                torch.set_num_threads(self.num_threads)
            with ExitStack() as stack:
                stack.enter_context(pyro.settings.context(**self.settings))
                for device, low in self.autocast.items():
                    stack.enter_context(torch.autocast(device, low))
                stack.enter_context(evaluating.store_put_back())
                pyro.get_param_store().set_state(self.store)  # type: ignore[arg-type]
                stack.enter_context(self.setting.entered())
                yield
        finally:
            evaluating.report.reset(token)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(num_threads)


class Done(NamedTuple):
    """The result of a task.

    Attributes:
        value: what the function has returned.
        warned: the warnings meanwhile: their texts and classes.
    """

    value: Any
    warned: list[tuple[str, type[Warning]]]


class Kept(NamedTuple):
    job: Job
    found: dict[str, object]


_kept: dict[str, Kept] = {}
_one_at_a_time = threading.Lock()  # for Pyro's handlers are those of the whole process


def run(key: str, job: bytes | None, item: bytes, index: int) -> bytes | None:
    """Do the task of an item; None where the job is not known here and has not been sent.

    Args:
        key: what tells the job from all others.
        index: of the item, which has its own random numbers where programs take them from a
            generator.
    """
    with _one_at_a_time, _uninterrupted():
        if key not in _kept:
            if job is None:
                return None
            _kept.clear()  # of reports that are finished
            _kept[key] = Kept(unpacked(job, _own_device()), {})
        kept = _kept[key]
        with kept.job.entered(kept.found), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if index:
                rng.begin(rng.seed_of(kept.job.setting.seed or 0, index))
            value = kept.job.of(unpacked(item, _own_device()))
        return packed(Done(compact(value), [(str(w.message), w.category) for w in caught]))


def compact(value: T) -> T:
    """The same without the rest of the memory that its tensors are a part of, as slices are."""
    return refilled(value, map(_compact, tensors_in(value)))


def _compact(x: Tensor) -> Tensor:
    is_part = x.layout == torch.strided and x.untyped_storage().nbytes() > x.nbytes
    return x.clone() if is_part else x


def packed(value: object) -> bytes:
    """An object as bytes, with functions that no module has."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_pickle())
    return buffer.getvalue()


def unpacked(value: bytes, device: str | None = None) -> Any:
    """The object.

    Args:
        device: of what was on a GPU; by default the CPU.
    """
    where = "cpu" if device is None else device
    return torch.load(io.BytesIO(value), map_location=_moved(where), weights_only=False)


def _moved(device: str) -> Callable[[Any, str], Any]:
    def moved(storage: Any, location: str) -> Any:
        return storage if location == "cpu" or device == "cpu" else storage.to(device=device)

    return moved


@cache
def _pickle() -> ModuleType:
    try:
        import cloudpickle
    except ImportError:
        return pickle
    return cloudpickle


@cache
def _own_device() -> str | None:
    """The GPU of this worker: of several processes on a machine each has the next one."""
    if not torch.cuda.is_available():
        return None
    names = multiprocessing.current_process().name.rpartition("-")[2]
    index = int(names) - 1 if names.isdigit() else 0
    return f"cuda:{index % torch.cuda.device_count()}"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C in a terminal reaches all processes: the one that waits for the results decides."""
    is_worker = multiprocessing.parent_process() is not None
    if not (is_worker and threading.current_thread() is threading.main_thread()):
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
