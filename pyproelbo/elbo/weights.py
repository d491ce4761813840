"""The weights of an objective: their schedules, and their values at a step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pyproelbo._terms.terms import Terms
from pyproelbo.schedules import Schedule, as_schedule


class ScheduledWeights:
    """Weights by name.

    Args:
        weights: numbers or schedules.
    """

    def __init__(self, weights: Mapping[str, float | Schedule]) -> None:
        self.schedules = {name: as_schedule(weight, name) for name, weight in weights.items()}
        self._taken: dict[str, Tensor] | None = None

    def at(self, step: int) -> dict[str, float]:
        """Their values at a step.

        Raises:
            ValueError: for one that is negative.
        """
        weights = {name: schedule(step) for name, schedule in self.schedules.items()}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} should not be negative, got {weight} at step {step}")
        return weights

    def like(self, terms: Terms, step: int) -> dict[str, Tensor]:
        """Their values at a step as scalars of the dtype of ``terms``.

        They are on the CPU, and mix with tensors on any device without waiting for it.
        """
        if self._taken is not None:
            return self._taken
        return {
            name: torch.tensor(weight, dtype=terms.dtype, device="cpu")
            for name, weight in self.at(step).items()
        }

    @contextmanager
    def taken(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Use these tensors in place of the values of any step."""
        self._taken = weights
        try:
            yield
        finally:
            self._taken = None
