"""What has been found out of some programs, for as long as they are those programs."""

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Generic, TypeGuard, TypeVar

T = TypeVar("T")

_MANY = 16  # programs, beyond which the oldest are forgotten


class Known(Generic[T]):
    """Values by programs, which it does not keep alive.

    Methods are told by their object, for each access to one makes it anew; other programs by
    themselves, and not by their hash, which another has once they are gone.
    """

    def __init__(self) -> None:
        self._found: list[tuple[tuple[Callable[[], object], ...], T]] = []

    def of(self, *programs: object) -> T | None:
        """The value of these programs, None where there is none yet."""
        for references, value in self._found:
            known = (reference() for reference in references)
            if all(map(_is_same, known, programs)):
                return value
        return None

    def put(self, value: T, *programs: object) -> T:
        """Keep the value of some programs, and return it."""
        self._found = [*self._found[1 - _MANY :], (tuple(map(_reference, programs)), value)]
        return value

    def __reduce__(self) -> tuple[type["Known"], tuple[()]]:
        return Known, ()  # a copy elsewhere knows nothing yet


def _reference(program: object) -> Callable[[], object]:
    return weakref.WeakMethod(program) if _is_method(program) else weakref.ref(program)


def _is_same(known: object, program: object) -> bool:
    return known is not None and (known is program or (_is_method(known) and known == program))


def _is_method(program: object) -> TypeGuard[MethodType]:
    return hasattr(program, "__self__") and hasattr(program, "__func__")
