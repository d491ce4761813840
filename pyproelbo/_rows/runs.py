"""A guide, and a model on its draws, at indexed draws: by row, at once or one by one."""

from collections.abc import Iterator
from enum import IntEnum
from functools import cached_property

from pyproelbo._distributions.sobol import Points
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.noise import RowNoise
from pyproelbo._rows.several import may_be_at_once
from pyproelbo._terms.traces import UNKNOWN, Program, Traces, run

ROWS = 2560  # of draws of a batch, made at once
SMALL_ROWS, NUMBERS = 20480, 2**18  # at most this many, where a site has no more numbers than that


class Use(IntEnum):
    """The use of draws: those of different uses are independent."""

    WEIGHTS = 1
    FORMS = 2
    FIT = 3
    BEST = 4
    PILOT = 5
    CHAINS = 6
    BACK = 7
    RANKS = 8
    TIES = 9
    POSTERIOR = 10
    PREDICTIVE = 11
    PREDICTIONS = 12
    PRIOR = 13
    SEQUENCES = 14
    GLOBALS = 15
    LOCALS = 16
    MIXTURE = 17
    PICKS = 18
    SIMULATIONS = 19
    FIXED = 20
    FISHER = 21
    CORRELATED = 22
    OF_PRIOR = 23
    MOVES = 24
    RESAMPLED = 25
    POINTS = 26
    STARTS = 27
    MODES = 28
    LEVELS = 29
    IMPROVED = 30


class Runs:
    """The runs of a model and a guide on some rows of the data.

    Draw s of row n is the same whatever rows and draws are made with it, except for distributions
    that can only be drawn as a whole (:class:`~pyproelbo._rows.noise.RowNoise`).

    Args:
        batch: the rows.
        seed: of the draws.
        points: the Sobol points that draws are made from; by default they are independent.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: Batch,
        seed: int,
        points: Points | None = None,
    ) -> None:
        self._programs = model, guide, batch.args, batch.kwargs
        self._places, self.seed, self.points = batch.places, seed, points

    @cached_property
    def first(self) -> Traces:
        """A run of one draw, which has no index; made on demand."""
        return run(*self._programs)[0]

    def traces(self, plate: str | None, draws: range, *use: int) -> list[Traces]:
        """The runs of draws with these indices, all in one run where that is correct.

        Args:
            plate: the name of the plate over the data; None where all data are one row.
            use: their use, as whole numbers; none is a use too.
        """
        at_once = len(draws) == 1 or self.at_once
        found = []
        for part in [draws] if at_once else [range(s, s + 1) for s in draws]:
            with RowNoise(plate, self._places, part, self.seed, *use, points=self.points):
                found.append(self.run(len(part)))
        return found

    def run(self, num: int) -> Traces:
        """One run of ``num`` draws, which handlers around it make."""
        is_needed = num > 1 or "first" in vars(self)  # otherwise it would cost an extra run
        nesting = self.first.plate_nesting if is_needed else UNKNOWN
        return run(*self._programs, num_particles=num, max_plate_nesting=nesting)[0]

    @cached_property
    def at_once(self) -> bool:
        """Whether several draws are made at once; tested on first use."""
        return may_be_at_once(*self._programs, self.first)


def in_chunks(
    num: int, chunk: int | None, rows: int, numbers: int | None = None
) -> Iterator[range]:
    """The indices of ``num`` draws, at most ``chunk`` together.

    Args:
        chunk: by default ``ROWS`` rows; more where they are known to be small.
        rows: of each draw.
        numbers: that the largest site has in each draw, where it is known.
    """
    if chunk is None:
        small = 0 if numbers is None else min(SMALL_ROWS // rows, NUMBERS // numbers)
        chunk = max(1, ROWS // rows, small)
    return (range(start, min(start + chunk, num)) for start in range(0, num, chunk))
