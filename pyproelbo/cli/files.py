"""Files that are whole whatever happens, and folders with one writer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there two commands at once are not kept apart
    fcntl = None

_PARTIAL = ".partial"


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step: whatever ends the process, it is the old one or the new one.

    Raises:
        OSError: if it cannot be written, on a full disk say; the old file is still there then.
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
            f"{path} cannot be written ({error.strerror or error}), and is as it was before: see "
            "that there is space and that the folder may be written to"
        ) from error
    if fcntl is not None:
        with _opened(path.parent) as folder:  # the name, too, is to outlast a power cut
            os.fsync(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a folder; what another has left unfinished is removed.

    The lock is on the folder itself and goes with the process, however that ends. Some network
    file systems have none; there it is the user who keeps two commands apart.

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
    """Files whose writing did not end."""
    return list(folder.glob(f".*{_PARTIAL}"))


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
