"""What Python's pools of processes, and others', do not promise."""

from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any


def workers_of(executor: Executor) -> int | None:
    """How many workers a pool has on this machine; None where it does not say."""
    number = getattr(executor, "_max_workers", None)
    return number if isinstance(number, int) else None


def workers_of_cluster(executor: Executor) -> int | None:
    """How many workers Dask's cluster has now; None for other executors, and where it has none."""
    client: Any = getattr(executor, "_client", None)
    return (len(client.nthreads()) or None) if hasattr(client, "nthreads") else None


def renewed(executor: Executor) -> ProcessPoolExecutor | None:
    """A pool like one that has broken, which can take no more work; None if it is of another kind.

    The caller has to shut it down.
    """
    if type(executor) is not ProcessPoolExecutor:
        return None
    names = ("_max_workers", "_mp_context", "_initializer", "_initargs")
    if not all(hasattr(executor, name) for name in names):
        return None
    return ProcessPoolExecutor(*(getattr(executor, name) for name in names))
