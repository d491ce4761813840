"""Going through the data once, batch by batch: what is finished is not lost."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

from pyproelbo._messages.warn import warn
from pyproelbo._rows.batches import Batch

Part = TypeVar("Part")
Result = TypeVar("Result")
Item = TypeVar("Item")


class UnfinishedWarning(UserWarning):
    """A report was interrupted, and is of the data that were finished."""


def by_batch(
    batches: Iterable[Batch],
    of: Callable[[Batch], Part],
    joined: Callable[[list[Part], bool], Result],
    name: str,
    progress: bool,
) -> Result:
    """``joined`` of what ``of`` makes of each batch.

    Ctrl-C returns that of the batches that are finished, with an :class:`UnfinishedWarning`; an
    error has it as its attribute ``name``. Before the first batch is finished both go on.

    Args:
        joined: from the parts, and whether they are of all data, to the report.
        name: of the report.
        progress: whether to show a progress bar, on a terminal.
    """
    parts: list[Part] = []
    num_data = 0
    try:
        for batch in bar(batches, name, progress):
            parts.append(of(batch))
            num_data += batch.size
    except KeyboardInterrupt:
        if not parts:
            raise
        warn(f"interrupted: the {name} is that of the first {num_data} data", UnfinishedWarning)
        return joined(parts, False)
    except Exception as error:
        if parts:
            setattr(error, name, joined(parts, False))
            error.add_note(f"the attribute `{name}` of this error is that of the data before")
        raise
    return joined(parts, True)


def bar(items: Iterable[Item], what: str, progress: bool) -> Iterable[Item]:
    """The items; on a terminal their progress is shown."""
    return tqdm(items, desc=what.replace("_", " "), disable=None if progress else True, leave=False)
