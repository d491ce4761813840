"""Hooks of modules: Python that a graph would call only once, when captured."""

from collections.abc import Iterable

from torch import nn

from pyproelbo._backend.torch_private import GLOBAL_HOOKS, HOOKS, hooks_of
from pyproelbo.capture.structure import CannotCapture

_CURE = "remove it to have steps captured"


def refuse_hooks(modules: Iterable[nn.Module]) -> None:
    """
    Raises:
        CannotCapture: if one has a hook that is not torch's own, such as ``weight_norm``'s.
    """
    for module in modules:
        for hooks, what in zip(hooks_of(module), HOOKS.values(), strict=True):
            for hook in hooks.values():
                if not str(getattr(hook, "__module__", "")).startswith("torch."):
                    name = getattr(hook, "__qualname__", type(hook).__name__)
                    raise CannotCapture(f"a {type(module).__name__} has the {what} {name}: {_CURE}")


def refuse_global_hooks() -> None:
    """
    Raises:
        CannotCapture: if all modules have a hook.
    """
    for hooks, what in GLOBAL_HOOKS:
        if hooks:
            raise CannotCapture(f"all modules have a global {what}: {_CURE}")
