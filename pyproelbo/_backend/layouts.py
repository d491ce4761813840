"""How tensors lie in memory."""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How the memory of a tensor is laid out."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        """That of ``x``."""
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        """A tensor that is laid out so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
