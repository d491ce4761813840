"""Parameters that are left as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def constant(*programs: Any) -> Iterator[None]:
    """The parameters of modules take no gradients meanwhile."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    learned = {p for module in modules for p in module.parameters() if p.requires_grad}
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
