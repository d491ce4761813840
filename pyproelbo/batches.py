"""Data in batches, and a batch as the arguments of a program."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyproelbo.evaluating import modules_of

Data = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Iterable[Any]


class Batch(NamedTuple):
    """The rows ``start`` to ``start + size`` of the data, as a program takes them."""

    args: tuple
    kwargs: dict[str, Any]
    start: int
    size: int

    def has_nan(self) -> bool:
        """Whether a tensor of it holds NaN."""
        values = (*self.args, *self.kwargs.values())
        return any(bool(value.isnan().any()) for value in values if isinstance(value, Tensor))

    def repeat(self, times: int) -> "Batch":
        """All its rows ``times`` times, one repetition after the other."""

        def repeated(value: Any) -> Any:
            if _num_rows(value) != self.size:
                return value
            return value.repeat(times, *(1,) * (value.dim() - 1))

        args = tuple(repeated(value) for value in self.args)
        kwargs = {name: repeated(value) for name, value in self.kwargs.items()}
        return Batch(args, kwargs, self.start, self.size * times)


class Batches:
    """Data that can be gone through several times.

    Args:
        data: a tensor whose rows are the data; several tensors with as many rows (a tuple or a
            list for the arguments of model and guide, a mapping for keyword arguments); or
            something that gives such batches each time it is iterated, as a ``DataLoader``.
        batch_size: rows a batch; a loader has its own.
        device: where batches are put; None leaves them where they are.

    Raises:
        ValueError: for data of another kind, without rows, or with different numbers of rows.
    """

    def __init__(self, data: Data, batch_size: int, device: torch.device | None = None) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size should be a positive whole number, got {batch_size!r}")
        self.data, self.batch_size, self.device = data, batch_size, device
        self._is_whole = isinstance(data, Tensor) or _are_tensors(data)
        if self._is_whole:
            _check_rows(data)
        elif isinstance(data, Iterator) or not isinstance(data, Iterable) or hasattr(data, "dtype"):
            raise ValueError(
                "data should be a tensor, several tensors with as many rows, or a DataLoader that "
                f"can be gone through several times, got {type(data).__name__}"
            )

    def __len__(self) -> int:
        """How many batches there are, where that is known; else a TypeError."""
        if self._is_whole:
            return -(-_check_rows(self.data) // self.batch_size)
        return len(self.data)  # type: ignore[arg-type]

    def in_one_pass(self) -> tuple["Batches", "Batches"]:
        """The data, and once more what the first has given: a loader's next pass may be of others.

        What a loader gives is held in memory.
        """
        if self._is_whole:
            return self, self
        given: list[Any] = []
        loaders = _Recorded(self.data, given), given
        first, again = (Batches(data, self.batch_size, self.device) for data in loaders)
        return first, again

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for part in self._parts():
            size = _check_rows(part)
            args, kwargs = arguments(self._on_device(part))
            yield Batch(args, kwargs, start, size)
            start += size
        if start == 0:
            raise ValueError(
                "data should have at least one row, got none: what is iterated should begin anew "
                "each time, which an iterator does not"
            )

    def _parts(self) -> Iterable[Any]:
        if not self._is_whole:
            return iter(self.data)  # type: ignore[arg-type]
        size = self.batch_size
        starts = range(0, _check_rows(self.data), size)
        return (_map(self.data, lambda value, i=i: value[i : i + size]) for i in starts)

    def _on_device(self, part: Any) -> Any:
        if self.device is None:
            return part
        return _map(part, lambda v: v.to(self.device) if isinstance(v, Tensor) else v)


class _Recorded:
    """What a loader gives, kept as it is given."""

    def __init__(self, data: Any, given: list[Any]) -> None:
        self.data, self.given = data, given

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for part in self.data:
            self.given.append(part)
            yield part


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """A batch as the arguments and keyword arguments of model and guide."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    return (batch,), {}


def device_of(*programs: Any) -> torch.device | None:
    """Where the parameters of the first of the programs that is a module with any are."""
    modules = (module for program in programs for module in modules_of(program))
    return next((x.device for module in modules for x in module.parameters()), None)


def _map(batch: Any, change: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(change(value) for value in batch)
    return change(batch)


def _are_tensors(data: Any) -> bool:
    values = data.values() if isinstance(data, Mapping) else data
    return (
        isinstance(data, tuple | list | Mapping)
        and len(data) > 0
        and all(isinstance(value, Tensor) for value in values)
    )


def _check_rows(batch: Any) -> int:
    """The number of rows of the batch's tensors, which should be one and the same."""
    args, kwargs = arguments(batch)
    sizes = [_num_rows(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not sizes or None in sizes or len(set(sizes)) > 1:
        raise ValueError(
            "data should have one row for each datum in each of its tensors, as many in one as in "
            f"another, got {sizes} rows: put the data along the first dim"
        )
    size = sizes[0]
    if not size:
        raise ValueError("data should have at least one row, got none")
    return size


def _num_rows(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.dim() else None
