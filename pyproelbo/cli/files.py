"""Whole files, in folders with one writer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyproelbo._files import PARTIAL, opened, whole_file

try:
    import fcntl
except ImportError:  # Windows, where two concurrent commands are not kept apart
    fcntl = None


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file, or none (:func:`~pyproelbo._files.whole_file`)."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a folder; unfinished files of others are removed.

    The lock is on the folder itself and ends with the process, however that ends. Some network file
    systems have no locks; there the user must keep commands apart.

    Raises:
        ValueError: if another process is writing to it.
    """
    if fcntl is None:
        yield
        return
    with opened(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another command is writing to {folder}: wait until it has ended, or stop it"
            ) from error
        except OSError:
            pass
        for partial in partials(folder):
            partial.unlink(missing_ok=True)
        yield


def partials(folder: Path) -> list[Path]:
    """Files whose writing was not finished."""
    return list(folder.glob(f".*{PARTIAL}"))
