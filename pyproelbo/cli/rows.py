"""The rows of data: of one tensor, or of several, by the names that programs call them."""

from typing import Any

from torch import Tensor

Rows = Tensor | dict[str, Tensor]


def features(data: Rows) -> Tensor:
    """What the likelihood is of: (N, ...)."""
    return data if isinstance(data, Tensor) else data["x"]


def take(data: Rows, rows: Any) -> Any:
    """Some of the rows."""
    if isinstance(data, Tensor):
        return data[rows]
    return {name: value[rows] for name, value in data.items()}
