"""The processes of ``torch.distributed`` that train together; one process where there are none."""

from typing import TypeVar

import torch
from torch import Tensor, distributed

Value = TypeVar("Value")


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """The index of this process, from 0."""
    return distributed.get_rank() if _are_several() else 0


def number() -> int:
    """How many they are."""
    return distributed.get_world_size() if _are_several() else 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, of tensors of one shape."""
    if number() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def gathered(value: Value) -> list[Value]:
    """What each process gives, in the order of their ranks."""
    if number() == 1:
        return [value]
    values: list = [None] * number()
    distributed.all_gather_object(values, value)
    return values


def weighted_mean(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over all processes, and this process's weight.

    Args:
        values: (K,) of this process.
        weight: its weight, a scalar of any unit.

    Returns:
        The means (K,); and the weight in the unit in which its mean over the processes is 1.
    """
    if number() == 1:
        return values, torch.ones_like(weight)
    sums = total(torch.cat([values * weight, weight[None]]))
    return sums[:-1] / sums[-1], weight * number() / sums[-1]
