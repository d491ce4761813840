"""Warnings, as of the line of a user's program that called the library."""

import sys
import warnings
from pathlib import Path

_HERE = str(Path(__file__).parent)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the first caller outside of this package, of Pyro and of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inside(filename: str) -> bool:
    parts = Path(filename).parts
    return filename.startswith(_HERE) or "pyro" in parts or "torch" in parts
