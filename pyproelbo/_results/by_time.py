"""The table of an ELBO by timestep: few rows, of one or several timesteps each."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyproelbo._results.tables import Cell, Number, Row, Table

if TYPE_CHECKING:
    import xarray

_ROWS = 20  # of timesteps, at most
_NATS = ("reconstruction", "kl", "elbo")


def by_time_table(sums: "xarray.Dataset", lengths: np.ndarray, num_particles: int) -> Table:
    """Means over the sequences that have a step, in nats per frame, and sums per sequence.

    Args:
        sums: an ``xarray.Dataset`` over all sequences, of dim "time": ``reconstruction``, ``kl``
            and ``elbo`` in nats, ``frames`` and ``observed``, the numbers of sequences that have
            this step, and data there.
        lengths: the number of steps of each sequence.
        num_particles: the number of particles over which the sums are means.
    """
    there = sums.frames.values > 0
    times = sums.time.values[there].tolist()
    columns = {name: sums[name].values[there] for name in ("frames", "observed", *_NATS)}
    counts = ["frames", "observed"]
    if (columns["frames"] == columns["observed"]).all():
        counts = ["frames"]

    def line(label: str, part: slice) -> Row:
        num = {name: int(columns[name][part].sum()) for name in counts}
        nats = (float(columns[name][part].sum()) for name in _NATS)
        means = (Number(x / num["frames"] if num["frames"] else math.nan) for x in nats)
        return Row(label, (*num.values(), *means))

    whole: list[Cell] = [None] * len(counts)
    whole += [Number(float(columns[name].sum()) / lengths.size) for name in _NATS]
    rows = [line(label, part) for label, part in _bins(times)]
    rows += [line("all", slice(None)), Row("per sequence", tuple(whole))]
    heads = ("timestep", *counts, "reconstruction", "KL", "ELBO")
    return Table(_title(lengths, num_particles), rows, heads)


def _title(lengths: np.ndarray, num_particles: int) -> str:
    num, shortest, longest = lengths.size, int(lengths.min()), int(lengths.max())
    sequences = f"{num:,} sequences of " if num > 1 else ""
    steps = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    draws = f", mean over {num_particles:,} particles" if num_particles > 1 else ""
    return f"ELBO by timestep, nats per frame ({sequences}{steps} steps{draws})"


def _bins(times: Sequence[int]) -> Iterator[tuple[str, slice]]:
    """The steps of each row: the first has its own, the others few or many."""
    size = 1 if len(times) <= _ROWS else math.ceil((len(times) - 1) / (_ROWS - 1))
    for start in (*range(min(1, len(times))), *range(1, len(times), size)):
        part = slice(start, start + size if start else 1)
        first, last = times[part][0], times[part][-1]
        yield f"{first}-{last}" if first != last else f"{first}", part
