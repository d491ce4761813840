"""Files that are always complete, and folders with one writer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two concurrent commands are not kept apart
    fcntl = None

_PARTIAL = ".partial"


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step: whatever ends the process, the file is the old or the new one.

    Raises:
        OSError: if it cannot be written, for example on a full disk; the old file then remains.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}), and is unchanged: check that "
            "there is space and that the folder is writable"
        ) from error
    if fcntl is not None:
        with _opened(path.parent) as folder:  # the name too must survive a power cut
            os.fsync(folder)


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
    with _opened(folder) as descriptor:
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
    return list(folder.glob(f".*{_PARTIAL}"))


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
