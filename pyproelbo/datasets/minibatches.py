"""Minibatches in a new random order in each epoch, which resume where they were."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor


class Epochs(ABC):
    """Minibatches of some rows, once each in an epoch, in an order of its own.

    Args:
        num: of rows.
        batch_size: rows per batch; the last batch of an epoch has the remainder.
    """

    def __init__(self, num: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}")
        self._num, self.batch_size, self.seed = num, batch_size, seed
        self._epoch, self._batch, self._resumes = 0, 0, False

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """The batches of an epoch from number ``first`` on, both counted from 0."""

    def __len__(self) -> int:
        return -(-self._num // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = self._epoch, self._batch if self._resumes else 0
        self._resumes = False
        for i, batch in enumerate(self.batches(epoch, first), start=first + 1):
            # Before the yield: the caller may not return after the last batch.
            self._epoch, self._batch = (epoch, i) if i < len(self) else (epoch + 1, 0)
            yield batch

    @property
    def sampler(self) -> Self:
        """Itself: Lightning sets the epoch of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        if epoch != self._epoch:
            self._epoch, self._resumes = epoch, False

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and the number of its batches already returned."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration continue from :meth:`state_dict`, with the remaining batches."""
        self._epoch, self._batch, self._resumes = state["epoch"], state["batch"], True


class Minibatches(Epochs):
    """Minibatches of the rows of a tensor, in a new random order in each epoch.

    The order depends only on ``seed`` and the epoch, and ``state_dict`` records the position:
    training resumes exactly, even within an epoch. Lightning's Trainer makes the calls for that. An
    interrupted epoch starts again when iterated again. This is for one process; with several, use a
    ``torch.utils.data.DataLoader``, whose sampler Lightning distributes.

    >>> batches = Minibatches(torch.arange(5.0), batch_size=2, seed=0)
    >>> len(batches), sum(len(batch) for batch in batches)
    (3, 5)

    Args:
        x: (N, ...).
        batch_size: rows per batch; the last batch of an epoch has the remainder.
    """

    def __init__(self, x: Tensor, batch_size: int, *, seed: int = 0) -> None:
        super().__init__(len(x), batch_size, seed)
        self.x = x

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """The batches of an epoch from number ``first`` on, both counted from 0."""
        # Numpy mixes the two numbers well, whereas torch's generator takes a single one.
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
        rows = torch.from_numpy(order).to(self.x.device).split(self.batch_size)
        return (self.x[batch] for batch in rows[first:])
