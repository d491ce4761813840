"""A common look for the tables of all results: as text, and as HTML for notebooks."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple, SupportsFloat

from pyproelbo._results.numbers import parts


class Number(NamedTuple):
    """A number, its standard error, and its number of decimals if there is no error."""

    value: float
    stderr: float | None = None
    decimals: int = 4


Cell = Number | int | str | None  # counts are whole numbers; None leaves a cell empty


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        label: of the line, indented by two spaces for each level.
        cells: one for each column.
        remark: the text at the end of the line.
    """

    label: str
    cells: tuple[Cell, ...]
    remark: str = ""


class Table(NamedTuple):
    """Numbers with their labels.

    Attributes:
        title: what they describe, with their unit.
        rows: the lines.
        heads: of the labels, and of each column; () for none.
    """

    title: str
    rows: Sequence[Row]
    heads: tuple[str, ...] = ()


def row(
    label: str,
    value: SupportsFloat,
    stderr: float | None = None,
    remark: str = "",
    decimals: int = 4,
) -> Row:
    """A line of one number: a count, where that is an ``int``."""
    cell = value if isinstance(value, int) else Number(float(value), stderr, decimals)
    return Row(label, (cell,), remark)


def as_text(table: Table) -> str:
    """The title, then a line for each row, with the decimal points of a column aligned.

    >>> print(as_text(Table("Lengths, m", [row("all", 12.3456, 0.25), row("  one", 3.0)])))
    Lengths, m
    all    12.35   ± 0.25
      one   3.0000
    """
    rows = table.rows
    labels = [*table.heads[:1], *(r.label for r in rows)]
    columns = [_justified(labels, left=True)]
    for c in range(max((len(r.cells) for r in rows), default=0)):
        block = _column([r.cells[c] if c < len(r.cells) else None for r in rows])
        columns.append(_justified([*table.heads[c + 1 : c + 2], *block]))
    columns.append([*[""] * bool(table.heads), *(r.remark for r in rows)])
    lines = ("  ".join(line).rstrip() for line in zip(*columns, strict=True))
    return "\n".join([table.title, *lines])


def as_html(table: Table) -> str:
    """A ``<table>`` in HTML, with all texts escaped."""
    num = max((len(r.cells) for r in table.rows), default=0)
    lines = [f'<caption style="text-align: left">{escape(table.title)}</caption>']
    if table.heads:
        heads = "".join(f"<th>{escape(head)}</th>" for head in (*table.heads, ""))
        lines.append(f"<thead><tr>{heads}</tr></thead>")
    lines.append("<tbody>")
    for label, cells, remark in table.rows:
        name = label.lstrip()
        style = f"text-align: left; padding-left: {(len(label) - len(name)) / 2 + 0.5:g}em"
        texts = [" ± ".join(filter(None, _said(cell))) for cell in cells]
        texts += [""] * (num - len(texts))
        lines.append(
            f'<tr><td style="{style}">{escape(name)}</td>'
            + "".join(f'<td style="text-align: right">{escape(text)}</td>' for text in texts)
            + f'<td style="text-align: left">{escape(remark)}</td></tr>'
        )
    return "\n".join(["<table>", *lines, "</tbody>", "</table>"])


def _said(cell: Cell) -> tuple[str, str]:
    """A cell's number and its error."""
    if isinstance(cell, Number):
        return parts(*cell)
    return (f"{cell:,}", "") if isinstance(cell, int) else (cell or "", "")


def _column(cells: Sequence[Cell]) -> list[str]:
    """The cells, all of one width, or empty: numbers and errors aligned by decimal points."""
    numbers, errors = zip(*map(_said, cells), strict=True)
    aligned = _by_points(numbers)
    if any(errors):
        spreads = [f" ± {e}" if e.strip() else e for e in _by_points(errors)]
        aligned = [a + e for a, e in zip(aligned, _justified(spreads, left=True), strict=True)]
    return [text if text.strip() else "" for text in aligned]


def _by_points(texts: Sequence[str]) -> list[str]:
    """Numbers aligned by decimal points; other texts to the right."""
    points = {t: t.partition(".") for t in texts if t[-1:].isdigit() and " " not in t}
    whole = max((len(p[0]) for p in points.values()), default=0)
    rest = max((len(p[1] + p[2]) for p in points.values()), default=0)
    return _justified(
        [
            points[t][0].rjust(whole) + "".join(points[t][1:]).ljust(rest) if t in points else t
            for t in texts
        ]
    )


def _justified(texts: Sequence[str], left: bool = False) -> list[str]:
    width = max(map(len, texts), default=0)
    return [text.ljust(width) if left else text.rjust(width) for text in texts]
