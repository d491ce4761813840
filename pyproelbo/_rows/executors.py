"""A function of batches, computed by the workers of an executor."""

import math
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from hashlib import sha256
from itertools import islice
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

import torch

from pyproelbo._backend.pools import renewed, workers_of, workers_of_cluster
from pyproelbo._messages.warn import warn
from pyproelbo._rows.workers import Done, Job, compact, packed, run, unpacked

Item = TypeVar("Item")
Part = TypeVar("Part")

_SMALL = 2**16  # bytes of a job that are sent with each task
_ATTEMPTS = 3
_FEW, _EACH = 8, 4  # workers, where their number is not known, and tasks that wait for each
_COUNTED = 5.0  # seconds, after which workers that may have joined a cluster are counted again


class LostWorkerWarning(UserWarning):
    """A worker of an executor has died; its task is done again, by another."""


def computed(
    of: Callable[[Item], Part], items: Iterable[Item], executor: Executor | None
) -> Iterator[tuple[Item, Part]]:
    """Each item with ``of`` it, in order.

    Args:
        of: may depend on what surrounds a report (:class:`~pyproelbo._rows.evaluating.Setting`).
        executor: whose workers compute; None for this process.

    Raises:
        ValueError: for a function that cannot be sent to a worker.
        BrokenExecutor: where workers die again and again.
    """
    if executor is None:
        return ((item, of(item)) for item in items)
    return _Sent(of, executor).results(items)


class _Task(NamedTuple, Generic[Item]):
    """An item that is being computed.

    Attributes:
        number: the index of the item.
        attempt: how many times it has been begun.
    """

    number: int
    item: Item
    future: "Future[bytes | None]"
    attempt: int = 1


class _Sent(Generic[Item, Part]):
    """A function at the workers."""

    def __init__(self, of: Callable[[Item], Part], executor: Executor) -> None:
        num = workers_of(executor)
        threads = None if num is None else max(1, torch.get_num_threads() // num)
        self._job = _sendable(Job.here(of, threads))
        self._key = sha256(self._job).hexdigest()
        self._executor, self._own = executor, list[ProcessPoolExecutor]()
        self._num, self._counted = num, -math.inf
        self._said = set[str]()

    def results(self, items: Iterable[Item]) -> Iterator[tuple[Item, Part]]:
        """The results, in the order of the items; those that are ready also after Ctrl-C."""
        waiting, left = deque[_Task[Item]](), enumerate(items)
        try:
            waiting += [self._task(i, x, True) for i, x in islice(left, self._workers)]
            while waiting:
                try:
                    result = waiting[0].future.result()
                except BrokenExecutor as error:
                    self._renew(error, waiting)
                    continue
                except KeyboardInterrupt:
                    yield from self._ready(waiting)
                    raise
                task = waiting.popleft()
                if result is None:
                    sent = self._submitted(task.number, task.item, True)
                    waiting.appendleft(task._replace(future=sent))
                    continue
                yield task.item, self._value(result)
                room = _EACH * self._workers - len(waiting)
                waiting += [self._task(i, x) for i, x in islice(left, max(1, room))]
        finally:
            for task in waiting:
                task.future.cancel()
            for pool in self._own:
                pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _workers(self) -> int:
        """How many workers there are, or may be."""
        if self._num is None or monotonic() - self._counted > _COUNTED:
            cluster = workers_of_cluster(self._executor)
            self._num, self._counted = cluster or self._num or _FEW, monotonic()
        return self._num

    def _task(self, index: int, item: Item, has_job: bool = False) -> _Task[Item]:
        return _Task(index, item, self._submitted(index, item, has_job))

    def _submitted(self, index: int, item: Item, has_job: bool) -> "Future[bytes | None]":
        job = self._job if has_job or len(self._job) < _SMALL else None
        try:
            return self._executor.submit(run, self._key, job, packed(compact(item)), index)
        except BrokenExecutor as error:  # for its turn to be waited for
            broken = Future[bytes | None]()
            broken.set_exception(error)
            return broken

    def _value(self, result: bytes) -> Part:
        done: Done = unpacked(result)
        for text, category in done.warned:
            if text not in self._said:
                self._said.add(text)
                warn(text, category)
        return done.value

    def _ready(self, waiting: "deque[_Task[Item]]") -> Iterator[tuple[Item, Part]]:
        while waiting and waiting[0].future.done() and not waiting[0].future.cancelled():
            task = waiting.popleft()
            if task.future.exception() is not None or (result := task.future.result()) is None:
                return
            yield task.item, self._value(result)

    def _renew(self, error: BrokenExecutor, waiting: "deque[_Task[Item]]") -> None:
        """Give the tasks that are not done to a new pool.

        Raises:
            BrokenExecutor: where there is none, and where the first task has been tried enough.
        """
        first = waiting[0]
        pool = renewed(self._executor) if first.attempt < _ATTEMPTS else None
        if pool is None:
            error.add_note(
                f"workers died while they computed the same task, {first.attempt} times: have they "
                "too little memory? Smaller batches, or fewer workers, need less"
            )
            raise error
        warn("a worker died; what it had not finished is computed again", LostWorkerWarning)
        self._executor = pool
        self._own.append(pool)
        for _ in range(len(waiting)):  # each is taken from the left and put to the right
            task = waiting.popleft()
            if not _is_done(task.future):
                future = self._submitted(task.number, task.item, True)
                task = task._replace(future=future, attempt=task.attempt + (task is first))
            waiting.append(task)


def _is_done(future: "Future[bytes | None]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _sendable(job: Job) -> bytes:
    try:
        return packed(job)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"executor= cannot send model and guide to its workers: {error}. Define them at the "
            "top of a module, not within a function or as a lambda; or install cloudpickle, which "
            "the extra has (pip install pyproelbo[scale])"
        ) from error
