"""Running programs for a report without changing their state or outer random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import pyro
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyproelbo._backend import rng
from pyproelbo._distributions.sharing import sharing
from pyproelbo._rows.modules import modules_of
from pyproelbo._rows.shared_parameters import warn_of_shared_parameters


class Setting(NamedTuple):
    """What a report runs its programs in, which another process can set up again.

    Attributes:
        programs, seed: of :func:`evaluating`.
        is_constant: whether the parameters take no gradients (:func:`constant`).
    """

    programs: tuple[object, ...]
    seed: int | None
    is_constant: bool = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within this context the programs run in the same way."""
        with evaluating(*self.programs, seed=self.seed):
            if not self.is_constant:
                yield
                return
            with constant(*self.programs):
                yield


_setting: ContextVar[Setting | None] = ContextVar("setting", default=None)


def setting() -> Setting | None:
    """That of the current report; None where none is being made."""
    return _setting.get()


# What the current report has found about its programs, by name; None where there is none.
report: ContextVar[dict[str, object] | None] = ContextVar("report", default=None)


@contextmanager
def evaluating(*programs: object, seed: int | None = None) -> Iterator[None]:
    """Every module in eval mode, without gradients; everything is restored afterwards.

    Modules that a program calls are found when they are called, wherever they come from. Pyro's
    parameter store keeps its contents, and all random number generators are put aside. No parameter
    should change meanwhile (:mod:`pyproelbo._distributions.sharing`). The context is one report,
    which repeats no note.

    Args:
        seed: for the generators; None to let them continue.
    """
    modes = dict[nn.Module, bool]()

    def evaluate(module: nn.Module, *_: object) -> None:
        if module not in modes:
            modes[module] = module.training
            module.training = False

    for program in programs:
        for module in modules_of(program):
            evaluate(module)
    hook = register_module_forward_pre_hook(evaluate)
    is_whole = report.get() is None
    token = report.set({} if is_whole else report.get())
    around = _setting.set(Setting(programs, seed))
    try:
        with store_put_back(), sharing(), torch.no_grad(), rng.put_aside(seed):
            yield
            if is_whole:
                warn_of_shared_parameters(*programs)
    finally:
        _setting.reset(around)
        report.reset(token)
        hook.remove()
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def store_put_back() -> Iterator[None]:
    """Restore the parameters of Pyro's store afterwards, and remove new ones."""
    store = pyro.get_param_store()
    state = store.get_state()
    try:
        yield
    finally:
        store.clear()
        store.set_state(state)


@contextmanager
def constant(*programs: object) -> Iterator[None]:
    """The parameters of modules take no gradients meanwhile."""
    learned = {
        parameter
        for program in programs
        for module in modules_of(program)
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    for parameter in learned:
        parameter.requires_grad_(False)
    around = _setting.get()
    token = _setting.set(None if around is None else around._replace(is_constant=True))
    try:
        yield
    finally:
        _setting.reset(token)
        for parameter in learned:
            parameter.requires_grad_(True)
