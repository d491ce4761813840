"""Whether this runs within a capture, of ours or of others."""

import sys

import torch


def is_captured() -> bool:
    """Whether this runs inside of torch.compile, of make_fx, or of torch.fx's symbolic tracing.

    What is asked of torch's experimental modules is asked only of those that someone has imported:
    where none has, there is no such capture.
    """
    return (
        torch.compiler.is_compiling()
        or _asked("torch.fx._symbolic_trace", "is_fx_symbolic_tracing", "is_fx_tracing") is True
        or _asked("torch.fx.experimental.proxy_tensor", "get_proxy_mode") is not None
    )


def _asked(module: str, *names: str) -> object:
    """What the first of the functions that there are returns: their names change with torch."""
    known = (getattr(sys.modules.get(module), name, None) for name in names)
    function = next((x for x in known if x is not None), None)
    return None if function is None else function()
