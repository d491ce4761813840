"""What has been found out of some programs, for as long as they are those programs."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Known(NamedTuple, Generic[T]):
    """A value that belongs to programs, which it does not keep alive.

    Methods are told by their object, for each access to one makes it anew; other programs by
    themselves, and not by their hash, which another has once they are gone.
    """

    value: T
    programs: tuple[Callable[[], Any], ...]

    @classmethod
    def of(cls, value: T, *programs: Any) -> "Known[T]":
        return cls(value, tuple(map(_reference, programs)))

    def is_of(self, *programs: Any) -> bool:
        """Whether these are the programs that it belongs to."""
        pairs = zip(self.programs, programs, strict=True)
        return all(_is_same(known(), program) for known, program in pairs)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy elsewhere knows nothing yet


def _reference(program: Any) -> Callable[[], Any]:
    return weakref.WeakMethod(program) if _is_method(program) else weakref.ref(program)


def _is_same(known: Any, program: Any) -> bool:
    return known is not None and (known is program or (_is_method(known) and known == program))


def _is_method(program: Any) -> bool:
    return hasattr(program, "__self__") and hasattr(program, "__func__")
