"""Minibatches of rows in files, in random order within bounded memory."""

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from pyproelbo.datasets.minibatches import Epochs
from pyproelbo.datasets.sources import Source, rebatched

BYTES = 2**26  # of the rows that are mixed at once, as float64


class Shuffled(Epochs):
    """Minibatches of the rows of files, in a new random order in each epoch.

    In each epoch the parts of the files (row groups of Parquet, record batches of Arrow) come in
    random order, and their rows are mixed ``buffer`` at a time. If ``buffer`` is at least the
    number of rows, all orders are equally likely; else rows that are near each other in the files
    stay near, which matters where the files are sorted: write them in random order, or in row
    groups smaller than ``buffer``. As for :class:`Minibatches`, the order depends only on ``seed``
    and the epoch, and training resumes exactly.

    Made by :meth:`Files.shuffled`.

    Args:
        batch_size: rows per batch; the last batch of an epoch has the remainder.
        buffer: rows mixed at once, a few times of which are in memory; None for those of 64 MiB
            in float64.
        distributed: whether processes share the rows, as for :class:`Minibatches`; each reads all
            files.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        buffer: int | None,
        seed: int,
        distributed: bool,
    ) -> None:
        super().__init__(source.num_rows, batch_size, seed, distributed)
        if buffer is None:
            buffer = max(batch_size, BYTES // (8 * source.size))
        if buffer < 1:
            raise ValueError(f"buffer should be at least 1, got {buffer}")
        self._source, self.buffer = source, buffer

    @property
    def rows(self) -> tuple[object, ...]:
        """Which rows these are: the files, and the choice of their rows."""
        return (*(str(one.path) for one in self._source.files), self._source.choice)

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """This process's batches of an epoch from number ``first`` on, counted from 0."""
        rank, num = self._processes.rank, self._processes.number
        skipped, within = divmod(first * self.batch_size * num, self.buffer)
        rows = self._mixed(epoch, skipped)
        if within:
            rows = _without(rows, within)
        batches = _without_few(rebatched(rows, num * self.batch_size), num)
        return (torch.from_numpy(batch[rank::num].copy()) for batch in batches)

    def _mixed(self, epoch: int, skipped: int) -> Iterator[np.ndarray]:
        """The rows of an epoch, ``buffer`` at a time, without the first ones."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._source.nums))
        arrays = self._source.arrays(order.tolist(), skipped * self.buffer)
        buffers = rebatched(arrays, self.buffer)
        for i, rows in zip(count(skipped), buffers, strict=False):
            np.random.default_rng((self.seed, epoch, i)).shuffle(rows)
            yield rows


def _without_few(batches: Iterator[np.ndarray], least: int) -> Iterator[np.ndarray]:
    """Batches; a last one of fewer than ``least`` rows is part of the one before."""
    before = next(batches)
    for batch in batches:
        if len(batch) >= least:
            yield before
            before = batch
        else:
            before = np.concatenate([before, batch])
    yield before


def _without(arrays: Iterator[np.ndarray], num: int) -> Iterator[np.ndarray]:
    """The rows but for the first ``num``."""
    for rows in arrays:
        if num < len(rows):
            yield rows[num:]
        num = max(num - len(rows), 0)
