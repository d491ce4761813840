"""The ELBO by timestep: the parts of sites that belong to each step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pyproelbo._results.by_time import by_time_table
from pyproelbo._results.result import Result
from pyproelbo._results.tables import Table
from pyproelbo._terms.expectations import Term, sum_to
from pyproelbo._terms.traces import PARTICLES, Plate, Plates

if TYPE_CHECKING:
    import xarray

TimeOf = Callable[[str], int | None]  # from a site's name to its timestep; None: it has none


@dataclass(frozen=True, eq=False, repr=False)
class ByTime(Result):
    """The ELBO by timestep, in nats: tensors of dims (T, plates), particles after the time.

    It prints as a table of few rows, with one or several timesteps each.

    Attributes:
        time: the timesteps, in rising order.
        reconstruction: log p(x_t | ...) of the data of each step.
        kl: KL(q(z_t | ...) || p(z_t | ...)) of the latents of each step, given the sampled past.
        observed: which data count, bool, the dims of ``reconstruction``: False where they are
            masked, in padding or because they are missing.
        mask: which latents count, bool, the dims of ``kl``: False in padding.
        plates: those that are dims here; a tensor without one of them has a dim of 1 there.
        timeless: the keys of the KLs that belong to no step.
    """

    time: tuple[int, ...]
    reconstruction: Tensor
    kl: Tensor
    observed: Tensor
    mask: Tensor
    plates: Plates = frozenset()
    timeless: tuple[str, ...] = ()

    def detach(self) -> "ByTime":
        """The same values without their graph."""
        return replace(self, reconstruction=self.reconstruction.detach(), kl=self.kl.detach())

    def to_xarray(self) -> "xarray.Dataset":
        """An ``xarray.Dataset``: ``reconstruction`` and ``kl`` of each sequence, in nats.

        The dims are "time", with the timesteps as coordinates, "particle" if there are several,
        and the names of the plates. Values that do not count are NaN, which the means and sums of
        xarray leave out. A minibatch is not scaled up to the whole data.
        """
        import xarray

        values = {
            "reconstruction": self._variable(self.reconstruction, self.observed),
            "kl": self._variable(self.kl, self.mask),
        }
        return xarray.Dataset(values, {"time": list(self.time)})

    def totals(self) -> "xarray.Dataset":
        """An ``xarray.Dataset`` of sums over all sequences, of dim "time".

        ``reconstruction``, ``kl`` and their difference ``elbo`` are in nats; ``frames`` counts
        the sequences that have this step, ``observed`` those that have data there. Several
        particles are averaged.
        """
        each = self._each()
        sums = each.sum([dim for dim in each.dims if dim != "time"])
        return sums.assign(elbo=sums.reconstruction - sums.kl)

    @property
    def notes(self) -> list[str]:
        """What is not here."""
        return [
            f"The KL of {key} belongs to no timestep, and is not here." for key in self.timeless
        ]

    def _table(self) -> Table:
        particles = self.to_xarray().sizes.get("particle", 1)
        return by_time_table(self.totals(), self._each().frames.sum("time").values, particles)

    def _each(self) -> "xarray.Dataset":
        """Each sequence, averaged over particles, with 0 for what does not count."""
        values = self.to_xarray()
        values = values.mean("particle") if "particle" in values.dims else values
        observed = values.reconstruction.notnull()
        frames = observed | values.kl.notnull()
        return values.fillna(0.0).assign(frames=frames, observed=observed)

    def _variable(
        self, value: Tensor, counts: Tensor
    ) -> tuple[list[str], np.ndarray, dict[str, str]]:
        """Dims, values and attributes, in xarray's form."""
        there = {p.dim: p for p in sorted(self.plates) if value.shape[p.dim] == p.size}
        plates = [there[dim] for dim in sorted(there)]
        value = value.detach() / math.prod(p.full_size / p.size for p in plates)
        value = torch.where(counts, value, torch.nan).cpu().double()
        names = ["particle" if p.name == PARTICLES else p.name for p in plates]
        shape = [len(value), *(p.size for p in plates)]
        return ["time", *names], value.reshape(shape).numpy(), {"units": "nats"}


class Timed(NamedTuple):
    """A part of the reconstruction or of the KL, and its timestep.

    Attributes:
        time: None for a sequence, whose tensors have the dims (T, *plates).
        term: its value.
        counts: 1 where it counts and 0 where it is masked, with the plates of ``term``.
    """

    time: int | None
    term: Term
    counts: Term


