"""Values with tensors in them: tuples, lists, dicts, dataclasses and namespaces, nested."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from operator import is_
from types import SimpleNamespace
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts, dataclasses and namespaces."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in parts_of(value):
            yield from tensors_in(part)


def refilled(value: T, tensors: Iterator[object]) -> T:
    """``value`` with other tensors in the places of those that it has."""
    mapped = _mapped(value, lambda x: next(tensors) if isinstance(x, Tensor) else x)
    return mapped  # type: ignore[return-value]


def with_numbers(value: T, number: Callable[[float], object]) -> T:
    """``value`` with ``number(x)`` in the place of each Python float x."""
    mapped = _mapped(value, lambda x: number(x) if isinstance(x, float) else x)
    return mapped  # type: ignore[return-value]


def _mapped(value: object, function: Callable[[object], object]) -> object:
    """``value`` with ``function`` of its innermost parts; itself where these are as before."""
    names, before = names_of(value), list(parts_of(value))
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


def parts_of(value: object) -> Iterable[object]:
    """The parts of a value; empty if it has none."""
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, dict):
        return value.values()
    return [getattr(value, name) for name in names_of(value)]


def names_of(value: object) -> list[str]:
    """The names of the parts of a dataclass or a namespace."""
    if isinstance(value, Namespace | SimpleNamespace):
        return list(vars(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in fields(value)]
    return []
