"""Parameters that a training step uses and ``SVI`` does not see."""

import warnings
from collections.abc import Sequence
from typing import Any

from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyproelbo.sequences.opaque import leaves_of


class UntrainedWarning(UserWarning):
    """``SVI`` does not train a parameter that the loss depends on; the message names it."""


def warn_of_untrained(outputs: Sequence[Tensor], *programs: Any) -> None:
    """Warn of parameters that ``outputs`` depend on, if SVI has called and does not see them.

    SVI trains what ``pyro.param`` and ``pyro.module`` tell it of, and PyroModules, which do that
    by themselves; of two by one name it trains the first. Other callers have their parameters
    from elsewhere.

    Args:
        programs: model and guide; if they are modules they know the names of their parameters.
    """
    traces = (m for m in _PYRO_STACK if isinstance(m, TraceMessenger) and m.param_only)
    svi = next(traces, None)
    if svi is None:
        return
    sites: Any = svi.trace.nodes.values()
    trained = {site["value"].unconstrained() for site in sites}
    names = {
        p: f"{type(program).__name__}.{name}"
        for program in programs
        if isinstance(program, nn.Module)
        for name, p in program.named_parameters()
    }
    untrained = [
        names.get(x, f"one of shape {tuple(x.shape)}")
        for x in leaves_of(outputs)
        if isinstance(x, nn.Parameter) and x not in trained
    ]
    if untrained:
        warnings.warn(
            f"SVI does not train these parameters: {', '.join(untrained)}. Pyro has to know the "
            "module that has them by a name that no other has, or has had since "
            "pyro.clear_param_store(): make it a PyroModule of that name, or call "
            "pyro.module(name, module) in the program that uses it; if they should stay as they "
            "are, call module.requires_grad_(False)",
            UntrainedWarning,
            stacklevel=4,
        )
