"""What a PyroModule keeps within a call: a sample of its own, by the site's name, is made once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

from pyro.nn import PyroModule, pyro_method
from torch import Tensor

# within these a PyroModule keeps what it has sampled
_CALL = PyroModule.__call__.__code__
(_METHOD,) = (code for code in pyro_method.__code__.co_consts if isinstance(code, CodeType))


Kept = list[tuple[dict[str, Tensor], dict[str, Tensor]]]  # what modules keep, and a copy of it


def kept() -> Kept:
    """What the PyroModules that are being called keep now."""
    caches = [module._pyro_context.cache for module in called_modules()]
    return [(cache, dict(cache)) for cache in caches]


def restore(before: Kept) -> None:
    """Let them keep what they did, and nothing else."""
    for cache, was in before:
        cache.clear()
        cache.update(was)


def samples_kept() -> list[tuple[PyroModule, list[str]]]:
    """The PyroModules that are being called, and the sites of which they keep samples."""
    return [(module, list(module._pyro_context.cache)) for module in called_modules()]


@contextmanager
def samples_forgotten() -> Iterator[None]:
    """The PyroModules that are being called keep no sample that is made here."""
    before = kept()
    try:
        yield
    finally:
        restore(before)


def called_modules() -> list[PyroModule]:
    """The PyroModules that are being called, from the innermost."""
    frame: FrameType | None = sys._getframe()
    modules: list[PyroModule] = []
    while frame is not None:
        code = frame.f_code
        if code is _CALL or code is _METHOD:
            modules.append(frame.f_locals["self"])
        frame = frame.f_back
    return modules
