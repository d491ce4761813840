"""The processes of ``torch.distributed`` that do the same work together."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

Value = TypeVar("Value")


@dataclass(frozen=True)
class TrainingProcesses:
    """Processes that train together; by default this one alone.

    Attributes:
        rank: the index of this process, from 0.
        number: how many they are.
    """

    rank: int = 0
    number: int = 1

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.number > 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, of tensors of one shape."""
        if not self.are_several:
            return values
        values = values.clone()
        distributed.all_reduce(values)
        return values

    def gathered(self, value: Value) -> list[Value]:
        """What each process gives, in the order of their ranks."""
        if not self.are_several:
            return [value]
        values: list = [None] * self.number
        distributed.all_gather_object(values, value)
        return values

    def weighted_mean(self, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over all processes, and this process's weight.

        Args:
            values: (K,) of this process.
            weight: its weight, a scalar of any unit.

        Returns:
            The means (K,); and the weight in the unit in which its mean over the processes is 1.
        """
        sums = self.total(torch.cat([values * weight, weight[None]]))
        return sums[:-1] / sums[-1], weight * self.number / sums[-1]


def all_processes() -> TrainingProcesses:
    """Those of ``torch.distributed``, where it is initialised."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return TrainingProcesses()
    return TrainingProcesses(distributed.get_rank(), distributed.get_world_size())
