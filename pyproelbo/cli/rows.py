"""The rows of data: one tensor, several by the programs' names for them, or files."""

import math
from typing import overload

from torch import Tensor

from pyproelbo.datasets import Files

InMemory = Tensor | dict[str, Tensor]
Rows = InMemory | Files
Index = Tensor | slice | list[int]


def features(data: InMemory) -> Tensor:
    """The data of the likelihood: (N, ...)."""
    return data if isinstance(data, Tensor) else data["x"]


def num_rows(data: Rows) -> int:
    """N."""
    return data.num_data if isinstance(data, Files) else len(features(data))


@overload
def take(data: Tensor, rows: Index) -> Tensor: ...


@overload
def take(data: dict[str, Tensor], rows: Index) -> dict[str, Tensor]: ...


def take(data: InMemory, rows: Index) -> InMemory:
    """Some of the rows."""
    if isinstance(data, Tensor):
        return data[rows]
    return {name: value[rows] for name, value in data.items()}


def some(data: Rows, num: int, seed: int) -> InMemory:
    """``num`` of the rows: the first, which are in random order; of files a random sample."""
    return data.sample(num, seed) if isinstance(data, Files) else take(data, slice(num))


def extent(data: Rows) -> tuple[float, float]:
    """The least and the largest number.

    Raises:
        ValueError: for numbers in files that are not finite.
    """
    least, most = math.inf, -math.inf
    for part in data if isinstance(data, Files) else (features(data),):
        least, most = min(least, float(part.min())), max(most, float(part.max()))
    return least, most
