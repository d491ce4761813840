"""The rows of data: of one tensor, or of several, by the names that programs call them."""

from typing import overload

from torch import Tensor

Rows = Tensor | dict[str, Tensor]
Index = Tensor | slice | list[int]


def features(data: Rows) -> Tensor:
    """What the likelihood is of: (N, ...)."""
    return data if isinstance(data, Tensor) else data["x"]


@overload
def take(data: Tensor, rows: Index) -> Tensor: ...


@overload
def take(data: dict[str, Tensor], rows: Index) -> dict[str, Tensor]: ...


def take(data: Rows, rows: Index) -> Rows:
    """Some of the rows."""
    if isinstance(data, Tensor):
        return data[rows]
    return {name: value[rows] for name, value in data.items()}
