"""The expected time for all pairs of a draw and a posterior, from the first of them."""

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from pyproelbo._messages.durations import duration
from pyproelbo._messages.warn import warn
from pyproelbo._surgery.guide_aggregate import Blocks, DataPart
from pyproelbo._surgery.points import LEAST

LONG = 600.0  # seconds, beyond which a warning is given
_TIMED = 0.25  # seconds, for which the first pairs are timed
_SUGGESTED = 300.0  # seconds, for the suggested alternative


class LongRunWarning(UserWarning):
    """A long run: the message gives the expected time, and a faster alternative."""


class Pairs(NamedTuple):
    """The number of pairs to be summed.

    Attributes:
        num_draws: of all data, including those that only show the noise.
        num_data: N.
        num_samples: S.
        num_runs: the number of surgeries.
    """

    num_draws: int
    num_data: int
    num_samples: int
    num_runs: int


def forewarned(parts: Iterable[DataPart], pairs: Pairs) -> Iterator[DataPart]:
    """The parts, with a :class:`LongRunWarning` after their first blocks where it is due."""
    clock, start = _Clock(pairs), 0
    for part in parts:
        yield part._replace(blocks=clock.timed(part.blocks, part.stop - start))
        start = part.stop


class _Clock:
    def __init__(self, pairs: Pairs) -> None:
        self._pairs, self._done = pairs, 0
        self._begun: float | None = None
        self._is_over = False

    def timed(self, blocks: Blocks, num: int) -> Blocks:
        """The blocks of ``num`` data."""
        for block in blocks:
            yield block
            if self._is_over:
                continue
            if self._begun is None:  # the first block may take longer than the others
                self._begun = _now(block[1])
                continue
            self._done += len(block[1]) * num
            if perf_counter() - self._begun > _TIMED:
                self._is_over = True
                _tell(self._done / (_now(block[1]) - self._begun), self._pairs)


def _now(block: Tensor) -> float:
    """The time when work on a block is finished, on its device too."""
    block.flatten()[:1].cpu()
    return perf_counter()


def _tell(rate: float, pairs: Pairs) -> None:
    """Warn of a long time, from the number of pairs per second."""
    drawn = pairs.num_draws * pairs.num_data * pairs.num_runs
    if drawn <= rate * LONG:
        return
    a_datum = pairs.num_samples * pairs.num_data * pairs.num_runs
    share = pairs.num_data * a_datum / drawn
    suggested = max(LEAST * a_datum, _rounded(rate * _SUGGESTED * share))
    seconds = suggested / share / rate
    warn(
        f"surgery sums q(z) over all pairs of {pairs.num_data:,} data, which takes about "
        f"{duration(drawn / rate)} here. pe.surgery(..., max_pairs={suggested:_}) takes about "
        f"{duration(seconds)}: q(z) at the draws of {suggested // a_datum:,} data, with errors "
        "that include this choice",
        LongRunWarning,
    )


def _rounded(value: float) -> int:
    """Down to one digit."""
    digits = len(str(int(value))) - 1
    return int(value) // 10**digits * 10**digits
