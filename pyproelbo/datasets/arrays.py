"""Files of arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pyproelbo.datasets.loading import check_numbers, read
from pyproelbo.datasets.row_files import Columns, Reading, RowFile, rows_at_once


class Array(RowFile):
    """A ``.npy`` file, of which slices are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        array = self._array()
        check_numbers(path.name, array)
        self.shape = array.shape[1:] or (1,)
        num, size = len(array), rows_at_once(self.size)
        self.parts = tuple(min(size, num - start) for start in range(0, num, size))

    @contextmanager
    def opened(self, dtype: np.dtype) -> Iterator[Reading]:
        """As in the base."""
        size = rows_at_once(self.size)

        def pieces(part: int) -> Iterator[np.ndarray]:
            # mapped anew for each part: the pages of a mapping count as memory until it ends
            rows = self._array()[part * size : (part + 1) * size]
            with np.errstate(over="ignore"):
                yield rows.astype(dtype).reshape(len(rows), -1)

        yield pieces

    def _array(self) -> np.ndarray:
        try:
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            read(self.path)  # says what is wrong with a file that cannot be mapped
            raise


class Whole(RowFile):
    """A file that can only be read as a whole: ``.npz`` or ``.csv``."""

    def __init__(self, path: Path, columns: Columns) -> None:
        super().__init__(path)
        data, self.columns = read(path, columns)
        self.parts, self.shape = (len(data.x),), data.shape

    @contextmanager
    def opened(self, dtype: np.dtype) -> Iterator[Reading]:
        """As in the base."""

        def pieces(part: int) -> Iterator[np.ndarray]:
            yield read(self.path, self.columns)[0].x.numpy().astype(dtype)

        yield pieces
