"""The place of an error in a user's program."""

import linecache
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from traceback import walk_tb
from types import CodeType, FrameType

import pyro
import torch

from pyproelbo._terms import traces
from pyproelbo._terms.divergences import Divergences

_PACKAGE = Path(__file__).parent.parent
_LIBRARIES = [Path(str(module.__file__)).parent for module in (torch, pyro)]
_DENSITIES = (traces._compute_log_prob.__code__, traces._compute_score_parts.__code__)


def location(error: BaseException, lines: Mapping[str, str]) -> str:
    """The sample site around an error, and the innermost line outside libraries, if any.

    Args:
        lines: of sites reached so far, for errors in their densities.
    """
    site, line = "", ""
    for frame, number in walk_tb(error.__traceback__):
        code, known = frame.f_code, frame.f_locals
        if code is pyro.sample.__code__ or code in _DENSITIES:
            site = known["name"]
        elif code is Divergences.__call__.__code__:
            site = known["group"].key
        elif _is_program(code):
            line = _text(code, number)
    where = f" at site {site!r}" if site else ""
    return where + (line or lines.get(site, ""))


def line_of_caller() -> str:
    """The innermost line of the program that calls this, if not in a library."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if _is_program(frame.f_code):
            return _text(frame.f_code, frame.f_lineno)
        if frame.f_code.co_filename == traces.__file__:
            return ""
        frame = frame.f_back
    return ""


def _text(code: CodeType, number: int) -> str:
    text = linecache.getline(code.co_filename, number).strip()
    return f" in {Path(code.co_filename).name}, line {number}: {text}"


def _is_program(code: CodeType) -> bool:
    return _is_file_of_program(code.co_filename)


@lru_cache(maxsize=1000)
def _is_file_of_program(name: str) -> bool:
    path = Path(name)
    if path.is_relative_to(_PACKAGE):
        return path.relative_to(_PACKAGE).parts[0] in ("models", "guides")
    return path.exists() and not any(path.is_relative_to(library) for library in _LIBRARIES)
