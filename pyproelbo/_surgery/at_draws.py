"""From the draws of all data to the surgery: q(z) at all draws, or at those of some data."""

import torch

from pyproelbo._rows.passes import bar, by_part
from pyproelbo._surgery.drawing import Drawn
from pyproelbo._surgery.draws import of_data
from pyproelbo._surgery.expected_time import Pairs, forewarned
from pyproelbo._surgery.guide_aggregate import DataPart, Sums
from pyproelbo._surgery.of_sums import surgery_of
from pyproelbo._surgery.points import Points, points
from pyproelbo._surgery.result import Surgery
from pyproelbo._surgery.series import At


def at_all(drawn: Drawn, num_runs: int, progress: bool, total: int | None) -> Surgery:
    """Surgery with q(z) at all draws; Ctrl-C leaves the surgery of the first data.

    Args:
        num_runs: the number of surgeries that take as long, for the warning of a long run; 0 for no
            warning.
        total: the number of batches, where known.
    """
    which, draws = drawn.which, drawn.draws
    num_data = len(draws[0].rows)
    parts = drawn.parts(draws)
    num_draws = sum(len(part.rows) for part in draws)
    parts = forewarned(parts, Pairs(num_draws, num_data, drawn.num_samples, num_runs))

    def added(sums: Sums | None, part: DataPart) -> Sums:
        return (Sums(which, draws) if sums is None else sums).after(part)

    def of_first(sums: Sums, _: bool) -> Surgery:
        first, found = draws, sums.log_mean()
        if sums.num_data < num_data:
            seen = [part.rows < sums.num_data for part in draws]
            first = [part.at(rows) for part, rows in zip(draws, seen, strict=True)]
            found = [value if value is None else value[torch.cat(seen)] for value in found]
        joint, by_dim = (None if value is None else At.of(first, value) for value in found)
        assert joint is not None
        return surgery_of(which, drawn.num_samples, first, joint, by_dim, drawn.executor)

    shown = bar(parts, "aggregate posterior", progress, total)
    return by_part(shown, added, of_first, "surgery", lambda part: f"{part.stop} data")


def at_some(drawn: Drawn, num: int, seed: int, progress: bool) -> Surgery:
    """Surgery with q(z) at the draws of ``num`` of the data; Ctrl-C leaves that of fewer."""
    which, draws = drawn.which, drawn.draws

    def added(found: _Found | None, part: Points) -> _Found:
        at = of_data(draws, part.rows)
        sums = Sums(which, at)
        for data in drawn.parts(at):
            sums = sums.after(data)
        joint, by_dim = sums.log_mean()
        one = At.of(at, joint), None if by_dim is None else At.of(at, by_dim)
        return [*(found or []), one]

    def of_points(found: _Found, _: bool) -> Surgery:
        joint, by_dim = zip(*found, strict=True)
        known = [part for part in by_dim if part is not None]
        marginals = At.joined(known) if known else None
        at = At.joined(joint)
        return surgery_of(which, drawn.num_samples, draws, at, marginals, drawn.executor)

    num_data = len(draws[0].rows)
    parts = list(points(num_data, num, seed))
    shown = bar(parts, "aggregate posterior", progress)
    return by_part(
        shown, added, of_points, "surgery", lambda part: f"{part.stop} of {num} points of q(z)"
    )


_Found = list[tuple[At, At | None]]
