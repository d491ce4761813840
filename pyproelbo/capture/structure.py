"""The structure of a step's arguments: all but the numbers in their tensors."""

from collections.abc import Hashable
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from pyproelbo._terms.nested import names_of, parts_of

PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), range, Enum, np.generic),
    *(torch.dtype, torch.device, torch.Size),
)


class CannotCapture(Exception):
    """Why a step must run eagerly."""


def structure_of(value: object) -> Hashable:
    """Equal for arguments that differ only in the numbers in their tensors.

    Raises:
        CannotCapture: for what is neither a tensor nor compared by value.
    """
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout == torch.strided else value.layout
        return value.shape, stride, value.dtype, value.device, value.requires_grad
    if isinstance(value, tuple | list):
        return type(value), *map(structure_of, value)
    if isinstance(value, dict):
        return tuple(value), *map(structure_of, value.values())
    if isinstance(value, PLAIN):
        return type(value), value
    if names_of(value):
        return type(value), tuple(names_of(value)), *map(structure_of, parts_of(value))
    raise CannotCapture(
        f"one of its arguments is a {type(value).__name__}: pass tensors, numbers and strings, "
        "and tuples, lists, dicts, dataclasses and namespaces of them, and bind all else to model "
        "and guide once, before the first step: functools.partial(model, ...)"
    )
