"""The rows of the data for a gradient: all, or a minibatch."""

from collections.abc import Iterator

from pyproelbo._backend.rng import seed_of
from pyproelbo._rows.batches import Arguments, Batch, ReportData
from pyproelbo._rows.report_data import batches_of, check_scaled, have_rows
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import Program, run


def batches_without_end(
    model: Program,
    guide: Program,
    data: ReportData,
    batch_size: int | None,
    arguments: Arguments | None,
    seed: int,
) -> Iterator[Batch]:
    """Without end: all data, or independent minibatches.

    Raises:
        ValueError: for data given in several batches, and for impossible minibatches.
    """
    parts = iter(batches_of(model, guide, data, 2**62, arguments))
    whole = next(parts)
    if next(parts, None) is not None:
        raise ValueError(
            "data are given in several batches: give them at once, as tensors, and batch_size= for "
            "the gradient of a minibatch"
        )
    if batch_size is None or batch_size >= whole.size:
        while True:
            yield whole
    batches = batches_of(model, guide, data, batch_size, arguments)
    if batches.is_one:
        raise ValueError(
            "batch_size cannot be less than all rows for an AutoGuide, which may have parameters "
            "for each of them: leave it out, or let a plate of the model subsample"
        )
    i = 0
    while True:  # each the first of a new order: two from one order share no row
        yield next(batches.shuffled(seed_of(seed, i)))
        i += 1


def rows_are_random(model: Program, guide: Program, batch: Batch, batch_size: int | None) -> bool:
    """Whether each gradient uses random rows: of a minibatch, or of a plate that subsamples.

    Raises:
        ValueError: where the terms of a minibatch are not scaled to all data.
    """
    sites = Sites.of(run(model, guide, batch.args, batch.kwargs)[0])
    if batch_size is not None and not have_rows(sites, batch.size):
        check_scaled(sites)
    plates = {p for part in sites for site in part.values() for p in site["plates"]}
    return batch_size is not None or any(p.size != p.full_size for p in plates)
