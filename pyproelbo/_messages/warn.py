"""Warnings at the line of a user's program that called the library."""

import os
import sys
import sysconfig
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_USED = frozenset({"pyro", "torch", "tqdm"})
_STDLIB = sysconfig.get_path("stdlib")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the first caller that is neither of this package, of what it uses nor of Python."""
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
