"""The processes that compute a report."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def workers(num: int) -> Iterator[Executor | None]:
    """A pool of so many processes; None for one, which is this."""
    if num == 1:
        yield None
        return
    with ProcessPoolExecutor(num, multiprocessing.get_context("spawn")) as pool:
        yield pool
