"""Data as float tensors (N, D): scikit-learn's digits, files, minibatches of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Data(NamedTuple):
    """Data as models take them, and how one datum looked before.

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


def load(path: str | Path) -> Data:
    """Data of a file, one datum a row.

    Args:
        path: ``.npy``, ``.npz`` with one array in it, or ``.csv`` with commas between numbers
            and perhaps a line of names at its top. Images (N, H, W, ...) become rows (N, D).

    Raises:
        ValueError: if there is no such file, its suffix is another, it is empty, or holds
            anything but finite real numbers; the message says what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: check its name and folder")
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path.name} should end in {', '.join(_READERS)}: save the data as one of them, "
            "with numpy.save for example"
        )
    array = _READERS[path.suffix](path)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{path.name} holds no data: give it one row for each datum")
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise ValueError(f"{path.name} holds {array.dtype}, not numbers: encode them as numbers")
    if np.iscomplexobj(array):
        raise ValueError(f"{path.name} holds complex numbers: give real and imaginary parts apart")
    shape = array.shape[1:] or (1,)
    x = _tensor(array.reshape(len(array), -1))
    bad = (~x.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{path.name} holds NaN or infinite numbers in {len(bad)} of {len(x)} rows (the first "
            f"is row {bad[0]}, counted from 0): remove those rows, or fill them in"
        )
    return Data(x, shape)


class Minibatches:
    """Minibatches of the rows of a tensor, in a new random order in each epoch.

    The order depends on ``seed`` and the epoch only, and ``state_dict`` says where one is, so
    that training resumes exactly, within an epoch, too: Lightning's Trainer calls what it needs
    for that. An epoch that is broken off starts anew when iterated again. This is for one
    process; with several, use a ``torch.utils.data.DataLoader``, whose sampler Lightning
    distributes.

    >>> batches = Minibatches(torch.arange(5.0), batch_size=2, seed=0)
    >>> len(batches), sum(len(batch) for batch in batches)
    (3, 5)

    Args:
        x: (N, ...).
        batch_size: rows a batch; the last of an epoch has what is left.
    """

    def __init__(self, x: Tensor, batch_size: int, *, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}")
        self.x, self.batch_size, self.seed = x, batch_size, seed
        self._epoch, self._batch, self._resumes = 0, 0, False

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = self._epoch, self._batch if self._resumes else 0
        self._resumes = False
        # Numpy mixes the two numbers well, whereas torch's generator takes a single one.
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
        batches = torch.from_numpy(order).to(self.x.device).split(self.batch_size)
        for i, batch in enumerate(batches[first:], start=first + 1):
            # Before the yield: who has taken the last batch may not come back.
            self._epoch, self._batch = (epoch, i) if i < len(self) else (epoch + 1, 0)
            yield self.x[batch]

    @property
    def sampler(self) -> "Minibatches":
        """Itself: Lightning sets the epoch of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of an epoch, counted from 0."""
        if epoch != self._epoch:
            self._epoch, self._resumes = epoch, False

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._batch, self._resumes = state["epoch"], state["batch"], True


def _tensor(array: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        values = torch.from_numpy(array.astype(np.float64))
    return values.to(torch.get_default_dtype())


def _npy(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path.name} is no readable array of numbers: save it with numpy.save"
        ) from error


def _npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            if len(names) == 1:
                return file[names[0]]
    except Exception as error:  # zip files break in many ways
        raise ValueError(
            f"{path.name} is no readable archive of arrays of numbers: save it with numpy.savez"
        ) from error
    raise ValueError(
        f"{path.name} should hold one array, but holds {len(names)} ({', '.join(names)}): save the "
        "one to fit with numpy.save"
    )


def _csv(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    if lines and not any(_is_number(entry) for entry in lines[0].split(",")):
        lines = lines[1:]  # names of columns
    rows = [line.split(",") for line in lines]
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path.name} has {len(row)} columns in data row {i}, but {len(rows[0])} in row 0: "
                "give all rows the same number, separated by commas"
            )
        for entry in row:
            if not _is_number(entry):
                raise ValueError(
                    f"{path.name} holds {entry.strip()!r} in data row {i}, which is no number: "
                    "encode it as one, or remove its column"
                )
    return np.array(rows, dtype=np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS = {".npy": _npy, ".npz": _npz, ".csv": _csv}
