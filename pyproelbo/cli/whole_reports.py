"""Reports of a run are of all its data, or are not written."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pyproelbo._rows.passes import UnfinishedWarning


@contextmanager
def whole_reports() -> Iterator[None]:
    """Raise a KeyboardInterrupt for a report that was interrupted: none of a part is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfinishedWarning)
        try:
            yield
        except UnfinishedWarning as interrupted:
            raise KeyboardInterrupt from interrupted
