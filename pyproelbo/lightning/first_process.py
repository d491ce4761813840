"""Warnings of processes that run the same program."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pyproelbo._processes import TrainingProcesses


@contextmanager
def warnings_of_first_process(processes: TrainingProcesses) -> Iterator[None]:
    """This library's warnings come from the first process, and not once more from each other."""
    if processes.rank == 0:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not warning.category.__module__.startswith("pyproelbo"):
            place = warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, warning.category, *place)
