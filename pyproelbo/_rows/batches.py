"""Data in batches, and a batch as the arguments of a program."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyproelbo._messages.arguments import check_counts
from pyproelbo._rows.modules import modules_of
from pyproelbo.datasets import Files

ReportData = Tensor | Sequence[object] | Mapping[str, object] | Iterable[object] | None
Arguments = Callable[[Any], object]  # from a batch of any kind of data


class Batch(NamedTuple):
    """The rows ``start`` to ``start + size`` of the data, as a program's arguments.

    Attributes:
        indices: those of the rows, where they do not follow each other.
    """

    args: tuple
    kwargs: dict[str, object]
    start: int
    size: int
    indices: tuple[int, ...] | None = None

    @property
    def places(self) -> int | tuple[int, ...]:
        """The index of the first row, or those of all, by which rows draw."""
        return self.start if self.indices is None else self.indices

    def has_nan(self) -> bool:
        """Whether a tensor of it holds NaN."""
        values = (*self.args, *self.kwargs.values())
        return any(bool(value.isnan().any()) for value in values if isinstance(value, Tensor))

    def take(self, index: Tensor) -> "Batch":
        """Some of its rows, by their indices within it; each draws as before."""

        def taken(value: Any) -> Any:
            return value[index.to(value.device)] if _num_rows(value) == self.size else value

        args = tuple(taken(value) for value in self.args)
        kwargs = {name: taken(value) for name, value in self.kwargs.items()}
        rows = range(self.start, self.start + self.size) if self.indices is None else self.indices
        indices = tuple(rows[i] for i in index.tolist())
        return Batch(args, kwargs, indices[0], len(indices), indices)

    def repeat(self, times: int) -> "Batch":
        """All its rows ``times`` times, one repetition after another."""

        def repeated(value: Any) -> Any:
            if _num_rows(value) != self.size:
                return value
            return value.repeat(times, *(1,) * (value.dim() - 1))

        args = tuple(repeated(value) for value in self.args)
        kwargs = {name: repeated(value) for name, value in self.kwargs.items()}
        return Batch(args, kwargs, self.start, self.size * times)


@dataclass(frozen=True)
class Shard:
    """A part of the data: its rows have their own place in the whole, and so their own draws.

    For reports on parts of the data, on several machines or one after another, which
    :func:`~pyproelbo.merge` adds up to that on the whole. Programs whose latents are all in the
    plate of the data take them; where all data share a posterior, a part has another one.

    Args:
        data: as a report takes them.
        start: the index of its first row in the whole.

    Raises:
        ValueError: for a start that is no whole number, or negative.
    """

    data: Any
    start: int = 0

    def __post_init__(self) -> None:
        check_counts(0, start=self.start)
        if isinstance(self.data, Shard):
            raise ValueError("data should be data, not a Shard again: add up the starts")


def parted(data: Any) -> tuple[Any, int]:
    """The data of a shard, or data as they are, with the index of their first row."""
    return (data.data, data.start) if isinstance(data, Shard) else (data, 0)


class Batches:
    """Data that can be iterated over several times.

    Args:
        data: a tensor whose rows are the data; the arguments of model and guide, as a tuple or a
            mapping (of keyword arguments), or both in a tuple; or an iterable of such batches that
            can be iterated again, such as a ``DataLoader`` or ``datasets.Files``. The first tensor
            determines the number of rows; arguments with other rows, or none, are the same for all
            data. None where the programs take no arguments.
        batch_size: rows per batch; a loader has its own.
        device: the device of batches; None leaves them where they are.
        arguments: from a batch to the arguments of the programs, a tensor, a tuple, a mapping or
            (args, kwargs), where the two differ.
        num_rows: the number of data, where the programs take no arguments.
        start: the index of the first row in the whole data.

    Raises:
        ValueError: for data of another kind, or without rows.
    """

    def __init__(
        self,
        data: ReportData,
        batch_size: int,
        device: torch.device | None = None,
        arguments: Arguments | None = None,
        num_rows: int | None = None,
        start: int = 0,
    ) -> None:
        check_counts(batch_size=batch_size)
        if isinstance(data, Shard):
            raise ValueError(
                "data should be all data, not a Shard: parts add up for evidence, psis, moments, "
                "decompositions, inference_gap, fisher_divergence and repair, and those of "
                "surgery_part, which takes all data"
            )
        self._start = start
        self.data, self.batch_size, self.device = data, batch_size, device
        self.arguments, self._num_data = arguments, num_rows
        self._is_whole = _is_whole(data)
        if data is None:
            if num_rows is None:
                raise ValueError("data is None, but the programs have no plate over data")
        elif self._is_whole:
            _check_rows(data)
        elif isinstance(data, Iterator) or not isinstance(data, Iterable) or hasattr(data, "dtype"):
            raise ValueError(
                "data should be a tensor, several in a tuple or a mapping, or a DataLoader that "
                f"can be iterated over several times, got {type(data).__name__}"
            )

    def __len__(self) -> int:
        """The number of batches, where known; otherwise a TypeError."""
        if self.data is None:
            return 1
        if self._is_whole:
            return -(-_check_rows(self.data) // self.batch_size)
        return len(self.data)  # type: ignore[arg-type]

    @property
    def num_data(self) -> int | None:
        """The number of data, where known before iteration."""
        if self.data is None:
            return self._num_data
        if isinstance(self.data, Files):
            return None if self.arguments else self.data.num_data
        return _check_rows(self.data) if self._is_whole else None

    @property
    def is_one(self) -> bool:
        """Whether all data are one batch."""
        return self.data is None or (self._is_whole and len(self) == 1)

    def shuffled(self, seed: int, rank: int = 0, num: int = 1) -> Iterator[Batch]:
        """Batches without end, of rows in a new random order in each pass.

        A loader gives its own batches, in its own order, and files theirs, mixed within bounded
        memory. If all data are one batch, it is always the same.

        Args:
            rank, num: which of several equal parts of the rows of a pass to use.
        """
        if isinstance(self.data, Files):
            mixed = Batches(self.data.shuffled(seed=seed), 1, self.device, self.arguments)
            yield from islice((batch for _ in count() for batch in mixed), rank, None, num)
        if self.is_one or not self._is_whole:
            one = list(self) if self.is_one else None
            while True:
                yield from self if one is None else one
        size, epoch = _check_rows(self.data), 0
        if size < num:
            raise ValueError(f"data have {size} rows, too few for {num} processes")
        while True:
            order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(size))
            for rows in order[rank::num][: size // num].split(int(self.batch_size)):

                def of(value: Any, rows: Tensor = rows) -> object:
                    return value[rows.to(value.device)] if _num_rows(value) == size else value

                part = _map(self.data, of)
                args, kwargs = (self._on_device(x) for x in arguments(part, self.arguments))
                yield Batch(args, kwargs, 0, len(rows))
            epoch += 1

    def in_one_pass(self) -> tuple["Batches", "Batches"]:
        """The data, and a repetition of their first pass: a loader's next pass may have other rows.

        A loader's batches are held in memory; files are read again.
        """
        if self._is_whole or self.data is None or isinstance(self.data, Files):
            return self, self
        given: list[object] = []
        options = self.batch_size, self.device, self.arguments
        first, again = (Batches(data, *options) for data in (_Recorded(self.data, given), given))
        again._is_whole = False
        return first, again

    def __iter__(self) -> Iterator[Batch]:
        if self.data is None:
            assert self._num_data is not None
            yield Batch((), {}, self._start, self._num_data)
            return
        start = self._start
        for part in self._parts():
            args, kwargs = arguments(part, self.arguments)
            size = _check_rows((args, kwargs))
            args, kwargs = (self._on_device(x) for x in (args, kwargs))
            yield Batch(args, kwargs, start, size)
            start += size
        if start == self._start:
            raise ValueError(
                "data should have at least one row, got none: an iterable should start again each "
                "time, which an iterator does not"
            )

    def _parts(self) -> Iterable[object]:
        if not self._is_whole:
            return iter(self.data)  # type: ignore[arg-type]
        size, num = self.batch_size, _check_rows(self.data)

        def rows(value: Any, start: int) -> object:
            return value[start : start + size] if _num_rows(value) == num else value

        starts = range(0, num, size)
        return (_map(self.data, lambda value, i=i: rows(value, i)) for i in starts)

    def _on_device(self, part: Any) -> Any:
        if self.device is None:
            return part
        return _map(part, lambda v: v.to(self.device) if isinstance(v, Tensor) else v)


class _Recorded:
    """A loader's batches, kept as they arrive."""

    def __init__(self, data: Any, given: list[object]) -> None:
        self.data, self.given = data, given

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[object]:
        for part in self.data:
            self.given.append(part)
            yield part


