"""The report on a part of a surgery."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._results.merging import stamped
from pyproelbo._results.origin import Origin
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.origins import origin_here
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._surgery.drawing import Drawn, Options, checked, drawing
from pyproelbo._surgery.draws import of_data
from pyproelbo._surgery.guide_aggregate import DataPart, Sums
from pyproelbo._surgery.over_globals import at_globals, is_nested
from pyproelbo._surgery.part import PosteriorSums, SurgeryPart
from pyproelbo._surgery.points import num_points, points
from pyproelbo._terms.traces import Program

_TOLD = 16  # data, by whose draws other draws are told


def surgery_part(
    model: Program,
    guide: Program,
    data: ReportData,
    rows: range,
    *,
    arguments: Arguments | None = None,
    site: str | Sequence[str] | None = None,
    given: str | Sequence[str] | None = None,
    plate: str | None = None,
    num_samples: int = 1,
    num_nested: int = 10,
    max_pairs: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> SurgeryPart:
    """The part of a surgery over the posteriors of some rows, for one of several jobs.

    sum_n q(z | x_n) = sum_jobs sum_{n in rows} q(z | x_n), at the draws of all data. The draws
    depend on nothing but the seed and the data, where they can be made by row (see
    :mod:`pyproelbo._rows.noise`), so that each job makes them itself: N of the N^2 evaluations.
    k jobs take 1/k of the time of a surgery each, and never meet; the marginals of independent
    normal posteriors are computed at the end, by :meth:`SurgeryPart.surgery`.

    Ctrl-C leaves the part over the first of the rows, with an :class:`UnfinishedWarning`; an error
    has it as its attribute ``surgery_part``. Over several draws of global latents there is no such
    part.

    Args:
        model, guide: as in :func:`surgery`.
        data: all data, in the same order for each part.
        rows: the indices of the posteriors, such as ``range(0, 15_000)``.
        arguments, site, given, plate, num_samples, num_nested, batch_size, seed: as in
            :func:`surgery`; the same for each part.
        max_pairs: as in :func:`surgery`, for all parts together.
        executor, progress: as in :func:`surgery`.

    Raises:
        ValueError: for rows that are no range of the data; and as :func:`surgery` does.

    >>> import torch
    >>> import pyproelbo as pe
    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(200, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> parts = [surgery_part(ppca, Exact(ppca), x, rows) for rows in (range(150), range(150, 200))]
    >>> whole = pe.merge(parts).surgery()
    >>> round(whole.elbo, 5) == round(pe.surgery(ppca, Exact(ppca), x).elbo, 5)
    True
    """
    options = Options(
        arguments, site, given, plate, num_samples, batch_size, max_pairs, seed, executor, progress
    )
    checked(options, num_nested)
    if not isinstance(rows, range) or rows.step != 1 or not rows or rows.start < 0:
        raise ValueError(f"rows should be a range of row numbers, such as range(100), got {rows!r}")
    with evaluating(model, guide, seed=seed):
        origin = origin_here(rows.start, rows.stop)
    assert origin is not None
    if is_nested(model, guide, data, options):
        return _nested(model, guide, data, origin, num_nested, options)
    return _local(model, guide, data, origin, options)


def _nested(
    model: Program, guide: Program, data: ReportData, origin: Origin, num: int, options: Options
) -> SurgeryPart:
    """At ``num`` draws of the global latents."""
    programs, each = at_globals(model, guide, data, num, options)
    found: list[SurgeryPart] = []
    for s, at in enumerate(bar(programs, "global latents", options.progress, num)):
        with evaluating(at.model, at.guide, seed=options.seed + s):
            part = _begun(at.model, at.guide, data, origin, each._replace(seed=options.seed + s))
            found.append(part.result(reduce(Sums.after, part.data_parts, part.sums), at.kl))
    sums = tuple(one for part in found for one in part.sums)
    return stamped(replace(found[0], sums=sums), origin)


def _local(
    model: Program, guide: Program, data: ReportData, origin: Origin, options: Options
) -> SurgeryPart:
    """Of latents of single data."""
    with evaluating(model, guide, seed=options.seed):
        part = _begun(model, guide, data, origin, options)
        return by_part(
            bar(part.data_parts, "aggregate posterior", options.progress),
            lambda sums, data: (part.sums if sums is None else sums).after(data),
            lambda sums, _: part.result(sums),
            "surgery_part",
            lambda data: f"{data.stop - origin.start} of {origin.stop - origin.start} rows",
        )


class _Part(NamedTuple):
    """A part that is being computed.

    Attributes:
        drawn: the draws of all data.
        points: as in :class:`PosteriorSums`.
        data_parts: the data of the part, with their densities.
        sums: over none of them.
    """

    drawn: Drawn
    origin: Origin
    points: Tensor | None
    data_parts: Iterator[DataPart]
    sums: Sums

    def result(self, sums: Sums, global_kl: float | None = None) -> SurgeryPart:
        """The part, from the sums over the first of its data."""
        drawn, origin = self.drawn, self.origin._replace(stop=sums.num_data)
        is_own = [(x.rows >= origin.start) & (x.rows < origin.stop) for x in drawn.draws]
        own = tuple(x.at(rows) for x, rows in zip(drawn.draws, is_own, strict=True))
        told = torch.linspace(0, drawn.num_data - 1, _TOLD).round().long()
        codes = drawn.draws[0].by_dim["z"]
        of = PosteriorSums(own, *sums.values, codes[told.to(codes.device)], self.points, global_kl)
        found = SurgeryPart(drawn.num_data, drawn.num_samples, drawn.which, (of,))
        return stamped(found, origin)


def _begun(
    model: Program, guide: Program, data: ReportData, origin: Origin, options: Options
) -> _Part:
    """The draws of all data, within a report."""
    begun = drawing(model, guide, data, options)
    shown = bar(begun.parts, "draws", options.progress, begun.total)
    drawn = begun.drawn([draws for _, draws in shown])
    if origin.stop > drawn.num_data:
        raise ValueError(
            f"rows should be among those of the {drawn.num_data:,} data, got range({origin.start}, "
            f"{origin.stop})"
        )
    num = num_points(options.max_pairs, drawn.num_data, drawn.num_samples)
    chosen, at = None, list(drawn.draws)
    if num < drawn.num_data:
        chosen = torch.cat([part.rows for part in points(drawn.num_data, num, options.seed)])
        at = of_data(drawn.draws, chosen)
    of = drawn.parts(at, range(origin.start, origin.stop))
    return _Part(drawn, origin, chosen, of, Sums(drawn.which, at))
