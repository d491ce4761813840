"""The result of a report: it prints as a table with notes, and converts to xarray."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pyproelbo._results.origin import Origin, Simulations
from pyproelbo._results.tables import Table, as_html, as_text

if TYPE_CHECKING:
    from pathlib import Path

    import xarray
    from matplotlib.axes import Axes


class Section(NamedTuple):
    """A table, and the sentences below it."""

    table: Table
    notes: Sequence[str] = ()


class Result(ABC):
    """The base of all results.

    A result is shown, as text or in a notebook, as its table and its notes. It holds tensors and
    arrays, whose equality is not a single truth value: two results are equal only if they are the
    same object (dataclasses of this base take ``eq=False`` and ``repr=False``).

    Results on parts of the data add up to that on the whole (:func:`~pyproelbo.merge`).
    """

    _options: ClassVar[tuple[str, ...]] = ()  # attributes that parts of a result have in common
    _origin: Origin | Simulations | None = None

    @property
    def origin(self) -> Origin | Simulations | None:
        """The rows, or the simulations, and the programs of a result; None where none are known."""
        return self._origin

    @property
    def rows(self) -> range | None:
        """The indices of its rows in the whole data; None for a result that is not of rows."""
        return None if self._origin is None else self._origin.rows

    def __add__(self, other: Self) -> Self:
        """The result on the data of both, :func:`~pyproelbo.merge` of the two."""
        # by name, as these import results
        return importlib.import_module("pyproelbo._results.merging").merge([self, other])

    @classmethod
    def _merged(cls, parts: Sequence[Any]) -> Self:
        """The result on all data, from those on parts that follow each other."""
        raise NotImplementedError

    @property
    def notes(self) -> list[str]:
        """Remarks on the numbers, in sentences; empty where nothing stands out."""
        return []

    @abstractmethod
    def to_xarray(self) -> "xarray.Dataset | xarray.DataTree":
        """The numbers with their names, dims and units.

        A standard error has the name ``<name>_stderr``.
        """

    def save(self, path: "str | Path") -> None:
        """Write the result to a file, which :func:`~pyproelbo.load_result` reads.

        The file holds arrays of numbers and text, as NumPy's ``.npz``; no pickle. It is complete
        or not there, and remains as it was where writing fails.

        Raises:
            OSError: where the file cannot be written, as on a full disk.
            ValueError: for a result with anything but numbers and text, such as a function.
        """
        importlib.import_module("pyproelbo._results.files").save(self, path)

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the figure of this result, into ``ax`` or a new one, and return its axes."""
        # by name, as figures import results, and matplotlib takes long
        return importlib.import_module("pyproelbo.plots.of_results").figure(self, ax=ax)

    @abstractmethod
    def _table(self) -> Table:
        """The numbers as a printed table."""

    def _sections(self) -> list[Section]:
        """What is printed, from top to bottom."""
        return [Section(self._table(), self.notes)]

    def __str__(self) -> str:
        sections = self._sections()
        return "\n\n".join("\n".join([as_text(table), *notes]) for table, notes in sections)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        parts = []
        for table, notes in self._sections():
            parts += [as_html(table), *(f"<p>{escape(note)}</p>" for note in notes)]
        return "\n".join(parts)
