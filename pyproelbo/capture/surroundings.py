"""What a step depends on besides its programs and their arguments."""

from collections.abc import Hashable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from pyro.poutine.trace_messenger import TraceMessenger

from pyproelbo._backend.kept_samples import samples_kept
from pyproelbo._backend.pyro_private import are_parameters_local, handlers
from pyproelbo._backend.torch_private import default_device
from pyproelbo.capture.hooks import refuse_global_hooks
from pyproelbo.capture.structure import CannotCapture

_DEVICES = ("cpu", "cuda")
_NOTHING = nullcontext()


def surroundings() -> Hashable:
    """The modes that a graph depends on.

    Raises:
        CannotCapture: where the program would do something that a graph does not.
    """
    for handler in handlers():
        if not (isinstance(handler, TraceMessenger) and handler.param_only):
            raise CannotCapture(f"it runs within the effect handler {type(handler).__name__}")
    if torch.is_anomaly_enabled():
        raise CannotCapture("torch looks for anomalies, as by autograd.detect_anomaly()")
    refuse_global_hooks()
    refuse_kept_samples()
    return (
        torch.get_default_dtype(),
        default_device(),
        are_parameters_local(),
        *((x, torch.get_autocast_dtype(x)) for x in filter(torch.is_autocast_enabled, _DEVICES)),
    )


def without_autocast() -> AbstractContextManager[object]:
    """What runs within has the dtypes of its tensors: those of a graph, and of a backward pass."""
    enabled = list(filter(torch.is_autocast_enabled, _DEVICES))
    if not enabled:
        return _NOTHING
    stack = ExitStack()
    for device in enabled:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def refuse_kept_samples() -> None:
    """
    Raises:
        CannotCapture: within the call of a PyroModule that keeps samples until it returns.
    """
    for module, sites in samples_kept():
        if sites:
            raise CannotCapture(
                f"it runs within a call of {type(module).__name__}, which keeps its samples of "
                f"{', '.join(sites)} until that returns: compute the loss outside it"
            )
