"""Shared by models and guides of sequences: the plate over them, and their arguments."""

from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyproelbo._messages.renamed import renamed
from pyproelbo.models.base import NamedModule, check_sizes, rows_plate
from pyproelbo.sequences import lengths_mask


class Sequences(NamedTuple):
    """Sequences that are safe to compute with: values that do not count are 0, not NaN.

    Attributes:
        x: (..., T, D), 0 in padding and where missing; None to simulate.
        inputs: (..., T, U), 0 in padding and at the first step; None where there are none.
        own: bool (..., T), False in padding; None where there is none.
        observed: bool (..., T), False in padding and where x_t is missing; None if none is missing.
        shape: (..., T).
        lengths: (...), the steps of each sequence; None where there is no padding.
    """

    x: Any  # a Tensor, wherever x was given
    inputs: Tensor | None
    own: Tensor | None
    observed: Tensor | None
    shape: tuple[int, ...]
    lengths: Tensor | None = None


class SequenceProgram(NamedModule):
    """Shared by models and guides of sequences: the plate over them, and their arguments.

    Args:
        num_features: D, the size of x_t.
        num_inputs: U, the size of the inputs u_t; 0 for none.
        dataset_size: N, the number of all sequences, as in the model.
    """

    @renamed(size="dataset_size")
    def __init__(
        self, num_features: int, num_inputs: int = 0, dataset_size: int | None = None
    ) -> None:
        super().__init__()
        check_sizes(num_features=num_features)
        if num_inputs != 0:
            check_sizes(num_inputs=num_inputs)
        self.num_features, self.num_inputs = num_features, num_inputs
        self.dataset_size = dataset_size

    def plate_over(self, x: Tensor | None, num: int = 1) -> pyro.plate:
        """The plate "data": over the sequences x (B, T, D), or ``num`` to simulate."""
        if x is None:
            return rows_plate(num)
        if x.dim() != 3:
            raise ValueError(
                f"x should have shape (B, T, {self.num_features}), time before features, got "
                f"{tuple(x.shape)}"
            )
        return rows_plate(len(x), self.dataset_size)

    def read(
        self,
        x: Tensor | None,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        inputs: Tensor | None = None,
        num: int = 1,
        num_steps: int | None = None,
    ) -> Sequences:
        """The arguments of a sequence program, checked and cleaned.

        Without x the shape is that of the inputs, or (num, num_steps).

        Raises:
            ValueError: for shapes and dtypes that do not match. While Pyro's validation is on, also
                for lengths not from 1 to T, and for numbers that count and are not finite.
        """
        shape = self._shape(x, inputs, num, num_steps)
        own = None
        if lengths is not None:
            _check_shape("lengths", lengths, shape[:-1])
            own = lengths_mask(lengths, shape[-1])
        if observed is not None:
            _check_shape("observed", observed, shape)
            if observed.dtype != torch.bool:
                raise ValueError(f"observed should be bool, got {observed.dtype}")
        if (inputs is None) != (self.num_inputs == 0):
            raise ValueError(
                f"inputs should {'not be given' if inputs is not None else 'be given'}: "
                f"num_inputs is {self.num_inputs}"
            )
        if inputs is not None:
            _check_shape("inputs", inputs, (*shape, self.num_inputs))
            first = torch.zeros_like(inputs[..., :1, :])
            inputs = _filled("inputs", torch.cat([first, inputs[..., 1:, :]], -2), own)
        seen = own if observed is None else observed if own is None else own & observed
        x = None if x is None else _filled("x", x, seen)
        return Sequences(x, inputs, own, seen, shape, lengths)

    def _shape(
        self, x: Tensor | None, inputs: Tensor | None, num: int, num_steps: int | None
    ) -> tuple[int, ...]:
        given = inputs if x is None else x
        if given is None:
            if num_steps is None:
                raise ValueError("num_steps should be given to simulate: there is no x")
            check_sizes(num=num, num_steps=num_steps)
            return num, num_steps
        name, size = ("inputs", self.num_inputs) if x is None else ("x", self.num_features)
        if given.dim() < 2 or given.shape[-2] < 1 or given.shape[-1] != size:
            raise ValueError(
                f"{name} should have shape (..., T, {size}) with T at least 1, got "
                f"{tuple(given.shape)}"
            )
        return tuple(given.shape[:-1])


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} should have shape {tuple(shape)}, got {tuple(value.shape)}")


def _filled(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    """``value`` (..., T, n) with zeros where the mask (..., T) is False."""
    if mask is not None:
        value = torch.where(mask.unsqueeze(-1), value, 0.0)
    if is_validation_enabled() and not value.isfinite().all():
        raise ValueError(
            f"{name} should be finite at the steps that count: mark padding by lengths, and "
            "missing x by observed"
        )
    return value
