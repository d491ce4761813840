"""The parameters of programs, as one vector."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from pyro import poutine
from torch import Tensor

from pyproelbo._evidence.trained_guide import keep_apart, leaves
from pyproelbo._terms.traces import Program


class Parameters:
    """The parameters of model and guide: unconstrained, from Pyro's store and from modules.

    Args:
        tensors: the parameters, each once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(p.numel() for p in self.tensors)

    def get(self) -> Tensor:
        """A copy, as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.tensors])

    def put(self, vector: Tensor) -> None:
        """Set them from a vector."""
        with torch.no_grad():
            for p, part in self._parts(vector):
                p.copy_(part)

    def gradients(self) -> Tensor:
        """The gradients as one vector, zero where there is none."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.tensors]
        return torch.cat([gradient.reshape(-1) for gradient in found])

    def put_gradients(self, vector: Tensor) -> None:
        """Set the gradients from a vector."""
        for p, part in self._parts(vector):
            p.grad = part

    def _parts(self, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its part of a vector, in its shape."""
        parts = vector.split([p.numel() for p in self.tensors])
        return ((p, part.reshape(p.shape)) for p, part in zip(self.tensors, parts, strict=True))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Restore them afterwards."""
        before = self.get()
        try:
            yield
        finally:
            self.put(before)


def parameters_of(trace: poutine.Trace, *programs: Program) -> Parameters:
    """The parameters that take gradients, from the parameter sites of a run and from modules.

    Raises:
        ValueError: where there are none.
    """
    every = {key: value for program in programs for key, value in leaves(program, trace).items()}
    found = [value for value in every.values() if value.requires_grad]
    if not found:
        raise ValueError(
            "model and guide have no parameters to fit: give one of them a pyro.param, or an "
            "nn.Parameter that takes gradients"
        )
    keep_apart(found)
    return Parameters(found)
