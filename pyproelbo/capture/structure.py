"""What the arguments of a step are, but for the numbers in their tensors."""

from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from operator import is_
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), range, Enum, np.generic),
    *(torch.dtype, torch.device, torch.Size),
)


class CannotCapture(Exception):
    """Why a step has to run eagerly."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts, dataclasses and namespaces."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from tensors_in(part)


def refilled(value: T, tensors: Iterator[object]) -> T:
    """``value`` with other tensors in the places of those that it has."""
    mapped = _mapped(value, lambda x: next(tensors) if isinstance(x, Tensor) else x)
    return mapped  # type: ignore[return-value]


def with_numbers(value: T, number: Callable[[float], object]) -> T:
    """``value`` with ``number(x)`` in the place of each Python float x."""
    mapped = _mapped(value, lambda x: number(x) if isinstance(x, float) else x)
    return mapped  # type: ignore[return-value]


def structure_of(value: object) -> Hashable:
    """Equal for arguments that differ in the numbers in their tensors alone.

    Raises:
        CannotCapture: for what is neither a tensor nor compared by value.
    """
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout == torch.strided else value.layout
        return value.shape, stride, value.dtype, value.device, value.requires_grad
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *map(structure_of, value)
    if isinstance(value, dict):
        return tuple(value), *map(structure_of, value.values())
    if _names(value):
        return type(value), tuple(_names(value)), *map(structure_of, _parts(value))
    raise CannotCapture(
        f"one of its arguments is a {type(value).__name__}: pass tensors, numbers and strings, "
        "and tuples, lists, dicts, dataclasses and namespaces of them, and bind all else to model "
        "and guide once, before the first step: functools.partial(model, ...)"
    )


def _mapped(value: object, function: Callable[[object], object]) -> object:
    """``value`` with ``function`` of its innermost parts; itself where these are as before."""
    names, before = _names(value), list(_parts(value))
    if not before:
        return function(value)
    parts = [_mapped(part, function) for part in before]
    if all(map(is_, parts, before)):
        return value
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    if isinstance(value, Namespace | SimpleNamespace):
        return type(value)(**dict(zip(names, parts, strict=True)))
    if names:
        return replace(value, **dict(zip(names, parts, strict=True)))  # type: ignore[type-var]
    kind = type(value)
    return kind(*parts) if hasattr(value, "_fields") else kind(parts)  # type: ignore[call-arg]


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, dict):
        return value.values()
    return [getattr(value, name) for name in _names(value)]


def _names(value: object) -> list[str]:
    if isinstance(value, Namespace | SimpleNamespace):
        return list(vars(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in fields(value)]
    return []
