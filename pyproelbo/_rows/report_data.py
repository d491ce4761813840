"""The data that a report is of."""

from collections.abc import Mapping
from operator import length_hint

from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch.utils.data import RandomSampler, SubsetRandomSampler

from pyproelbo._rows.batches import Arguments, Batches, ReportData, device_of
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._terms.collect import plate_of_data
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import Program, run


def batches_of(
    model: Program,
    guide: Program,
    data: ReportData,
    batch_size: int,
    arguments: Arguments | None = None,
) -> Batches:
    """The data in batches, on the device of the programs' parameters.

    Raises:
        ValueError: as :class:`Batches`.
    """
    if isinstance(data, tuple | Mapping) and not data:
        data = None
    num_rows = _num_rows(model, guide) if data is None else None
    batches = Batches(data, batch_size, device_of(guide, model), arguments, num_rows)
    if isinstance(poutine.unwrap(guide), AutoGuide) and length_hint(batches, 2) > 1:
        raise ValueError(
            "an AutoGuide has parameters of its own for every row of the data: let batch_size be "
            "at least their number, so that it sees all at once"
        )
    return batches


def check_in_order(data: ReportData) -> None:
    """Whether what is given for the data beside them can be of the same data in the same order.

    Raises:
        ValueError: for a loader that shuffles.
    """
    if isinstance(getattr(data, "sampler", None), RandomSampler | SubsetRandomSampler):
        raise ValueError(
            "evidence= and latents= are of the data in their order, but the loader has another "
            "order in each pass: give the data themselves, or a loader with shuffle=False"
        )


def _num_rows(model: Program, guide: Program) -> int | None:
    """How many data programs have that take no arguments, None where they have no plate."""
    with evaluating(model, guide), poutine.block():
        try:
            first = run(model, guide, (), {})[0]
        except TypeError as error:
            raise ValueError(
                "data is None or empty, for programs that take no arguments, but these do not run "
                f"without: {error}"
            ) from error
        plate = plate_of_data(Sites.of(first), None)
    return None if plate is None else plate.size
