"""Reports that are complete, or are not made."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pyproelbo._rows.passes import UnfinishedWarning


@contextmanager
def whole_reports() -> Iterator[None]:
    """Raise a KeyboardInterrupt for an interrupted report, instead of a partial one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfinishedWarning)
        try:
            yield
        except UnfinishedWarning as interrupted:
            raise KeyboardInterrupt from interrupted
