"""What a step depends on besides the numbers in tensors: what a graph of it takes as given."""

import operator
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class CannotCapture(Exception):
    """Why a step has to run eagerly."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from tensors_in(part)


def refilled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with other tensors in the places of those that it has."""
    if isinstance(value, Tensor):
        return next(tensors)
    parts = [refilled(part, tensors) for part in _parts(value)]
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    if is_dataclass(value):
        return replace(value, **dict(zip(_names(value), parts, strict=True)))  # type: ignore[type-var]
    if isinstance(value, tuple | list):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def structure_of(value: Any) -> Hashable:
    """Equal for arguments that differ in the numbers in their tensors alone.

    Raises:
        CannotCapture: for what is neither a tensor nor compared by value.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *map(structure_of, value)
    if isinstance(value, dict):
        return tuple(value), *map(structure_of, value.values())
    raise CannotCapture(
        f"one of its arguments is a {type(value).__name__}: pass tensors, numbers and strings, "
        "and tuples, lists and dicts of them"
    )


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, dict):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, name) for name in _names(value)]
    return ()


def _names(value: Any) -> list[str]:
    return [field.name for field in fields(value)]


def surroundings() -> Hashable:
    """What operations depend on besides their inputs.

    Raises:
        CannotCapture: within effect handlers, but for the one with which SVI finds parameters.
    """
    for handler in _PYRO_STACK:
        if not (isinstance(handler, TraceMessenger) and handler.param_only):
            raise CannotCapture(f"it runs within the effect handler {type(handler).__name__}")
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return torch.get_default_dtype(), *autocast


class Attribute(NamedTuple):
    """A value that a module holds under a name."""

    module: nn.Module
    held: dict[str, Any]  # the module's parameters, buffers, or all else
    name: str
    value: Any

    def is_same(self) -> bool:
        """Whether it is the same tensor, whatever the numbers in it; of all else, equal."""
        now = self.held.get(self.name)
        if now is self.value:
            return True
        return not isinstance(now, Tensor) and type(now) is type(self.value) and now == self.value

    def restore(self) -> None:
        """Give the module its value back."""
        self.held[self.name] = self.value

    def __str__(self) -> str:
        return f"{type(self.module).__name__}.{self.name}"


class Attributes:
    """The tensors, numbers, modes and names that modules hold now."""

    def __init__(self, modules: Iterable[nn.Module], but_for: Iterable[Attribute] = ()) -> None:
        self.modules = list(dict.fromkeys(modules))
        skipped = {(id(attribute.held), attribute.name) for attribute in but_for}
        self._all = [
            Attribute(module, held, name, value)
            for module in self.modules
            for held in (module._parameters, module._buffers, module.__dict__)
            for name, value in held.items()
            if isinstance(value, (Tensor, *_PLAIN))
            and (id(held), name) not in skipped
            and name not in getattr(module, "_changes_by_itself", ())
        ]
        self._values = [attribute.value for attribute in self._all]
        self._look_up = [(attribute.held.get, attribute.name) for attribute in self._all]

    def are_same(self) -> bool:
        """Whether nothing is another, whatever the numbers in tensors."""
        now = [get(name) for get, name in self._look_up]
        return all(map(operator.is_, now, self._values)) or not self.changed()

    def changed(self) -> list[Attribute]:
        """Those that are not as they were."""
        return [attribute for attribute in self._all if not attribute.is_same()]

    def buffers(self) -> list[Tensor]:
        """The tensors that no gradient changes, but the program may."""
        return [x for x in self._values if isinstance(x, Tensor) and not x.requires_grad]


def modules_in(program: Any) -> Iterator[nn.Module]:
    """The modules that a program is made of, as far as one can see."""
    if isinstance(program, nn.Module):
        yield from program.modules()
    elif isinstance(program, partial):
        yield from modules_in(program.func)
    elif hasattr(program, "__self__"):
        yield from modules_in(program.__self__)
    elif hasattr(program, "__wrapped__"):
        yield from modules_in(program.__wrapped__)
