"""Warnings of processes that run the same program."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pyproelbo import _processes


@contextmanager
def warnings_of_first_process() -> Iterator[None]:
    """This library's warnings come from the first process, and not once more from each other."""
    if _processes.rank() == 0:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not warning.category.__module__.startswith("pyproelbo"):
            place = warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, warning.category, *place)