def arguments(batch: Any, of: Arguments | None = None) -> tuple[tuple, dict[str, object]]:
    """A batch as the arguments and keyword arguments of model and guide.

    Args:
        of: from the batch to their arguments.
    """
    batch = batch if of is None else of(batch)
    if _is_pair(batch):
        return tuple(batch[0]), dict(batch[1])
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    return (batch,), {}


def _is_pair(batch: Any) -> bool:
    """Whether this is (args, kwargs)."""
    return (
        isinstance(batch, tuple | list)
        and len(batch) == 2
        and isinstance(batch[0], tuple | list)
        and isinstance(batch[1], Mapping)
    )


def device_of(*programs: object) -> torch.device | None:
    """The device of the parameters of the first program that is a module with any."""
    modules = (module for program in programs for module in modules_of(program))
    return next((x.device for module in modules for x in module.parameters()), None)


def _map(batch: Any, change: Callable[[object], object]) -> Any:
    if _is_pair(batch):
        return tuple(_map(part, change) for part in batch)
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(change(value) for value in batch)
    return change(batch)


def _is_whole(data: object) -> bool:
    """Whether these are all data, rather than batches of them.

    A list of tensors is a list of arguments if all have equally many rows.
    """
    if isinstance(data, Tensor) or _is_pair(data):
        return True
    values = list(data.values() if isinstance(data, Mapping) else _items(data))
    num = [_num_rows(value) for value in values if isinstance(value, Tensor)]
    constants = all(isinstance(v, (Tensor, *_CONSTANTS)) for v in values)
    return bool(num) and constants and (not isinstance(data, list) or len(set(num)) == 1)


_CONSTANTS = (NoneType, bool, int, float, complex, str, bytes)


def _items(data: object) -> Iterable[object]:
    return data if isinstance(data, tuple | list) else ()


def _check_rows(batch: object) -> int:
    """The number of rows of the first tensor that has any."""
    args, kwargs = arguments(batch)
    sizes = [_num_rows(value) for value in (*args, *kwargs.values())]
    sizes = [size for size in sizes if size is not None]
    if not sizes:
        raise ValueError(
            "data should have a tensor with one row for each datum, got none: put the data along "
            "its first dim; for other kinds of batches give arguments=, a function from a batch "
            "to the arguments of model and guide"
        )
    if not sizes[0]:
        raise ValueError("data should have at least one row, got none")
    return sizes[0]


def _num_rows(value: object) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.dim() else None
