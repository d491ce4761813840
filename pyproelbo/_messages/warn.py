"""Warnings at the line of a user's program that called the library."""

import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_USED = frozenset({"pyro", "torch", "tqdm"})
_STDLIB = sysconfig.get_path("stdlib")
_said_elsewhere = ContextVar("said_elsewhere", default=False)


@contextmanager
def said_elsewhere(is_so: bool = True) -> Iterator[None]:
    """Leave out the library's warnings, where another process that does the same gives them."""
    token = _said_elsewhere.set(is_so)
    try:
        yield
    finally:
        _said_elsewhere.reset(token)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the first caller that is neither of this package, of what it uses nor of Python."""
    if _said_elsewhere.get():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inside(filename: str) -> bool:
    if filename.startswith(_own_folders()):
        return True
    if "site-packages" in filename:
        parts = Path(filename).parts
        return not _USED.isdisjoint(parts)
    return filename.startswith((_STDLIB, "<frozen"))


@cache
def _own_folders() -> tuple[str, ...]:
    """The folders of this package, and of models and guides beside it in a checkout."""
    folders = [str(Path(__file__).parents[1])]
    for name in ("pyproelbo.models", "pyproelbo.guides"):
        spec = find_spec(name)
        folders += (spec and spec.submodule_search_locations) or []
    return tuple(os.path.join(folder, "") for folder in folders)
