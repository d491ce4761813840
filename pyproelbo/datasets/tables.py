"""Files of named columns: Parquet and Arrow."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyproelbo.datasets.row_files import Reading, RowFile, changed, rows_at_once

if TYPE_CHECKING:
    import pyarrow

StartOf = Callable[[str], "pyarrow.Array | None"]
TABLES = (".parquet", ".arrow", ".feather")


class Table(RowFile):
    """A file of named columns, read by pyarrow.

    Args:
        names: of the columns to read; None for all.
        start_of: the first values of a column, from its name.
    """

    def __init__(
        self,
        path: Path,
        schema: "pyarrow.Schema",
        names: Sequence[str] | None,
        start_of: StartOf,
    ) -> None:
        super().__init__(path)
        self.names = _widths(path.name, schema, names, start_of)
        self.shape = (sum(self.names.values()),)

    def _numbers(self, batch: "pyarrow.RecordBatch", first: int, dtype: np.dtype) -> np.ndarray:
        """The chosen columns of a batch that begins at row ``first``, side by side: (n, D)."""
        assert self.names is not None
        out, start = np.empty((len(batch), self.size), dtype), 0
        for name, width in self.names.items():
            with np.errstate(over="ignore"):
                out[:, start : start + width] = self._column(name, batch[name], first)
            start += width
        return out

    def _column(self, name: str, values: "pyarrow.Array", first: int) -> np.ndarray:
        """A column's numbers: (n, width); NaN for a number that is missing."""
        import pyarrow

        assert self.names is not None
        num, width = len(values), self.names[name]
        while not _is_number(values.type):
            if isinstance(values, pyarrow.ExtensionArray):
                values = values.storage
            elif values.null_count:
                row = first + int(values.is_null().to_numpy(zero_copy_only=False).argmax())
                raise ValueError(
                    f"column {name!r} of {self.path.name} has no list in row {row} (null): fill "
                    "it in, remove the row, or choose other columns"
                )
            else:
                if not pyarrow.types.is_fixed_size_list(values.type):
                    self._check_lengths(
                        name, values, width // _width(values.type.value_type), first
                    )
                values = values.flatten()
        if values.null_count or pyarrow.types.is_decimal(values.type):
            values = values.cast(pyarrow.float64())
        return values.to_numpy(zero_copy_only=False).reshape(num, width)

    def _check_lengths(self, name: str, lists: "pyarrow.Array", length: int, first: int) -> None:
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != length).any():
            which = int((lengths != length).argmax())
            raise ValueError(
                f"column {name!r} of {self.path.name} has lists of different lengths, {length} "
                f"numbers in row 0 and {lengths[which]} in row {first + which}: give all the same, "
                "or choose other columns"
            )

    def _check_parts(self, num: int) -> None:
        if num != len(self.parts):
            raise ValueError(changed(self.path))

    def _pieces(
        self, batches: Iterator["pyarrow.RecordBatch"], first: int, dtype: np.dtype
    ) -> Iterator[np.ndarray]:
        from pyarrow import ArrowException

        size = rows_at_once(self.size)
        while True:
            try:
                batch = next(batches, None)
            except (ArrowException, OSError) as error:
                why = " ".join(str(error).split())
                raise ValueError(f"{self.path.name} cannot be read, write it again: {why}") from (
                    error
                )
            if batch is None:
                return
            for start in range(0, len(batch), size):
                yield self._numbers(batch.slice(start, size), first + start, dtype)
            first += len(batch)


class Parquet(Table):
    """A ``.parquet`` file, read by row groups."""

    def __init__(self, path: Path, names: Sequence[str] | None) -> None:
        with self._file(path) as file:

            def start_of(name: str) -> "pyarrow.Array | None":
                batch = next(file.iter_batches(1, columns=[name]), None)
                return None if batch is None else batch[name]

            super().__init__(path, file.schema_arrow, names, start_of)
            groups = range(file.metadata.num_row_groups)
            self.parts = tuple(file.metadata.row_group(i).num_rows for i in groups)

    @contextmanager
    def opened(self, dtype: np.dtype) -> Iterator[Reading]:
        """As in the base."""
        assert self.names is not None
        names = [*self.names]
        with self._file(self.path) as file:
            self._check_parts(file.num_row_groups)

            def pieces(part: int) -> Iterator[np.ndarray]:
                batches = file.iter_batches(rows_at_once(self.size), [part], names)
                return self._pieces(batches, self.start(part), dtype)

            yield pieces

    @staticmethod
    def _file(path: Path) -> Any:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:  # buffered, so that a large row group is read a little at a time
            return ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        except ArrowInvalid as error:
            raise ValueError(
                f"{path.name} is not a readable Parquet file: write it with pyarrow or pandas"
            ) from error


