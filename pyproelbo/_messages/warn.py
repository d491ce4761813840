"""Warnings, as of the line of a user's program that called the library."""

import sys
import sysconfig
import warnings
from pathlib import Path

_HERE = str(Path(__file__).parents[1])
_STDLIB = sysconfig.get_path("stdlib")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the first caller that is neither of this package, of Pyro, of torch nor of Python."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inside(filename: str) -> bool:
    if "site-packages" in filename:
        parts = Path(filename).parts
        return "pyro" in parts or "torch" in parts or filename.startswith(_HERE)
    return filename.startswith((_HERE, _STDLIB, "<frozen"))
