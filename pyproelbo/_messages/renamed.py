"""Old names that still work, with a DeprecationWarning at the user's line: kept for one release.

Arguments by :func:`renamed`, attributes by :func:`renamed_attribute`, and what a module defines by
:func:`renamed_members`. The new name is in the signature, in the docstring and in the code; the old
one is only in one of these calls. Remove the call, and the old name is gone.
"""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from pyproelbo._messages.warn import warn

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keywords by their old names too: ``old="new"`` for each.

    It goes above a function, a method or ``__init__``, and below ``classmethod``. The signature is
    unchanged, with only the new names, for ``help`` and for type checkers.

    >>> import warnings
    >>> @renamed(chunk="max_elements")
    ... def halves(x, max_elements=None):
    ...     return max_elements
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     halves(1.0, chunk=3)
    3
    >>> print(caught[0].message)
    chunk= is deprecated: it is called max_elements=

    A value has the same meaning under either name. Where the meaning changes with the name, this is
    not enough. A subclass that passes the old keyword on is warned at that line.

    Raises:
        TypeError: where the function is defined, if it has no argument of the new name, or one of
            the old name; where it is called, if it is given both.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _check_arguments(function, names)

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"give only {new}=: {old}= is its old name, got both")
                    warn(f"{old}= is deprecated: it is called {new}=", DeprecationWarning)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """A property of the old name, which reads and sets the attribute of the new one.

    >>> class Model:
    ...     size = renamed_attribute("size", "dataset_size")
    ...     dataset_size = 5

    It is for attributes that users read or set. Where objects have been pickled with the old
    name, their class's ``__setstate__`` renames it.
    """

    def warn_of(owner: object) -> None:
        name = type(owner).__name__
        warn(f"{name}.{old} is deprecated: it is called {name}.{new}", DeprecationWarning)

    def get(self: object) -> object:
        value = getattr(self, new)  # first: an object without it has no attribute at all
        warn_of(self)
        return value

    def put(self: object, value: object) -> None:
        warn_of(self)
        setattr(self, new, value)

    return property(get, put, doc=f"The old name of ``{new}`` (deprecated).")


def renamed_members(module: str, **names: str) -> Callable[[str], object]:
    """A ``__getattr__`` for a module, which resolves old names of its members.

    ``__getattr__ = renamed_members(__name__, Old="New")``. Importing the old name warns at the
    line that imports it.
    """

    def __getattr__(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        warn(f"{module}.{name} is deprecated: it is called {new}", DeprecationWarning)
        return getattr(sys.modules[module], new)

    return __getattr__


def _check_arguments(function: Callable[..., object], names: dict[str, str]) -> None:
    label = function.__qualname__
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for old, new in names.items():
        if old in parameters:
            raise TypeError(f"{label}() still has the argument {old}, which is declared renamed")
        if new not in parameters and not takes_any:
            raise TypeError(f"{label}() has no argument {new}, as {old} is declared renamed")
