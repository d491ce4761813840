"""Minibatches in a new random order in each epoch, which resume where they were."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pyproelbo._processes import TrainingProcesses, all_processes


class Epochs(ABC):
    """Minibatches of some rows, once each in an epoch, in an order of its own.

    Args:
        num: of rows.
        batch_size: rows per batch; the last batch of an epoch has the remainder.
        distributed: whether the processes of ``torch.distributed`` share the rows.
    """

    batch_sampler = None  # Lightning asks validation loaders with a sampler for it

    def __init__(self, num: int, batch_size: int, seed: int, distributed: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}")
        self._num, self.batch_size, self.seed, self.distributed = num, batch_size, seed, distributed
        self._epoch, self._batch, self._resumes = 0, 0, False

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """This process's batches of an epoch from number ``first`` on, counted from 0."""

    def __len__(self) -> int:
        return len(self._starts())

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

    @property
    def _processes(self) -> TrainingProcesses:
        return all_processes() if self.distributed else TrainingProcesses()

    def _starts(self) -> range:
        """The first row of each batch of all processes together."""
        num = self._processes.number
        if self._num < num > 1:
            raise ValueError(f"x has {self._num} rows, too few for {num} processes")
        # so that the last batch has a row for each of them
        return range(0, self._num - num + 1, num * self.batch_size)


class Minibatches(Epochs):
    """Minibatches of the rows of a tensor, in a new random order in each epoch.

    The order depends only on ``seed`` and the epoch, and ``state_dict`` records the position:
    training resumes exactly, even within an epoch. Lightning's Trainer makes the calls for that. An
    interrupted epoch starts again when iterated again.

    >>> batches = Minibatches(torch.arange(5.0), batch_size=2, seed=0)
    >>> len(batches), sum(len(batch) for batch in batches)
    (3, 5)

    Args:
        x: (N, ...).
        batch_size: rows per batch; the last batch of an epoch has the remainder.
        distributed: whether the P processes of ``torch.distributed`` share the rows, as for
            training by DDP. Then the batches of all processes together are those of one process
            with P ``batch_size``: no row is repeated or left out, and all have equally many
            batches. A remainder of fewer than P rows is part of the batch before.

    Raises:
        ValueError: for a ``batch_size`` below 1; if there are fewer rows than processes.
    """

    def __init__(
        self, x: Tensor, batch_size: int, *, seed: int = 0, distributed: bool = False
    ) -> None:
        super().__init__(len(x), batch_size, seed, distributed)
        self.x = x

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """This process's batches of an epoch from number ``first`` on, counted from 0."""
        # Numpy mixes the two numbers well, whereas torch's generator takes a single one.
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
        rank, num = self._processes.rank, self._processes.number
        rows = torch.from_numpy(order).to(self.x.device).tensor_split([*self._starts()[1:]])
        return (self.x[batch[rank::num]] for batch in rows[first:])
