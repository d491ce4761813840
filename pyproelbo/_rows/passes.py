"""One pass over the data, batch by batch: nothing finished is lost."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from operator import length_hint
from typing import Any, Generic, NamedTuple, TypeVar

from tqdm import tqdm

from pyproelbo._messages.warn import warn
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.executors import computed
from pyproelbo._rows.origins import of_rows, origin_here
from pyproelbo._rows.shelf import Shelf, columns_of

Row = TypeVar("Row")
Part = TypeVar("Part")
Result = TypeVar("Result")
Item = TypeVar("Item")
State = TypeVar("State")


class UnfinishedWarning(UserWarning):
    """A report was interrupted, and covers the data that were finished."""


class Pass(NamedTuple, Generic[Row, Part, Result]):
    """A report from one pass over the data.

    Attributes:
        of: what it keeps from a batch.
        joined: from that of all batches, and whether they are all data, to the report.
    """

    of: Callable[[Row], Part]
    joined: Callable[[list[Part], bool], Result]


def together(passes: Sequence[Pass[Row, Any, Any]]) -> Pass[Row, list[Any], list[Any]]:
    """Several reports in one pass, all on the same data, even if these are not all."""

    def joined(parts: list[list[Any]], is_whole: bool) -> list[Any]:
        columns = columns_of(parts)
        parts.clear()
        return [one.joined(columns.pop(0), is_whole) for one in passes]

    return Pass(lambda row: [one.of(row) for one in passes], joined)


def by_batch(
    batches: Iterable[Batch],
    of: Callable[[Batch], Part],
    joined: Callable[[list[Part], bool], Result],
    name: str,
    progress: bool,
    executor: Executor | None = None,
    with_next: Callable[[list[Part], Part], list[Part]] | None = None,
) -> Result:
    """``joined`` of the results of ``of`` for each batch (see :func:`by_part`).

    Args:
        joined: from the parts, and whether they cover all data, to the report; it may empty the
            list of the parts, to free their memory.
        name: of the report.
        progress: whether to show a progress bar, on a terminal.
        executor: whose workers compute ``of``.
        with_next: from the parts and one more to all of them, without changing them.
    """
    origin = origin_here()
    if with_next is None:
        shelf = Shelf()
        with_next = lambda parts, part: [*parts, shelf.kept(part) if parts else part]  # noqa: E731

    def of_next(before: _Finished[Part] | None, done: tuple[Batch, Part]) -> _Finished[Part]:
        batch, part = done
        start = batch.start if before is None else before.start
        parts = list[Part]() if before is None else before.parts
        return _Finished(start, batch.start + batch.size, with_next(parts, part))

    def result(finished: _Finished[Part], is_whole: bool) -> Result:
        start, stop, parts = finished
        return of_rows(joined(parts, is_whole), origin, start, stop)

    shown = bar(computed(of, batches, executor), name, progress, length_hint(batches) or None)
    return by_part(shown, of_next, result, name, until)


class _Finished(NamedTuple, Generic[Part]):
    """What is kept from the rows ``start`` to ``stop``."""

    start: int
    stop: int
    parts: list[Part]


def until(done: tuple[Batch, object]) -> str:
    """The number of data finished after a batch, in words."""
    batch, _ = done
    return f"{batch.start + batch.size} data"


def by_part(
    items: Iterable[Item],
    of_next: Callable[[State | None, Item], State],
    result: Callable[[State, bool], Result],
    name: str,
    so_far: Callable[[Item], str],
    is_enough: Callable[[State], bool] = lambda _: True,
) -> Result:
    """``result`` of the state after all items: nothing finished is lost.

    Ctrl-C returns that of the finished items, with an :class:`UnfinishedWarning`; an error has it
    as its attribute ``name``. Before enough are finished both propagate.

    Args:
        of_next: from the state before an item, None at first, to a new state after it, leaving the
            old one unchanged.
        result: from a state, and whether it covers all items, to the report.
        name: of the report.
        so_far: how much is finished after an item, in words.
        is_enough: whether a report can be made from a state; by default from any.
    """
    state: State | None = None
    last: Item | None = None
    try:
        for item in items:
            state, last = of_next(state, item), item
    except KeyboardInterrupt:
        if state is None or last is None or not is_enough(state):
            raise
        warn(f"interrupted: the {name} covers only the first {so_far(last)}", UnfinishedWarning)
        return result(state, False)
    except Exception as error:
        if state is not None and is_enough(state):
            keep_in(error, name, result(state, False), "the report on the data before")
        raise
    if state is None:
        raise ValueError("there is nothing to iterate over: data should have at least one row")
    return result(state, True)


def keep_in(error: Exception, name: str, report: object, what: str) -> None:
    """Give an error a report as its attribute ``name``, with a note on ``what`` it is."""
    setattr(error, name, report)
    error.add_note(f"the attribute `{name}` of this error is {what}")


def bar(
    items: Iterable[Item], what: str, progress: bool, total: int | None = None
) -> Iterable[Item]:
    """The items, with their progress on a terminal.

    Args:
        total: their number, if they have no length.
    """
    hidden = None if progress else True
    return tqdm(items, what.replace("_", " "), total, disable=hidden, leave=False)
