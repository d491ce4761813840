"""Separate memory for what is kept from each batch."""

from typing import TypeVar

import torch
from torch import Tensor

from pyproelbo._terms.nested import refilled, tensors_in

T = TypeVar("T")

_BLOCK = 2**20  # bytes
_ALIGNED = 64


class Shelf:
    """Blocks of memory that hold many small tensors.

    Small tensors that stay, made between large ones that are freed, would fragment the freed
    memory, and the next large ones would need new memory: megabytes for each kilobyte that is kept.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def kept(self, value: T) -> T:
        """The same with its tensors in the blocks, except large ones and those on other devices.

        Args:
            value: of tuples, lists, dicts and dataclasses.
        """
        return refilled(value, map(self._kept, tensors_in(value)))

    def _kept(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        is_plain = x.device.type == "cpu" and x.layout == torch.strided and not x.requires_grad
        if not is_plain or size > _BLOCK // 4:
            return x
        if size > len(self._free):
            self._free = torch.empty(_BLOCK, dtype=torch.uint8, device="cpu")
        place = self._free[:size].view(x.dtype).view(x.shape)
        self._free = self._free[-(-size // _ALIGNED) * _ALIGNED :]
        return place.copy_(x)
