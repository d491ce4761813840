"""Separate memory for what is kept from each batch."""

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyproelbo._terms.nested import refilled, tensors_in

T = TypeVar("T")

_BLOCK = 2**20  # bytes, of the first block
_LARGEST = 2**26  # which returns to the system when it is freed
_ALIGNED = 64


class Shelf:
    """Blocks of memory that hold many small tensors, those of a column together.

    A column has the first tensor of each value, or the second, and so on. Small tensors that stay,
    made between large ones that are freed, would fragment the freed memory, and the next large ones
    would need new memory: megabytes for each kilobyte that is kept.
    """

    def __init__(self) -> None:
        self._free: dict[int, Tensor] = {}  # by column
        self._next: dict[int, int] = {}  # the size of its next block

    def kept(self, value: T) -> T:
        """The same with its tensors in the blocks, except large ones and those on other devices.

        Args:
            value: of tuples, lists, dicts and dataclasses.
        """
        return refilled(value, (self._kept(i, x) for i, x in enumerate(tensors_in(value))))

    def _kept(self, column: int, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        is_plain = x.device.type == "cpu" and x.layout == torch.strided and not x.requires_grad
        if not is_plain or size > _BLOCK // 4:
            return x
        free = self._free.get(column)
        if free is None or size > len(free):
            num = self._next.get(column, _BLOCK)
            self._next[column] = min(2 * num, _LARGEST)
            free = torch.empty(num, dtype=torch.uint8, device="cpu")
        self._free[column] = free[-(-size // _ALIGNED) * _ALIGNED :]
        return free[:size].view(x.dtype).view(x.shape).copy_(x)


def columns_of(parts: Iterable[Iterable[T]]) -> list[list[T]]:
    """The first of each part, the second of each part, and so on."""
    return [list(column) for column in zip(*parts, strict=True)]


def columns_joined(columns: list[list[Any]]) -> list[Any]:
    """The tensors or arrays of each column as one.

    The columns are let go one after the other: where nobody else holds the parts, only one of them
    is in memory twice.

    Args:
        columns: is emptied.
    """
    found = []
    while columns:
        column = columns.pop(0)
        found.append(torch.cat(column) if torch.is_tensor(column[0]) else np.concatenate(column))
    return found
