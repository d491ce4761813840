"""Running programs for a report: nothing of theirs changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import pyro
from pyro import poutine
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyproelbo._distributions.sharing import sharing

# What the report at hand has found of its programs, by a name; None where there is none.
report: ContextVar[dict[str, Any] | None] = ContextVar("report", default=None)


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Every module in eval mode; then each, and Pyro's parameter store, as it was.

    Those that a program calls are found when they are called, wherever it has them from. No
    parameter should change meanwhile (:mod:`pyproelbo._distributions.sharing`). What is within is
    one report: it says nothing twice.
    """
    store, modes = pyro.get_param_store(), dict[nn.Module, bool]()
    names = set(store.keys())

    def evaluate(module: nn.Module, *_: Any) -> None:
        if module not in modes:
            modes[module] = module.training
            module.training = False

    for program in programs:
        for module in modules_of(program):
            evaluate(module)
    hook = register_module_forward_pre_hook(evaluate)
    token = report.set({} if report.get() is None else report.get())
    try:
        with sharing():
            yield
    finally:
        report.reset(token)
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for name in set(store.keys()) - names:
            del store[name]


def modules_of(program: Any) -> list[nn.Module]:
    """The modules that a program is made of: itself, or that of which it is a method."""
    program = poutine.unwrap(program)
    while isinstance(program, partial):
        program = poutine.unwrap(program.func)
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    return list(owner.modules()) if isinstance(owner, nn.Module) else []
