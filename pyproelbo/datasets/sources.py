"""The rows of several files, or some of them, part by part."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyproelbo.datasets.arrays import Array, Whole
from pyproelbo.datasets.row_files import Columns, Reading, RowFile, changed
from pyproelbo.datasets.tables import TABLES, table

KINDS = (*TABLES, ".npy", ".npz", ".csv")
BLOCK = 2**16  # rows among which some are chosen


class Choice(NamedTuple):
    """Some of N rows by a seeded random choice, the same share of every block of rows.

    Attributes:
        num: N.
        held_out: how many of them are held out.
        seed: of the choice.
        is_held_out: whether these are the ones held out, or all others.
    """

    num: int
    held_out: int
    seed: int
    is_held_out: bool

    def has(self, start: int, stop: int) -> np.ndarray:
        """Whether each of the rows from ``start`` to ``stop`` is among them: bool."""
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        chosen = np.concatenate([np.zeros(0, bool), *map(self._of_block, blocks)])
        first = blocks.start * BLOCK
        return chosen[start - first : stop - first] == self.is_held_out

    def _of_block(self, block: int) -> np.ndarray:
        start, stop = block * BLOCK, min((block + 1) * BLOCK, self.num)
        num = stop * self.held_out // self.num - start * self.held_out // self.num
        order = np.random.default_rng((self.seed, block)).permutation(stop - start)
        return order < num


class Source:
    """Rows of files, in parts that can be read alone.

    Args:
        missing: whether NaN is passed on.
        choice: of the rows; None for all.

    Attributes:
        nums: rows of each part.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        dtype: np.dtype,
        missing: bool,
        choice: Choice | None = None,
    ) -> None:
        self.files, self.dtype, self.missing, self.choice = files, dtype, missing, choice
        # of each part: the number of its file, its own in that, and that of its first row there
        self._parts = [
            (i, part, first)
            for i, one in enumerate(files)
            for part, first in enumerate(accumulate((0, *one.parts[:-1])) if one.parts else ())
        ]
        sizes = [size for one in files for size in one.parts]
        self._bounds = np.cumsum([0, *sizes])
        ends = zip(self._bounds[:-1], self._bounds[1:], strict=True)
        self.nums = sizes if choice is None else [int(choice.has(*part).sum()) for part in ends]
        self.num_rows, self.size = sum(self.nums), files[0].size

    def chosen(self, choice: Choice) -> "Source":
        """Some of the rows."""
        return Source(self.files, self.dtype, self.missing, choice)

    def arrays(self, order: Iterable[int] | None = None, skip: int = 0) -> Iterator[np.ndarray]:
        """The rows (n, D) of the parts in an order, piece by piece.

        Args:
            order: the numbers of the parts; None for all from the first to the last.
            skip: rows to leave out at the beginning.

        Raises:
            ValueError: for numbers that are not finite, and files that have changed.
        """
        with ExitStack() as stack:
            opened, reading = None, None
            for part in range(len(self.nums)) if order is None else order:
                if skip >= self.nums[part]:
                    skip -= self.nums[part]
                    continue
                i = self._parts[part][0]
                if reading is None or opened != i:
                    stack.close()
                    opened, reading = i, stack.enter_context(self.files[i].opened(self.dtype))
                for rows in self._rows(part, reading):
                    if skip < len(rows):
                        yield rows[skip:]
                    skip = max(skip - len(rows), 0)

    def _rows(self, part: int, reading: Reading) -> Iterator[np.ndarray]:
        """The rows of one part."""
        i, within, first = self._parts[part]
        path, row, end = self.files[i].path, int(self._bounds[part]), int(self._bounds[part + 1])
        start = row
        for rows in reading(within):
            stop = row + len(rows)
            if stop <= end and rows.shape[1] == self.size:
                bad = np.isinf(rows) if self.missing else ~np.isfinite(rows)
                if bad.any():
                    which = first + row - start + int(bad.any(1).argmax())
                    raise ValueError(
                        f"{path.name} holds NaN or infinite numbers, or larger ones than "
                        f"{self.dtype} has, in row {which} (counted from 0): remove such rows, or "
                        "fill them in (Files(missing=True) passes NaN on)"
                    )
                yield rows if self.choice is None else rows[self.choice.has(row, stop)]
            row = stop
        if row != end:
            raise ValueError(changed(path))


def rebatched(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows, ``size`` at a time; the last have the remainder."""
    parts, num = [], 0
    for rows in arrays:
        while len(rows):
            parts.append(rows[: size - num])
            rows, num = rows[size - num :], num + len(parts[-1])
            if num == size:
                yield np.concatenate(parts)
                parts, num = [], 0
    if parts:
        yield np.concatenate(parts)


def files_of(
    path: str | Path | Sequence[str | Path], names: Sequence[str] | None, columns: Columns
) -> list[RowFile]:
    """The files of a path, which have the same features.

    Raises:
        ValueError: if there are none, or they differ.
    """
    found: list[RowFile] = []
    for one in _paths(path):
        found.append(new := _row_file(one, names, columns))
        first = found[0]
        if new.names != first.names or new.shape != first.shape:
            raise ValueError(
                f"{one.name} has other features than {first.path.name}: {_features(new)}, not "
                f"{_features(first)}; give all files the same, or choose common ones by columns="
            )
        if new.columns != first.columns:
            raise ValueError(
                f"{one.name} has another header or index than {first.path.name}: say header= and "
                "index_col= (--header, --index-col) for all files"
            )
        new.names = first.names  # in this order
    if not sum(sum(one.parts) for one in found):
        raise ValueError(f"{path} holds no data: give it one row for each datum")
    return found


def _row_file(path: Path, names: Sequence[str] | None, columns: Columns) -> RowFile:
    if path.suffix in TABLES:
        return table(path, names)
    return Array(path) if path.suffix == ".npy" else Whole(path, columns)


def _features(one: RowFile) -> str:
    if one.names is None:
        return f"shape {one.shape}"
    return ", ".join(f"{name!r} of {width}" for name, width in [*one.names.items()][:20])


def _paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of a path, with absolute names."""
    if not isinstance(path, str | Path):
        paths = [Path(one).absolute() for one in path]
        if not paths:
            raise ValueError("path should be a file, a folder or several files, got none")
        for one in paths:
            _check(one)
    elif not Path(path).is_dir():
        paths = [Path(path).absolute()]
        _check(paths[0])
    else:
        folder = Path(path).absolute()
        paths = [one for one in folder.iterdir() if one.name[0] not in "._"]
        paths.sort(key=_by_number)
        for one in paths:
            if not one.is_file() or one.suffix not in KINDS:
                raise ValueError(
                    f"{folder.name} holds {one.name} beside files of data: move it away, or give "
                    "the files in a list"
                )
        if not paths:
            raise ValueError(f"{path} holds no files that end in {', '.join(KINDS)}")
    if len(kinds := sorted({one.suffix for one in paths})) > 1:
        raise ValueError(f"files should be of one kind, got {' and '.join(kinds)}")
    return paths


def _check(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: check its name and folder")
    if path.suffix not in KINDS:
        raise ValueError(f"{path.name} should end in {', '.join(KINDS)}: save the data as such")


def _by_number(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A key by which part-2 is before part-10."""
    pieces = re.split(r"(\d+)", path.name)
    numbers = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
    return numbers, path.name
