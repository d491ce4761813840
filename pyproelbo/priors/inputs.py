"""Initial pseudo-inputs: functions of their number K that return them, (K, *S)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomInputs:
    """Draws from N(loc, scale^2), of a given shape.

    Args:
        shape: S, the shape of one input.
    """

    shape: tuple[int, ...]
    loc: float = 0.0
    scale: float = 1.0

    def __call__(self, num: int) -> Tensor:
        """K = ``num`` draws, (K, *S)."""
        return self.loc + self.scale * torch.randn(num, *self.shape)


@dataclass(frozen=True, eq=False)
class _FromData:
    """Inputs like the data, (N, *S), which are checked."""

    data: Tensor

    def __post_init__(self) -> None:
        data = self.data
        if data.dim() < 1 or len(data) == 0:
            raise ValueError(f"data should have at least one row, got shape {tuple(data.shape)}")
        if not data.is_floating_point():
            raise ValueError(
                f"data should be of floating point, got {data.dtype}: call data.float()"
            )
        if not data.isfinite().all():
            raise ValueError("data should be finite: remove or fill in rows with NaN first")


class RowsOf(_FromData):
    """Data chosen at random, each at most once, as in Tomczak & Welling (2018).

    Args:
        data: (N, *S).
    """

    def __call__(self, num: int) -> Tensor:
        """K = ``num`` rows, (K, *S), in random order."""
        if num > len(self.data):
            raise ValueError(
                f"num_components={num} is more than the {len(self.data)} data: take fewer, or let "
                "MomentsOf(data) draw them"
            )
        return self.data[torch.randperm(len(self.data), device=self.data.device)[:num]]


class MomentsOf(_FromData):
    """Draws from N(mean, std^2) of the data, separately for each feature.

    Args:
        data: (N, *S).
    """

    def __call__(self, num: int) -> Tensor:
        """K = ``num`` draws, (K, *S), on the data's device and in their dtype."""
        std, mean = torch.std_mean(self.data, 0, correction=0)
        return mean + std * torch.randn(num, *mean.shape, dtype=mean.dtype, device=mean.device)
