"""Data in memory: scikit-learn's digits, and files."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo.datasets.row_files import Columns
from pyproelbo.datasets.tables import TABLES, table


class Data(NamedTuple):
    """Data in the form that models take, and the original shape of one datum.

    Attributes:
        x: (N, D), torch's default float type.
        shape: of one datum: (8, 8) for images of 64 pixels; (D,) for vectors.
    """

    x: Tensor
    shape: tuple[int, ...]


def digits() -> Data:
    """Scikit-learn's 1,797 images of digits, 8 x 8 pixels in [0, 1].

    Raises:
        ImportError: without scikit-learn, which the extra ``data`` installs.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits needs scikit-learn: pip install pyproelbo[data]") from error
    images = load_digits().images / 16.0  # type: ignore[union-attr]
    return Data(_tensor(images.reshape(len(images), -1)), (8, 8))


EITHER = Columns()


def load(path: str | Path, *, header: bool | None = None, index_col: bool | None = None) -> Data:
    """Data from a file, one datum per row.

    Args:
        path: ``.npy``, ``.npz`` with one array in it, or ``.csv`` with commas between numbers.
            Images (N, H, W, ...) become rows (N, D); one-dimensional arrays are N data of one
            feature.
        header: whether the first line of a ``.csv`` has the names of its columns. By default
            pandas' conventions are recognised: names, or 0, 1, 2, ... above numbers with decimal
            points.
        index_col: whether its first column is not a feature but the index of its rows. By default
            it is an index if it has no name, as pandas writes it.

    Raises:
        ValueError: if there is no such file, its suffix is unknown, it is empty, or holds anything
            but finite real numbers, or if header or index are unclear; the message says what to do.
    """
    return read(path, Columns(header, index_col))[0]


def read(path: str | Path, columns: Columns = EITHER) -> tuple[Data, Columns]:
    """Data from a file as in :func:`load`, and what was taken for names and index."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: check its name and folder")
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path.name} should end in {', '.join(_READERS)}: save the data as one of them, "
            "with numpy.save for example"
        )
    if path.suffix != ".csv":
        for name, value in columns._asdict().items():
            if value is not None:
                raise ValueError(f"{name} is of .csv files: leave it out for {path.name}")
    array, columns = _READERS[path.suffix](path, columns)
    check_numbers(path.name, array)
    shape = array.shape[1:] or (1,)
    x = _tensor(array.reshape(len(array), -1))
    bad = (~x.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{path.name} holds NaN or infinite numbers in {len(bad)} of {len(x)} rows (the first "
            f"is row {bad[0]}, counted from 0): remove those rows, or fill them in"
        )
    return Data(x, shape), columns


def check_numbers(name: str, array: np.ndarray) -> None:
    """Raise a ValueError for an array of a file that holds no real numbers."""
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} holds no data: give it one row for each datum")
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise ValueError(f"{name} holds {array.dtype}, not numbers: encode them as numbers")
    if np.iscomplexobj(array):
        raise ValueError(f"{name} holds complex numbers: save their two parts separately")


def _tensor(array: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # numbers that are too large become infinite, and are refused
        values = torch.from_numpy(array.astype(np.float64))
    return values.to(torch.get_default_dtype())


def _npy(path: Path, columns: Columns) -> tuple[np.ndarray, Columns]:
    try:
        return np.load(path, allow_pickle=False), columns
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path.name} is not a readable array of numbers: save it with numpy.save"
        ) from error


def _npz(path: Path, columns: Columns) -> tuple[np.ndarray, Columns]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            if len(names) == 1:
                return file[names[0]], columns
    except Exception as error:  # zip files break in many ways
        raise ValueError(
            f"{path.name} is not a readable archive of arrays of numbers: save it with numpy.savez"
        ) from error
    raise ValueError(
        f"{path.name} should hold one array, but holds {len(names)} ({', '.join(names)}): save the "
        "one to fit with numpy.save"
    )


def _csv(path: Path, columns: Columns) -> tuple[np.ndarray, Columns]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
        except csv.Error as error:
            raise ValueError(f"{path.name} is not a readable .csv ({error}): save it again") from (
                error
            )
    rows = [row for row in rows if any(row)]
    if not rows:
        return np.empty(0), columns
    header = _has_header(path.name, rows) if columns.header is None else columns.header
    names, rows = (rows[0], rows[1:]) if header else (None, rows)
    index = columns.index_col
    if index is None:
        index = _has_index(path.name, names, rows)
    if index and rows and len(rows[0]) < 2:
        raise ValueError(f"{path.name} has one column, which cannot be an index: it is the data")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path.name} has {len(row)} columns in data row {i}, but {len(rows[0])} in row 0: "
                "give all rows the same number, separated by commas"
            )
        for j, cell in enumerate(row[index:], start=index):
            if not _is_number(cell):
                why = "; if it is a name, say header=True or index_col=True (--header, --index-col)"
                raise ValueError(
                    f"{path.name} holds {cell!r} in data row {i}, which is not a number: encode it "
                    f"as one, or remove its column{why * (i == 0 or j == 0)}"
                )
    return np.array([row[index:] for row in rows], dtype=np.float64), Columns(header, index)


def _has_header(name: str, rows: list[list[str]]) -> bool:
    """Whether the first row names the columns; a ValueError where both would make sense."""
    first, others = rows[0], [cell for row in rows[1:] for cell in row]
    numbers = [cell for cell in first if _is_number(cell)]
    texts = [cell for cell in first if not _is_number(cell)]
    counting = [str(i) for i in range(len(numbers))]
    # names; or pandas' numbers of columns, beside names or above its index
    if not numbers or (numbers == counting and texts and (first[0] == "" or all(texts))):
        return True
    if texts or not all(map(_is_whole, first)):
        return False
    is_float = bool(others) and not any(map(_is_whole, others))
    if first == counting and is_float:
        return True
    if first == counting or (is_float and len({*first}) == len(first) > 1):
        start = ", ".join(first[:3]) + ", ..." * (len(first) > 3)
        raise ValueError(
            f"the first line of {name}, {start}, may name the columns or be a datum: say "
            "header=True or False (--header or --no-header)"
        )
    return False


def _has_index(name: str, names: list[str] | None, rows: list[list[str]]) -> bool:
    """Whether the first column numbers or names the rows; a ValueError where both make sense."""
    if not rows or len(rows[0]) < 2:
        return False
    if names is not None and (
        names[0] in ("", "Unnamed: 0") or {len(row) for row in rows} == {len(names) + 1}
    ):
        return True
    column = [row[0] for row in rows if row]
    counts = [[str(i + first) for i in range(len(rows))] for first in (0, 1)]
    if len(rows) > 2 and column in counts:
        which = f" ({names[0]})" if names else ""
        raise ValueError(
            f"the first column of {name}{which} counts the rows, and may be their index or a "
            "feature: say index_col=True or False (--index-col or --no-index-col)"
        )
    return False


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table(path: Path, columns: Columns) -> tuple[np.ndarray, Columns]:
    found = table(path)
    with found.opened(np.dtype(np.float64)) as part_of:
        parts = [rows for part in range(len(found.parts)) for rows in part_of(part)]
    return np.concatenate([np.empty((0, found.size)), *parts]), columns


_READERS = {".npy": _npy, ".npz": _npz, ".csv": _csv} | dict.fromkeys(TABLES, _table)
