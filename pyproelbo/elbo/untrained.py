"""Parameters that a training step uses and Pyro does not know."""

from collections.abc import Iterator, Sequence

import pyro
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyproelbo._backend.autograd import some_leaves_of
from pyproelbo._backend.pyro_private import handlers, sites_of
from pyproelbo._messages.warn import warn
from pyproelbo._terms.nested import tensors_in
from pyproelbo._terms.terms import Terms


class UntrainedWarning(UserWarning):
    """A parameter that the loss depends on is not trained; the message names it."""


def has_graph(terms: Terms) -> bool:
    """Whether any of the terms' tensors has a gradient."""
    return any(x.requires_grad for x in tensors_in(terms))


def _parameters(trace: Trace) -> Iterator[Tensor]:
    for node in sites_of(trace).values():
        value = node["value"]
        unconstrained = getattr(value, "unconstrained", None)
        yield value if unconstrained is None else unconstrained()


def warn_of_untrained(outputs: Sequence[Tensor], *programs: object) -> None:
    """Warn of parameters that ``outputs`` depend on and Pyro does not know, if called by SVI.

    SVI trains what ``pyro.param`` and ``pyro.module`` register, and PyroModules, which register
    themselves; of two with one name it trains the first. Pyro knows what ``poutine.block`` hides
    from SVI. Other callers get their parameters elsewhere.

    Args:
        programs: model and guide; if they are modules, they give the names of their parameters.
    """
    seen_by = [m for m in handlers() if isinstance(m, TraceMessenger) and m.param_only]
    if not seen_by:
        return
    # Parameters that are local to modules are not in the store.
    seen = {id(x) for handler in seen_by for x in _parameters(handler.trace)}
    store = pyro.get_param_store()
    names = {
        p: f"{type(program).__name__}.{name}"
        for program in programs
        if isinstance(program, nn.Module)
        for name, p in program.named_parameters()
    }
    untrained = [
        names.get(x, f"one of shape {tuple(x.shape)}")
        for x in some_leaves_of(outputs)
        if isinstance(x, nn.Parameter) and store.param_name(x) is None and id(x) not in seen
    ]
    if untrained:
        warn(
            f"SVI does not train these parameters: {', '.join(untrained)}. Pyro must know their "
            "module by a name that no other module has, or has had since "
            "pyro.clear_param_store(): make it a PyroModule of that name, or call "
            "pyro.module(name, module) in the program that uses it; if they should stay fixed, "
            "call module.requires_grad_(False)",
            UntrainedWarning,
        )
