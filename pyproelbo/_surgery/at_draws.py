"""From the draws of all data to the surgery: q(z) at all draws, or at those of some data."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from pyproelbo._messages.warn import warn
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.passes import UnfinishedWarning, bar, by_part, keep_in
from pyproelbo._surgery.draws import DataDraws
from pyproelbo._surgery.estimates import estimates_of
from pyproelbo._surgery.expected_time import Pairs, forewarned
from pyproelbo._surgery.guide_aggregate import (
    DataPart,
    Sums,
    data_parts,
    normal_marginals,
    sums_by_workers,
)
from pyproelbo._surgery.local_latents import LocalLatents
from pyproelbo._surgery.points import Points, points
from pyproelbo._surgery.result import SCALARS, VECTORS, Surgery
from pyproelbo._surgery.series import At
from pyproelbo._terms.traces import Program


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

    def parts(self, at: Sequence[DataDraws]) -> Iterator[DataPart]:
        """All data, part by part, with their densities at some draws."""
        of = self.guide, self.batches, self.which, self.draws, at
        return data_parts(*of) if self.executor is None else sums_by_workers(*of, self.executor)


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
        first, joint, by_dim = draws, *sums.log_mean()
        if sums.num_data < num_data:
            seen = [part.rows < sums.num_data for part in draws]
            first = [part.at(rows) for part, rows in zip(draws, seen, strict=True)]
            joint, by_dim = (v if v is None else v[torch.cat(seen)] for v in (joint, by_dim))
        assert joint is not None

        def marginals() -> At | None:
            of = normal_marginals(first) if which.is_gaussian else by_dim
            return None if of is None else At.of(first, of)

        return _with_marginals(drawn, first, At.of(first, joint), marginals)

    shown = bar(parts, "aggregate posterior", progress, total)
    return by_part(shown, added, of_first, "surgery", lambda part: f"{part.stop} data")


def at_some(drawn: Drawn, num: int, seed: int, progress: bool) -> Surgery:
    """Surgery with q(z) at the draws of ``num`` of the data; Ctrl-C leaves that of fewer."""
    which, draws = drawn.which, drawn.draws

    def added(found: _Found | None, part: Points) -> _Found:
        rows = part.rows.to(draws[0].rows.device)
        at = [each.at(torch.isin(each.rows, rows)) for each in draws]
        sums = Sums(which, at)
        for data in drawn.parts(at):
            sums = sums.after(data)
        joint, by_dim = sums.log_mean()
        one = At.of(at, joint), None if by_dim is None else At.of(at, by_dim)
        return [*(found or []), one]

    def of_points(found: _Found, _: bool) -> Surgery:
        joint, by_dim = zip(*found, strict=True)

        def marginals() -> At | None:
            if which.is_gaussian:  # interpolated, they take less time than the pairs
                return At.of(draws, normal_marginals(draws, torch.device("cpu")))
            known = [part for part in by_dim if part is not None]
            return At.joined(known) if known else None

        return _with_marginals(drawn, draws, At.joined(joint), marginals)

    num_data = len(draws[0].rows)
    parts = list(points(num_data, num, seed))
    shown = bar(parts, "aggregate posterior", progress)
    return by_part(
        shown, added, of_points, "surgery", lambda part: f"{part.stop} of {num} points of q(z)"
    )


_Found = list[tuple[At, At | None]]


def _with_marginals(
    drawn: Drawn,
    draws: Sequence[DataDraws],
    joint: At,
    marginals: Callable[[], At | None],
) -> Surgery:
    """The surgery, without marginals if Ctrl-C or an error comes before they are finished."""
    is_there, found = False, None
    try:
        found, is_there = marginals(), True
        return _surgery(drawn, draws, joint, found)
    except KeyboardInterrupt:
        what = "whole" if is_there else "without the marginals of q(z), which are None"
        warn(f"interrupted: the surgery is {what}", UnfinishedWarning)
        return _surgery(drawn, draws, joint, found)
    except Exception as error:
        if not is_there:
            keep_in(error, "surgery", _surgery(drawn, draws, joint, None), "without marginals")
        raise


def _surgery(
    drawn: Drawn, draws: Sequence[DataDraws], joint: At, log_q_by_dim: At | None
) -> Surgery:
    found = estimates_of(drawn.which, draws, joint, log_q_by_dim, drawn.num_samples)
    return Surgery(
        **{**dict.fromkeys((*SCALARS, *VECTORS)), "global_kl": 0.0, **found.mean},
        stderr=found.stderr,
        active_units=found.active_units,
        log_n=math.log(found.num_data),
        num_data=found.num_data,
        num_samples=drawn.num_samples,
        dims=drawn.which.dims,
        codes=draws[0].by_dim["z"].cpu(),
        given=drawn.which.given,
        num_points=found.num_points,
    )
