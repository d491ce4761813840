"""Executors whose workers are in this process, and fail as told."""

from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool

from pyproelbo._rows import workers


class Inline(Executor):
    """Does each task when it is submitted, in a worker that knows nothing yet at first.

    Args:
        fresh: whether each task has a new worker.
    """

    def __init__(self, fresh=False):
        self.fresh, self.sizes = fresh, []
        workers._kept.clear()

    def __reduce__(self):
        raise TypeError("an executor cannot be sent to its workers")

    def submit(self, function, /, *args, **kwargs):
        if self.fresh:
            workers._kept.clear()
        self.sizes.append(sum(len(x) for x in args if isinstance(x, bytes)))
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Dying(Inline):
    """Breaks at a task, and can take no more."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def submit(self, function, /, *args, **kwargs):
        if len(self.sizes) >= self.at:
            raise BrokenProcessPool("a process died")
        return super().submit(function, *args, **kwargs)
