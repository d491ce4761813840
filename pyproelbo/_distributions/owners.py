"""The classes that define a distribution's methods: a subclass may differ from its base.

A truncated Normal overrides ``log_prob``, a straight-through one ``rsample``. What is known about a
class holds for an instance only if the relevant methods are that class's own.
"""

from collections.abc import Iterator
from functools import cache
from typing import TypeGuard, TypeVar

T = TypeVar("T")

DRAWING = ("__call__", "rsample", "sample")
DENSITY = ("log_prob",)


def keeps(
    d: object, base: type[T], methods: tuple[str, ...] = (*DRAWING, *DENSITY)
) -> TypeGuard[T]:
    """Whether ``d`` is a ``base`` with ``base``'s own versions of these methods."""
    return class_keeps(type(d), base, methods) and has_only_class_methods(d, methods)


def has_only_class_methods(d: object, methods: tuple[str, ...] = (*DRAWING, *DENSITY)) -> bool:
    """Whether an instance overrides none of these methods itself."""
    own = vars(d)
    return not any(name in own for name in methods)


def owner(cls: type, method: str) -> type:
    """The class that defines a method of ``cls``.

    Where Pyro redefines a method of one of torch's distributions, torch's class.
    """
    classes = cls.__mro__
    found = next((c for c in classes if method in vars(c)), object)
    if found.__module__.startswith("pyro.distributions."):
        return next((c for c in _of_torch(classes) if c.__name__ == found.__name__), found)
    return found


def _of_torch(classes: tuple[type, ...]) -> Iterator[type]:
    return (c for c in classes if c.__module__.startswith("torch.distributions."))


@cache  # these classes check instances in Python
def class_keeps(cls: type, base: type, methods: tuple[str, ...] = (*DRAWING, *DENSITY)) -> bool:
    """Whether a class is a ``base`` with ``base``'s own versions of these methods."""
    if not issubclass(cls, base):
        return False
    return all(_is_common(owner(cls, m)) or issubclass(base, owner(cls, m)) for m in methods)


def _is_common(cls: type) -> bool:
    """Whether this is what Pyro adds to all distributions of torch."""
    return cls.__name__ == "TorchDistributionMixin"
