"""What a result is of, by which parts of a whole are told apart."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Origin(NamedTuple):
    """The rows that a result is of, and what they depend on besides the data.

    Attributes:
        start, stop: the index of the first row in the whole data, and that after the last.
        seed: of the draws.
        programs: what tells model and guide, with their parameters, from others.
    """

    start: int
    stop: int
    seed: int
    programs: str

    @property
    def place(self) -> tuple[int, ...]:
        """The order of parts."""
        return self.start, self.stop

    @property
    def rows(self) -> range | None:
        """The indices of the rows in the whole data."""
        return range(self.start, self.stop)


class Simulations(NamedTuple):
    """The simulations that a result is of.

    Attributes:
        seeds: of these, each of independent ones.
        programs: what tells model and guide, with their parameters, from others.
    """

    seeds: tuple[int, ...]
    programs: str

    @property
    def place(self) -> tuple[int, ...]:
        """The order of parts."""
        return self.seeds

    @property
    def rows(self) -> range | None:
        """None: they have no place in a whole."""
        return None


def joined(origins: Sequence[Origin | Simulations]) -> Origin | Simulations:
    """That of the whole, from those of its parts in their order.

    Raises:
        ValueError: for parts that are of no whole.
    """
    first = origins[0]
    if any(other.programs != first.programs for other in origins):
        raise ValueError(
            "results should be of the same model and guide: their parameters, or their names, "
            "differ"
        )
    if isinstance(first, Simulations):
        return _simulations([x for x in origins if isinstance(x, Simulations)])
    return _rows([x for x in origins if isinstance(x, Origin)])


def _simulations(origins: Sequence[Simulations]) -> Simulations:
    seeds = tuple(seed for origin in origins for seed in origin.seeds)
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(
            f"results should have different seeds, got {twice[0]} twice: the simulations of one "
            "seed are the same"
        )
    return origins[0]._replace(seeds=seeds)


def _rows(origins: Sequence[Origin]) -> Origin:
    first = origins[0]
    for other in origins[1:]:
        if other.seed != first.seed:
            raise ValueError(
                f"results should have the same seed, got {first.seed} and {other.seed}: draws of "
                "one seed differ from row to row, and are those of one process"
            )
    for one, after in pairwise(origins):
        if after.start < one.stop:
            raise ValueError(
                f"rows {after.start} to {min(one.stop, after.stop) - 1} are in two results: give "
                f"the place of each part in the whole, {_HOW}"
            )
        if after.start > one.stop:
            raise ValueError(
                f"rows {one.stop} to {after.start - 1} are missing: add their result, or give the "
                f"place of each part in the whole, {_HOW}"
            )
    return first._replace(stop=origins[-1].stop)


_HOW = "by pe.Shard(data, start=...)"
