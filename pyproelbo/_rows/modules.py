"""The modules of a program."""

from functools import partial

from pyro import poutine
from torch import nn


def modules_of(program: object) -> list[nn.Module]:
    """The modules of a program: itself, or the one of which it is a method."""
    program = poutine.unwrap(program)  # type: ignore[arg-type]
    while isinstance(program, partial):
        program = poutine.unwrap(program.func)
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    return list(owner.modules()) if isinstance(owner, nn.Module) else []
