"""Files that are always complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be opened
    fcntl = None

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in one step: whatever ends the process, it is the old or the new one.

    Raises:
        OSError: if it cannot be written, for example on a full disk; the old file then remains.
    """
    # of this process, as others may write the same file
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            with partial.open("wb") as file:
                yield file
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
        with opened(path.parent) as folder:  # the name too must survive a power cut
            os.fsync(folder)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """The descriptor of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
