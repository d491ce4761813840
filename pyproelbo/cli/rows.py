"""The rows of data: one tensor, or several by the programs' names for them."""

from typing import overload

from torch import Tensor

Rows = Tensor | dict[str, Tensor]
Index = Tensor | slice | list[int]


def features(data: Rows) -> Tensor:
    """The data of the likelihood: (N, ...)."""
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
