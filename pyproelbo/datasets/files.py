"""Rows in files that need not fit memory."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pyproelbo.datasets.row_files import Columns
from pyproelbo.datasets.shuffled import Shuffled
from pyproelbo.datasets.sources import Choice, Source, files_of, rebatched

_DTYPES = {torch.float32: np.dtype("float32"), torch.float64: np.dtype("float64")}


class Files:
    """Rows of files as batches (B, D) of floats, read when they are needed.

    Reports and :func:`~pyproelbo.fit` take it as their data. It can be iterated over any number of
    times. All batches have ``batch_size`` rows, whatever the files' own parts, but for the last,
    which has the remainder; memory holds a batch, and a few MiB of the part being read. A part
    is a row group of Parquet (read a little at a time), a record batch of Arrow, or a whole
    ``.npz`` or ``.csv`` file.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/data.npy"
    >>> np.save(path, np.ones((5, 3)))
    >>> files = Files(path, batch_size=2)
    >>> files.num_data, [len(batch) for batch in files]
    (5, [2, 2, 1])

    Args:
        path: ``.parquet``, ``.arrow`` or ``.feather`` (these need the extra ``parquet``), ``.npy``,
            ``.npz`` or ``.csv``; a folder of files of one of these kinds, in the order of their
            names with numbers in them by size (``part-2`` before ``part-10``; names that begin
            with a dot or an underscore are left out); or a list of files, in its order.
        batch_size: rows per batch.
        columns: names of the columns of Parquet and Arrow files, in the order of the features. By
            default all, in the order of the first file, but for an index that pandas has written.
            A column of lists, which must have one length, has as many features.
        header, index_col: of ``.csv`` files, as in :func:`load`.
        missing: whether NaN, and null in Parquet and Arrow files, is passed on as NaN, for models
            of missing data; not for ``.npz`` and ``.csv``. By default it is refused.
        dtype: ``torch.float32`` or ``torch.float64``; None for torch's default.

    Attributes:
        num_data: the number of rows, N.
        shape: of one datum, as in :class:`Data`; batches have its product as D.
        names: of the columns, a column of lists once; None for files without names.
        columns: which parts of ``.csv`` files were taken for names and index.
        paths: of the files.

    Raises:
        ValueError: for files that cannot be read, hold anything but numbers, or have different
            features; while iterating, for numbers that are not finite, and files that have changed.
            The message names the file, and the column or row.
        ImportError: for Parquet and Arrow files without pyarrow.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        batch_size: int = 1024,
        *,
        columns: Sequence[str] | None = None,
        header: bool | None = None,
        index_col: bool | None = None,
        missing: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(columns, str):
            raise ValueError(f"columns should be several names, got one string: give [{columns!r}]")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise ValueError(f"dtype should be torch.float32 or torch.float64, got {dtype}")
        columns_of = Columns(header, index_col)
        files = files_of(path, columns, columns_of)
        if columns is not None and files[0].names is None:
            raise ValueError(
                f"columns is of Parquet and Arrow files: leave it out for {files[0].path.name}"
            )
        if columns_of != Columns() and files[0].path.suffix != ".csv":
            raise ValueError(
                f"header and index_col are of .csv files: leave them out for {files[0].path.name}"
            )
        self._source = Source(files, _DTYPES[dtype], missing)
        self.shape, self.columns = files[0].shape, files[0].columns
        self.names = None if files[0].names is None else tuple(files[0].names)
        self.paths = tuple(one.path for one in files)
        self.batch_size = _checked(batch_size)

    @property
    def num_data(self) -> int:
        """The number of rows."""
        return self._source.num_rows

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self.num_data // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.from_numpy, rebatched(self._source.arrays(), self.batch_size))

    def __repr__(self) -> str:
        first, *others = self.paths
        files = f"{len(self.paths):,} files" if others else first.name
        size = self._source.size
        return f"Files({files}: {self.num_data:,} rows of {size:,} features)"

    def batched(self, batch_size: int) -> Self:
        """The same rows in batches of another size."""
        other = copy.copy(self)
        other.batch_size = _checked(batch_size)
        return other

    def split(self, holdout: float, seed: int = 0) -> tuple[Self, Self]:
        """Two parts by a seeded random choice of rows: all others, and those held out.

        The choice is made in each 65,536 rows that follow each other, with the same share of each;
        rows keep their order.

        Args:
            holdout: the fraction of the rows held out, of which there is at least one.

        Raises:
            ValueError: for a fraction that is not between 0 and 1, for fewer than two rows, and for
                a part of another split.
        """
        if not 0 < holdout < 1:
            raise ValueError(f"holdout should be a fraction between 0 and 1, got {holdout}")
        if self._source.choice is not None:
            raise ValueError("split should be called on whole files, and not on a part of them")
        num = self.num_data
        if num < 2:
            raise ValueError(f"the files have {num} row: splitting them needs two at least")
        held_out = min(max(round(holdout * num), 1), num - 1)
        parts = copy.copy(self), copy.copy(self)
        for is_held_out, part in enumerate(parts):
            choice = Choice(num, held_out, seed, bool(is_held_out))
            part._source = self._source.chosen(choice)
        return parts

    def shuffled(
        self,
        batch_size: int | None = None,
        *,
        buffer: int | None = None,
        seed: int = 0,
        distributed: bool = False,
    ) -> Shuffled:
        """Batches in a new random order in each epoch, for training; it can resume.

        Args:
            batch_size: rows per batch; None for that of this object.
            buffer: rows mixed at once (see :class:`Shuffled`); None for those of 64 MiB in float64.
            distributed: whether the processes of ``torch.distributed`` share the rows, as for
                :class:`Minibatches`; each reads all files.
        """
        size = self.batch_size if batch_size is None else batch_size
        source = self._source
        return Shuffled(source, size, buffer=buffer, seed=seed, distributed=distributed)

    def first(self, num: int) -> Tensor:
        """The first rows: (num, D), or fewer if there are fewer."""
        return next(iter(self.batched(min(num, self.num_data))))

    def sample(self, num: int, seed: int = 0) -> Tensor:
        """Rows chosen at random without replacement, in their order: (num, D), or all if fewer.

        This is one pass over the data.
        """
        total = self.num_data
        if num >= total:
            return self.first(total)
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(total, num, replace=False, shuffle=False))
        found, start = [], 0
        for rows in self._source.arrays():
            first, last = np.searchsorted(chosen, (start, start + len(rows)))
            found.append(rows[chosen[first:last] - start])
            start += len(rows)
        return torch.from_numpy(np.concatenate(found))


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    return batch_size
