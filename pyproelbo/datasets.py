"""Data as float tensors (N, D): scikit-learn's digits, files, minibatches of them."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._processes import TrainingProcesses, all_processes


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


class Columns(NamedTuple):
    """The parts of a ``.csv`` file that are not data; None to infer them from the file.

    Attributes:
        header: whether its first line has the names of the columns.
        index_col: whether its first column has the names or numbers of the rows.
    """

    header: bool | None = None
    index_col: bool | None = None


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
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{path.name} holds no data: give it one row for each datum")
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise ValueError(f"{path.name} holds {array.dtype}, not numbers: encode them as numbers")
    if np.iscomplexobj(array):
        raise ValueError(f"{path.name} holds complex numbers: save their two parts separately")
    shape = array.shape[1:] or (1,)
    x = _tensor(array.reshape(len(array), -1))
    bad = (~x.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{path.name} holds NaN or infinite numbers in {len(bad)} of {len(x)} rows (the first "
            f"is row {bad[0]}, counted from 0): remove those rows, or fill them in"
        )
    return Data(x, shape), columns


class Minibatches:
    """Minibatches of the rows of a tensor, in a new random order in each epoch.

    The order depends only on ``seed`` and the epoch, and ``state_dict`` records the position:
    training resumes exactly, even within an epoch. Lightning's Trainer makes the calls for that. An
    interrupted epoch starts again when iterated again.

    >>> batches = Minibatches(torch.arange(5.0), batch_size=2, seed=0)
    >>> len(batches), sum(len(batch) for batch in batches)
    (3, 5)

    Args:
        x: (N, ...).
        batch_size: rows per batch; the last batch of an epoch has the remainder.
        distributed: whether the P processes of ``torch.distributed`` share the rows, as for
            training by DDP. Then the batches of all processes together are those of one process
            with P ``batch_size``: no row is repeated or left out, and all have equally many
            batches. A remainder of fewer than P rows is part of the batch before.

    Raises:
        ValueError: for a ``batch_size`` below 1; if there are fewer rows than processes.
    """

    batch_sampler = None  # Lightning asks validation loaders with a sampler for it

    def __init__(
        self, x: Tensor, batch_size: int, *, seed: int = 0, distributed: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}")
        self.x, self.batch_size, self.seed, self.distributed = x, batch_size, seed, distributed
        self._epoch, self._batch, self._resumes = 0, 0, False

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = self._epoch, self._batch if self._resumes else 0
        self._resumes = False
        # Numpy mixes the two numbers well, whereas torch's generator takes a single one.
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
        rank, num = self._processes.rank, self._processes.number
        rows = torch.from_numpy(order).to(self.x.device)
        batches = [rows[rank::num] for rows in rows.tensor_split(self._starts()[1:])]
        for i, batch in enumerate(batches[first:], start=first + 1):
            # Before the yield: the caller may not return after the last batch.
            self._epoch, self._batch = (epoch, i) if i < len(self) else (epoch + 1, 0)
            yield self.x[batch]

    @property
    def sampler(self) -> "Minibatches":
        """Itself: Lightning sets the epoch of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        if epoch != self._epoch:
            self._epoch, self._resumes = epoch, False

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and the number of its batches already returned."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration continue from :meth:`state_dict`, with the remaining batches."""
        self._epoch, self._batch, self._resumes = state["epoch"], state["batch"], True

    @property
    def _processes(self) -> TrainingProcesses:
        return all_processes() if self.distributed else TrainingProcesses()

    def _starts(self) -> list[int]:
        """The first row of each batch of all processes together."""
        num = self._processes.number
        if len(self.x) < num > 1:
            raise ValueError(f"x has {len(self.x)} rows, too few for {num} processes")
        # so that the last batch has a row for each of them
        return list(range(0, len(self.x) - num + 1, num * self.batch_size))


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


_READERS = {".npy": _npy, ".npz": _npz, ".csv": _csv}
