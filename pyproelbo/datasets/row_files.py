"""A file of rows of numbers, which is read part by part."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

BYTES = 2**22  # of the rows that are converted at once, as float64
Reading = Callable[[int], Iterator[np.ndarray]]  # from the number of a part to its rows, in pieces


class Columns(NamedTuple):
    """The parts of a ``.csv`` file that are not data; None to infer them from the file.

    Attributes:
        header: whether its first line has the names of the columns.
        index_col: whether its first column has the names or numbers of the rows.
    """

    header: bool | None = None
    index_col: bool | None = None


class RowFile(ABC):
    """A file of rows of numbers.

    Attributes:
        parts: the numbers of rows of the parts that can be read alone.
        shape: of one datum.
        names: of the columns, where the file has them, and how many numbers each has.
        columns: which parts of a .csv file were taken for names and index.
    """

    parts: tuple[int, ...]
    shape: tuple[int, ...]
    names: dict[str, int] | None = None
    columns = Columns()

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """D, the numbers of one datum."""
        return math.prod(self.shape)

    @abstractmethod
    def opened(self, dtype: np.dtype) -> AbstractContextManager[Reading]:
        """The opened file, of which parts can be read."""

    def start(self, part: int) -> int:
        """The number of the first row of a part."""
        return sum(self.parts[:part])


def rows_at_once(size: int) -> int:
    """Of rows of ``size`` numbers, how many are converted at once."""
    return max(1, min(2**16, BYTES // (8 * size)))


def changed(path: Path) -> str:
    """What to say of a file that is not what it was."""
    return f"{path.name} has changed since it was opened: restore it, or open it again"
