"""The draws of a whole data set, with which a surgery begins."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from operator import length_hint
from typing import NamedTuple

from pyproelbo._messages.arguments import check_counts, check_executor, check_names, check_shared
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.executors import computed
from pyproelbo._rows.report_data import batches_of
from pyproelbo._surgery.draws import DataDraws, draw, joined
from pyproelbo._surgery.estimates import check_terms
from pyproelbo._surgery.guide_aggregate import DataPart, data_parts, sums_by_workers
from pyproelbo._surgery.local_latents import LocalLatents, local_latents
from pyproelbo._surgery.points import num_points
from pyproelbo._terms.traces import Program

Parts = list[list[DataDraws | None]]


class Options(NamedTuple):
    """The options of a surgery, as its arguments are."""

    arguments: Arguments | None
    site: str | Sequence[str] | None
    given: str | Sequence[str] | None
    plate: str | None
    num_samples: int
    batch_size: int
    max_pairs: int | None
    seed: int
    executor: Executor | None
    progress: bool


def checked(options: Options, num_nested: int) -> None:
    """Check the options of a surgery, or of a part of one, before anything is drawn.

    Raises:
        ValueError: for those that are none.
    """
    check_counts(num_samples=options.num_samples, num_nested=num_nested)
    check_counts(max_pairs=1 if options.max_pairs is None else options.max_pairs)
    check_names(site=options.site, given=options.given)
    check_shared(options.plate, options.seed, options.arguments)
    check_executor(options.executor)


@dataclass(frozen=True)
class Drawn:
    """Draws of a guide, with what is needed to evaluate its posteriors again.

    Attributes:
        guide, batches: for posteriors that are not normal.
        which: the latents.
        draws: of all data, in their order.
        num_samples: S, the number of draws over which the means are taken.
        executor: whose workers evaluate them; None for this process.
    """

    guide: Program
    batches: Iterable[Batch]
    which: LocalLatents
    draws: Sequence[DataDraws]
    num_samples: int
    executor: Executor | None = None

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.draws[0].rows)

    def parts(self, at: Sequence[DataDraws], rows: range | None = None) -> Iterator[DataPart]:
        """All data, or some, part by part, with their densities at some draws."""
        rows = range(self.num_data) if rows is None else rows
        of = self.guide, self.batches, self.which, self.draws, at, rows
        return data_parts(*of) if self.executor is None else sums_by_workers(*of, self.executor)


class Drawing(NamedTuple):
    """Draws that are being made.

    Attributes:
        which: the latents.
        parts: each batch with its draws.
        again: the same batches, for another pass.
        total: the number of batches, where known.
    """

    guide: Program
    which: LocalLatents
    parts: Iterable[tuple[Batch, list[DataDraws | None]]]
    again: Iterable[Batch]
    total: int | None
    options: Options

    def drawn(self, parts: Parts) -> Drawn:
        """The draws of all batches so far; empties ``parts``.

        Raises:
            ValueError: for terms of the ELBO that are not finite.
        """
        draws, options = joined(parts), self.options
        parts.clear()  # their contents are in memory twice
        check_terms(draws, options.num_samples)
        return Drawn(
            self.guide, self.again, self.which, draws, options.num_samples, options.executor
        )


def drawing(model: Program, guide: Program, data: ReportData, options: Options) -> Drawing:
    """Begin to draw, within a report."""
    batches = batches_of(model, guide, data, options.batch_size, options.arguments)
    if batches.num_data is not None:  # known before any draw is made
        num_points(options.max_pairs, batches.num_data, options.num_samples)
    once, again = batches.in_one_pass()
    total = length_hint(once) or None
    passing = iter(once)
    first = next(passing)
    which = local_latents(model, guide, first, options.site, options.plate, options.given)

    num_samples, seed = options.num_samples, options.seed  # an executor cannot send itself

    def of(batch: Batch) -> list[DataDraws | None]:
        return draw(model, guide, batch, which, num_samples, seed)

    parts = computed(of, chain([first], passing), options.executor)
    return Drawing(guide, which, parts, again, total, options)
