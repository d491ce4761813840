"""Where in a user's program an error came up."""

import linecache
from pathlib import Path
from traceback import walk_tb

import pyro
import torch

_PACKAGE = Path(__file__).parent.parent
_LIBRARIES = [Path(str(module.__file__)).parent for module in (torch, pyro)]


def location(error: BaseException) -> str:
    """The innermost line that is no library's, with the sample site around it, if any."""
    site, line = "", ""
    for frame, number in walk_tb(error.__traceback__):
        code = frame.f_code
        if code is pyro.sample.__code__:
            site = f" at site {frame.f_locals['name']!r}"
        elif Path(code.co_filename).exists() and not _is_library(Path(code.co_filename)):
            text = linecache.getline(code.co_filename, number).strip()
            line = f" in {Path(code.co_filename).name}, line {number}: {text}"
    return site + line


def _is_library(path: Path) -> bool:
    if path.is_relative_to(_PACKAGE):
        return path.relative_to(_PACKAGE).parts[0] not in ("models", "guides")
    return any(path.is_relative_to(library) for library in _LIBRARIES)
