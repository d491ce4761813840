"""A module that is used by another, and is no part of it."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Unregistered(Generic[T]):
    """Holds a module, or a function of one, so that ``nn.Module`` does not register it.

    Its parameters are then not in the ``parameters()`` and the ``state_dict()`` of the module that
    has it, and do not move to a device with that: they stay those of the module that they are from.
    A deep copy, and a pickle, has a copy of what is held; within one call, the one copy of it.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 3)
    >>> module = torch.nn.Module()
    >>> module.layer = Unregistered(layer)
    >>> module.layer.module is layer, list(module.parameters())
    (True, [])

    Attributes:
        module: what is held: an ``nn.Module``, its bound method, or any function. Captured training
            steps see when it, or what is in it, becomes another.
    """

    def __init__(self, module: T) -> None:
        self.module = module