def by_time_of(
    reconstruction: list[Timed], kl: list[Timed], timeless: tuple[str, ...] = ()
) -> ByTime:
    """The ELBO by timestep, summed from its parts.

    Raises:
        ValueError: if there are none.
    """
    every = [*reconstruction, *kl]
    if not every:
        raise ValueError("no site has a timestep: use BetaELBO where there is no time")
    times: set[int] = set()
    for time, term, _ in every:
        times.update(range(len(term.value)) if time is None else [time])
    steps, like = tuple(sorted(times)), every[0].term.value

    sums = []
    for part in (reconstruction, kl):
        for terms in ([(t.time, t.term) for t in part], [(t.time, t.counts) for t in part]):
            sums.append(_sum_by_time(terms, steps, like))
    nesting = max(value.dim() for value in sums)
    sums = [v.reshape(len(v), *(1,) * (nesting - v.dim()), *v.shape[1:]) for v in sums]
    parts = [part for part in (reconstruction, kl) if part]
    shared = [frozenset.intersection(*(t.term.plates for t in part)) for part in parts]
    return ByTime(
        time=steps,
        reconstruction=sums[0],
        kl=sums[2],
        observed=sums[1] > 0,
        mask=sums[3] > 0,
        plates=frozenset.union(*shared),
        timeless=timeless,
    )


def _sum_by_time(
    terms: list[tuple[int | None, Term]], times: tuple[int, ...], like: Tensor
) -> Tensor:
    """Their sum at each of ``times``, over all plates that they do not share."""
    if not terms:
        return like.new_zeros(len(times))
    plates = frozenset.intersection(*(term.plates for _, term in terms))
    total: Tensor | None = None
    steps: dict[int, Tensor] = {}
    for time, term in terms:
        if time is None:  # the steps 0, ..., T - 1, the first of all times
            value = sum_to(term.value, plates, leading=1)
            value = pad(value, (0, 0) * (value.dim() - 1) + (0, len(times) - len(value)))
            total = value if total is None else total + value
        else:
            value = sum_to(term.value, plates)
            steps[time] = steps[time] + value if time in steps else value
    if steps:
        zero = torch.zeros_like(next(iter(steps.values())))
        stacked = torch.stack([steps.get(time, zero) for time in times])
        total = stacked if total is None else total + stacked
    assert total is not None
    return total


def merge_by_time(parts: list[ByTime], join: Callable[[list[Tensor]], Tensor]) -> ByTime:
    """One result from several runs; a dim that ``join`` adds after time is that of particles.

    Raises:
        ValueError: if their timesteps differ.
    """
    joined = _joined(parts, join)
    nesting = joined.kl.dim() - 1
    if nesting < parts[0].kl.dim():
        return joined
    particles = Plate(PARTICLES, -nesting, len(parts), len(parts))
    return replace(joined, plates=joined.plates | {particles})


def concatenate_by_time(parts: list[ByTime]) -> ByTime:
    """One result from several batches, joined in the plate over the sequences, at dim -1.

    A sequence then represents only itself, whatever the scale N / B of its batch.

    Raises:
        ValueError: if their timesteps differ, or if they have no such plate.
    """
    rows = [next((p for p in part.plates if p.dim == -1), None) for part in parts]
    plates = [plate for plate in rows if plate is not None]
    if not plates or len(plates) < len(parts):
        raise ValueError("a batch should have its sequences in a plate at dim -1")
    num = sum(plate.size for plate in plates)
    each = [_divided(part, p.full_size / p.size) for part, p in zip(parts, plates, strict=True)]
    joined = _joined(each, partial(torch.cat, dim=-1))
    others = joined.plates - {plates[0]}
    return replace(joined, plates=others | {plates[0]._replace(size=num, full_size=num)})


def _joined(parts: list[ByTime], join: Callable[[list[Tensor]], Tensor]) -> ByTime:
    times = {part.time for part in parts}
    if len(times) > 1:
        raise ValueError(
            f"runs of one step have different timesteps, {sorted(map(len, times))} of them: use "
            "num_particles=1, or a length that does not vary"
        )
    return replace(parts[0], **{n: join([getattr(part, n) for part in parts]) for n in _TENSORS})


def _divided(part: ByTime, scale: float) -> ByTime:
    return replace(part, reconstruction=part.reconstruction / scale, kl=part.kl / scale)


_TENSORS = ("reconstruction", "kl", "observed", "mask")
