"""The data of a report, and the meaning of its rows."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import length_hint
from typing import NamedTuple

from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler

from pyproelbo._results.per import Per as Per
from pyproelbo._rows.batches import (
    Arguments,
    Batch,
    Batches,
    ReportData,
    Shard,
    device_of,
    parted,
)
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._terms.collect import plate_of_data
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import PARTICLES, Plate, Program, run


class Unit(NamedTuple):
    """The meaning of a row of a report.

    Attributes:
        per: "datum", where every site is in a plate over the data; "data set" where a latent is
            global, and all data share one posterior.
        plate: the name of that plate, if given.
    """

    per: Per
    plate: str | None = None


class Rows(NamedTuple):
    """The meaning of the rows of a report, and the data in batches of rows."""

    unit: Unit
    batches: Iterable[Batch]


def rows_of(
    model: Program,
    guide: Program,
    data: ReportData,
    batch_size: int,
    arguments: Arguments | None = None,
    plate: str | None = None,
    is_joint: bool = False,
) -> Rows:
    """The rows of a report on programs of any kind, which are run once on the first data.

    Args:
        plate: the name of the plate over the data, if given.
        is_joint: whether all data are one row, whatever the programs.

    Raises:
        ValueError: as for :func:`batches_of`; where the data set is one row, for data given in
            several parts.
    """
    is_part = isinstance(data, Shard)
    data, start = parted(data)
    batches = batches_of(model, guide, data, batch_size, arguments, start)

    def whole() -> Rows:
        if is_part:
            raise ValueError(
                "data should be all data, not a Shard: they share one posterior, as a latent is "
                "global, and parts of them have others"
            )
        return Rows(Unit("data set"), [_whole(model, guide, data, arguments)])

    if is_joint:
        return whole()
    if plate is not None:
        return Rows(Unit("datum", plate), batches)
    with evaluating(model, guide), poutine.block():
        first = next(iter(batches))
        try:
            sites = Sites.of(run(model, guide, first.args, first.kwargs)[0])
        except Exception:  # as for a guide with a distribution for each of all data
            if length_hint(batches, 1) == 1:
                raise
            batches = batches_of(model, guide, data, sys.maxsize, arguments, start)
            first = next(iter(batches))
            sites = Sites.of(run(model, guide, first.args, first.kwargs)[0])
    if have_rows(sites, first.size):
        return Rows(Unit("datum"), batches)
    return whole()


def batches_of(
    model: Program,
    guide: Program,
    data: ReportData,
    batch_size: int,
    arguments: Arguments | None = None,
    start: int = 0,
) -> Batches:
    """The data in batches, on the device of the programs' parameters.

    An AutoGuide has separate parameters for every row, and therefore sees all rows at once.

    Raises:
        ValueError: as for :class:`Batches`.
    """
    if isinstance(data, tuple | Mapping) and not data:
        data = None
    num_rows = _num_rows(model, guide) if data is None else None
    is_auto = isinstance(poutine.unwrap(guide), AutoGuide)
    size = sys.maxsize if is_auto and isinstance(batch_size, int) and batch_size > 0 else batch_size
    return Batches(data, size, device_of(guide, model), arguments, num_rows, start)


def first_rows(
    model: Program,
    guide: Program,
    data: ReportData,
    batch_size: int,
    arguments: Arguments | None,
) -> Batch | None:
    """The first batch of data that are given at once; None where they are given in several."""
    if data is not None and not isinstance(data, Tensor | Sequence | Mapping):
        return None
    return next(iter(batches_of(model, guide, data, batch_size, arguments)))


def check_in_order(data: ReportData) -> None:
    """Check that values given along with the data can have the same order.

    Raises:
        ValueError: for a loader that shuffles.
    """
    if isinstance(getattr(parted(data)[0], "sampler", None), RandomSampler | SubsetRandomSampler):
        raise ValueError(
            "evidence= and latents= follow the order of the data, but the loader has another "
            "order in each pass: give the data themselves, or a loader with shuffle=False"
        )


def have_rows(sites: Sites, num_rows: int) -> bool:
    """Whether all sites share one plate, with a row for each datum."""
    found = [site for part in sites for site in part.values()]
    plates = [{p.name for p in site["plates"] if _has(p, num_rows)} for site in found]
    return bool(plates) and bool(set.intersection(*plates))


def check_scaled(sites: Sites) -> None:
    """Check that a plate gives the number of all data, of which a minibatch is a part.

    Raises:
        ValueError: if none does.
    """
    plates = [plate for site in sites.data.values() for plate in site["plates"]]
    if all(plate.size == plate.full_size for plate in plates):
        raise ValueError(
            "a latent is global, but the plate of the data has the size of a minibatch: each step "
            "would count the prior of all data once per batch. Give it the size of the whole "
            "data: pyro.plate('data', N, subsample=rows), or leave batch_size out"
        )


def _has(plate: Plate, num_rows: int) -> bool:
    return plate.name != PARTICLES and plate.size == num_rows


def _whole(model: Program, guide: Program, data: ReportData, arguments: Arguments | None) -> Batch:
    """All data as one row."""
    parts = iter(batches_of(model, guide, data, sys.maxsize, arguments))
    whole = next(parts)
    if next(parts, None) is not None:
        raise ValueError(
            "a latent is global, and all data share one posterior, but data are given in several "
            "batches: give them at once, as tensors"
        )
    return whole._replace(size=1)


def _num_rows(model: Program, guide: Program) -> int:
    """The number of data of programs without arguments; 1 where they have no plate."""
    with evaluating(model, guide), poutine.block():
        try:
            first = run(model, guide, (), {})[0]
        except TypeError as error:
            raise ValueError(
                "data is None or empty, for programs that take no arguments, but these do not run "
                f"without: {error}"
            ) from error
        plate = plate_of_data(Sites.of(first), None)
    return 1 if plate is None else plate.size
