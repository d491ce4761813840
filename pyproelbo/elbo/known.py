"""What has been found out about programs, for as long as they live."""

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Generic, TypeGuard, TypeVar

T = TypeVar("T")

_MANY = 16  # programs, beyond which the oldest are forgotten


class Known(Generic[T]):
    """Values by program, without keeping the programs alive.

    Methods are identified by their object, for each access makes a new method; other programs by
    identity, and not by their hash, which another may have once they are gone.
    """

    def __init__(self) -> None:
        self._found: list[tuple[tuple[Callable[[], object], ...], T]] = []

    def of(self, *programs: object) -> T | None:
        """The value for these programs, None where there is none yet."""
        for references, value in self._found:
            known = (reference() for reference in references)
            if all(map(_is_same, known, programs)):
                return value
        return None

    def put(self, value: T, *programs: object) -> T:
        """Keep the value for some programs, and return it."""
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
