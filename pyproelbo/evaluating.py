"""Running programs for a report: nothing of theirs changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from torch import nn

from pyproelbo.sharing import sharing


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Every module in eval mode; then each, and Pyro's parameter store, as it was.

    No parameter should change meanwhile (:func:`~pyproelbo.sharing.sharing`).
    """
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    modes, store = [module.training for module in modules], pyro.get_param_store()
    names = set(store.keys())
    for module in modules:
        module.training = False
    try:
        with sharing():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for name in set(store.keys()) - names:
            del store[name]
