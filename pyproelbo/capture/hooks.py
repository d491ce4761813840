"""Hooks of modules: Python that a graph would call once, when it is captured, and then no more."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as _module

from pyproelbo.capture.structure import CannotCapture

_KINDS = {
    "forward_pre_hooks": "forward pre-hook",
    "forward_hooks": "forward hook",
    "backward_pre_hooks": "backward pre-hook",
    "backward_hooks": "backward hook",
}
_EVERYWHERE = [(getattr(_module, f"_global_{kind}", {}), what) for kind, what in _KINDS.items()]
_CURE = "take it off to have steps captured"


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks of each kind that its calls and their backward passes call."""
    return [getattr(module, f"_{kind}", {}) for kind in _KINDS]


def refuse_hooks(modules: Iterable[nn.Module]) -> None:
    """
    Raises:
        CannotCapture: if one has a hook that is not torch's own, as that of ``weight_norm``.
    """
    for module in modules:
        for hooks, what in zip(hooks_of(module), _KINDS.values(), strict=True):
            for hook in hooks.values():
                if not str(getattr(hook, "__module__", "")).startswith("torch."):
                    name = getattr(hook, "__qualname__", type(hook).__name__)
                    raise CannotCapture(f"a {type(module).__name__} has the {what} {name}: {_CURE}")


def refuse_global_hooks() -> None:
    """
    Raises:
        CannotCapture: if all modules have a hook.
    """
    for hooks, what in _EVERYWHERE:
        if hooks:
            raise CannotCapture(f"all modules have a global {what}: {_CURE}")