class Arrow(Table):
    """An Arrow or Feather file, read by record batches; a stream of them in one part."""

    def __init__(self, path: Path, names: Sequence[str] | None) -> None:
        import pyarrow

        # mapped, to count rows without reading them
        with pyarrow.memory_map(str(path)) as source:
            schema = self._reader(path, source).schema

            def start_of(name: str) -> "pyarrow.Array | None":
                reader = self._reader(path, source, [schema.get_field_index(name)])
                return next((batch[name].slice(0, 1) for batch in _batches(reader) if batch), None)

            super().__init__(path, schema, names, start_of)
            reader = self._reader(path, source, [0])
            nums = [len(batch) for batch in _batches(reader)]
            self.is_stream = _is_stream(reader)
            self.parts = (sum(nums),) if self.is_stream else tuple(nums)

    @contextmanager
    def opened(self, dtype: np.dtype) -> Iterator[Reading]:
        """As in the base."""
        import pyarrow

        assert self.names is not None
        # read, not mapped: the pages of a mapping count as memory
        with pyarrow.OSFile(str(self.path)) as source:

            def pieces(part: int) -> Iterator[np.ndarray]:
                schema = self._reader(self.path, source).schema
                chosen = sorted(schema.get_field_index(name) for name in self.names or ())
                reader = self._reader(self.path, source, chosen)
                if self.is_stream:
                    return self._pieces(_batches(reader), self.start(part), dtype)
                self._check_parts(reader.num_record_batches)
                batch = (reader.get_batch(i) for i in [part])
                return self._pieces(batch, self.start(part), dtype)

            yield pieces

    @staticmethod
    def _reader(path: Path, source: Any, fields: list[int] | None = None) -> Any:
        """Of a file or of a stream; Hugging Face's datasets write streams."""
        from pyarrow import ArrowInvalid, ipc

        options = ipc.IpcReadOptions(included_fields=fields)
        source.seek(0)
        try:
            return ipc.open_file(source, options=options)
        except ArrowInvalid:
            source.seek(0)
        try:
            return ipc.open_stream(source, options=options)
        except (ArrowInvalid, EOFError) as error:
            raise ValueError(
                f"{path.name} is not a readable Arrow file: write it with pyarrow.ipc or "
                "pyarrow.feather"
            ) from error


def _is_stream(reader: Any) -> bool:
    return not hasattr(reader, "get_batch")


def _batches(reader: Any) -> Iterator["pyarrow.RecordBatch"]:
    """Of an Arrow file or stream."""
    if _is_stream(reader):
        return iter(reader)
    return (reader.get_batch(i) for i in range(reader.num_record_batches))


def table(path: Path, names: Sequence[str] | None = None) -> Table:
    """A file of one of the kinds in :data:`TABLES`.

    Args:
        names: of the columns to read; None for all.

    Raises:
        ValueError: if it cannot be read, or holds anything but numbers.
        ImportError: without pyarrow.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{path.name} needs pyarrow: pip install pyproelbo[parquet]") from error
    return Parquet(path, names) if path.suffix == ".parquet" else Arrow(path, names)


def _widths(
    name: str, schema: "pyarrow.Schema", chosen: Sequence[str] | None, start_of: StartOf
) -> dict[str, int]:
    """The chosen columns, and how many numbers each has in a row."""
    if chosen is None:
        # as pandas writes it, the index of its rows is no feature
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        chosen = [column for column in schema.names if column not in index]
    widths = {}
    for column in chosen:
        found = schema.get_all_field_indices(column)
        if len(found) != 1:
            there = ", ".join(map(repr, schema.names[:20])) + ", ..." * (len(schema.names) > 20)
            what = f"{len(found)} columns" if found else "no column"
            raise ValueError(f"{name} has {what} {column!r}: its columns are {there}")
        kind = schema.field(found[0]).type
        width = _width(kind)
        if _has_lists(kind) and _width(kind.value_type):  # as long as the first
            first = start_of(column)
            length = None if first is None else first[0].as_py()
            width = 0 if length is None else len(length) * _width(kind.value_type)
        if not width:
            raise ValueError(
                f"column {column!r} of {name} holds {kind}, not numbers: encode it as numbers, or "
                "choose others by columns= (--columns)"
            )
        widths[column] = width
    if not widths:
        raise ValueError(f"{name} holds no columns of data: give it one for each feature")
    return widths


def _width(kind: "pyarrow.DataType") -> int:
    """How many numbers a value of a type has; 0 if it holds anything else."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _width(kind.storage_type)
    if pyarrow.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    return int(_is_number(kind))


def _has_lists(kind: "pyarrow.DataType") -> bool:
    """Whether values are lists whose lengths the type does not tell."""
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def _is_number(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    return any(check(kind) for check in checks)
