"""The rows that each method repairs, batch by batch."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyproelbo._evidence.coordinates import NotContinuousError
from pyproelbo._evidence.missed import TIMES, Known, of_prior
from pyproelbo._evidence.modes import search, unreached
from pyproelbo._evidence.repair_judged import judged
from pyproelbo._evidence.repair_settings import (
    CannotRepairError,
    Near,
    Settings,
    Target,
    Weighted,
)
from pyproelbo._evidence.repair_steps import WAYS, of_guide, picks_of
from pyproelbo._evidence.resampling import taken
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.levels import Placed, places
from pyproelbo._rows.values import latent_names, row_axis
from pyproelbo._terms.roles import is_drawn

AT_ONCE = 16  # rows that are annealed together, to keep a limit of time
ONE_MODE = ("family", "correlated")
CONTINUOUS, DISCRETE = ("family", "correlated", "modes", "annealed"), ("mixture",)


class Part(NamedTuple):
    """What is kept from some rows for which a method has been tried.

    Attributes:
        name: of the method.
        rows: their indices, from that of the first row on, (M,).
        draws: by site, (S, M, ...), of equal weight.
        khat, ess, passes: (M,).
    """

    name: str
    rows: Tensor
    draws: Mapping[str, Tensor]
    khat: Tensor
    ess: Tensor
    passes: Tensor


class Left(NamedTuple):
    """Rows that have not passed.

    Attributes:
        batch: these rows, with others where they cannot be separated.
        within: their indices in the batch, (M,).
        rows: their indices, from that of the first row on, (M,).
        khat: the smallest so far, (M,).
        known: log p(x) by draws of the prior, or by an earlier method, where that is higher.
        near: what is known about the posteriors of all rows of the batch.
        is_far: for each row, whether the draws of the last method miss a mode, (M,).
        is_fine: whether their weights have no other fault, (M,).
    """

    batch: Batch
    within: Tensor
    rows: Tensor
    khat: Tensor
    known: Known
    near: Near
    is_far: Tensor
    is_fine: Tensor

    @classmethod
    def of(cls, batch: Batch, within: Tensor, rows: Tensor, known: Known, near: Near) -> "Left":
        """Rows for which nothing has been tried."""
        khat = torch.full(rows.shape, torch.inf, dtype=torch.float64, device="cpu")
        no = torch.zeros_like(rows, dtype=torch.bool)
        return cls(batch, within, rows, khat, known, near, no, no)

    def take(self, keep: Tensor, alone: bool = False) -> "Left":
        """Some of them, alone where they can be separated from the others of their batch."""
        index, near, batch = self.within[keep], self.near, self.batch
        if alone:
            near = near.take(index)
            batch, index = batch.take(index), torch.arange(len(keep), device="cpu")
        of_rows = self.rows[keep], self.khat[keep], self.known.take(keep)
        return Left(batch, index, *of_rows, near, self.is_far[keep], self.is_fine[keep])


class Jobs:
    """All that is to be done, in order: an iterable of :class:`Job`.

    Args:
        to: the settings of all methods.
        batches: of the data.
        methods: those after the guide; None for those that the latents allow.
        max_time: seconds after which none of these is started.
        narrow: the factor by which weighted draws may be wider than the draws.

    Attributes:
        seconds: by method, and "prior".
        left_out: methods that do not apply to these programs, and why.
        sites: the model's latents.
        is_discrete: whether one of them is.
        is_searched: whether ascents have looked for modes.
        plate: the name of the plate over the data; None where all data are one row.
        start: the index of the first row in the whole data, once it is known.
        num_rows: the number of rows for which the guide has been weighted.
    """

    def __init__(
        self,
        to: Settings,
        batches: Iterable[Batch],
        methods: Sequence[str] | None,
        max_time: float | None,
        narrow: float,
    ) -> None:
        self.to, self.narrow = to, narrow
        self._batches, self._methods = batches, tuple(methods or ())
        self._is_default = methods is None
        self._until = None if max_time is None else time.monotonic() + max_time
        self.seconds: dict[str, float] = defaultdict(float)
        self.left_out: dict[str, str] = {}
        self.sites: list[str] = []
        self.is_discrete = False
        self.plate: str | None = None
        self.start, self.num_rows = 0, 0
        self._cost: list[tuple[Tensor, float]] = []
        self._seen: list[Tensor] = []
        self._untried: list[Tensor] = []
        self.is_searched = False
        self._can_be_alone = True

    def __iter__(self) -> Iterator["Job"]:
        left: list[Left] = []
        for batch in self._batches:
            job = Job(self, "guide", batch=batch)
            yield job
            left += job.left
            self._untried = [part.rows for part in left]
        for name in self._methods:
            left, waits = _parted(left, name, "modes" in self._methods)
            now, left = self._split(left, AT_ONCE if name == "annealed" else None), waits
            for i, part in enumerate(now):
                if name in self.left_out:
                    left += now[i:]
                    break
                if self._until is not None and time.monotonic() > self._until:
                    self._untried = [p.rows for p in (*left, *now[i:])]
                    return
                job = Job(self, name, left=part)
                yield job
                left += job.left
        self._untried = []

    def spend(self, name: str, rows: Tensor, seconds: float) -> None:
        """Record the seconds that a method has taken for some rows together."""
        self.seconds[name] += seconds
        self._cost.append((rows, seconds / len(rows)))

    def see(self, sees: Tensor, is_searched: bool) -> None:
        """Record where draws of the prior detect modes in the next rows, and if ascents ran."""
        self._seen.append(sees)
        self.is_searched = is_searched

    def cost(self, num: int) -> Tensor:
        """Seconds for each of the first rows, (num,)."""
        total = torch.zeros(num, dtype=torch.float64, device="cpu")
        for rows, seconds in self._cost:
            total[rows[rows < num]] += seconds
        return total

    def sees_modes(self, num: int) -> Tensor:
        """Where draws of the prior detect modes, (num,)."""
        return torch.cat(self._seen)[:num]

    def is_exhausted(self, num: int) -> Tensor:
        """Where all intended methods have been tried, (num,)."""
        found = torch.ones(num, dtype=torch.bool, device="cpu")
        for rows in self._untried:
            found[rows[rows < num]] = False
        return found

    def begin(self, batch: Batch) -> None:
        """Examine the programs, on the first data.

        Raises:
            ValueError: for a guide that draws nothing.
        """
        if self.sites:
            return
        draws = self.to.draws(batch)
        self.sites = latent_names(draws.first)
        self.plate = None if draws.plate is None else draws.plate.name
        if not self.sites:
            raise ValueError("the guide draws no latent: there is no posterior to repair")
        try:
            self.to.coordinates(batch)
        except NotContinuousError:
            self.is_discrete = True
        if self._is_default:
            self._methods = DISCRETE if self.is_discrete else CONTINUOUS

    def _split(self, left: list[Left], most: int | None) -> list[Left]:
        """Each part's rows alone, at most ``most``, where that is possible."""
        found = []
        for part in left:
            whole = torch.arange(len(part.rows), device="cpu")
            alone = part.take(whole, alone=True)
            if len(whole) < part.batch.size and not self._is_alone(part, alone):
                found.append(part)
                continue
            for keep in whole.split(len(whole) if most is None else most):
                found.append(part.take(keep, alone=True))
        return found

    def _is_alone(self, part: Left, alone: Left) -> bool:
        """Whether the programs give the same for some rows alone as within their batch."""
        if not self._can_be_alone:
            return False
        draws = self.to.draws(part.batch)
        first, plate, index = draws.first, draws.plate, part.within
        if plate is None:
            return True
        expected = draws.terms(first).log_weight[0, index]
        values = {}
        for name, site in first.guide_sites.items():
            if is_drawn(site):
                axis = row_axis(site, plate)
                assert axis is not None
                values[name] = (
                    site["value"].index_select(axis, index.to(site["value"].device)).unsqueeze(0)
                )
        try:
            with pyro.validation_enabled(False), Placed(places(values, first, 1)):
                found = self.to.draws(alone.batch)
                same = found.terms(found.first).log_weight[0]
        except (ValueError, RuntimeError, IndexError):
            self._can_be_alone = False
            return False
        near = torch.finfo(expected.dtype).eps ** 0.5
        return torch.allclose(same, expected, rtol=near, atol=near, equal_nan=True)


def _parted(left: list[Left], name: str, seeks: bool) -> tuple[list[Left], list[Left]]:
    """Rows for which a method is tried, and others.

    Those that lack a mode and nothing else wait for "modes", where that is a method.
    """
    found: tuple[list[Left], list[Left]] = [], []
    for part in left:
        now = torch.ones_like(part.is_far)
        if name == "modes":
            now = part.is_far
        elif name in ONE_MODE and seeks:
            now = ~(part.is_far & part.is_fine)
        for kind, where in zip(found, (now, ~now), strict=True):
            if where.any():
                kind.append(part.take(where.nonzero()[:, 0]))
    return found


class Job:
    """One method, for the rows of one batch.

    Args:
        batch: if new, all of its rows are tried.
        left: the rows that have not passed so far.

    Attributes:
        name: of the method.
        left: the rows that have not passed, once it has run.
        until: the number of data processed, once it has run.
    """

    def __init__(
        self, jobs: Jobs, name: str, batch: Batch | None = None, left: Left | None = None
    ) -> None:
        self.name, self._jobs, self._batch, self._left = name, jobs, batch, left
        self.left: list[Left] = []

    def run(self) -> list[Part]:
        """What is to be kept; empty where the method does not apply to these programs."""
        if self._left is None:
            return [self._first()]
        return self._next(self._left)

    def _first(self) -> Part:
        jobs, batch = self._jobs, self._batch
        assert batch is not None
        if jobs.num_rows == 0:
            jobs.start = batch.start
        to, first = jobs.to, batch.start - jobs.start
        rows = torch.arange(first, first + batch.size, device="cpu")
        begin = time.monotonic()
        jobs.begin(batch)
        found = of_guide(to, batch)
        if jobs.is_discrete:  # a value that is never drawn has no weight
            found = found._replace(is_good=torch.zeros(batch.size, dtype=torch.bool, device="cpu"))
        jobs.spend("guide", rows, time.monotonic() - begin)
        begin = time.monotonic()
        prior = of_prior(to.model, batch, to.unit, TIMES * to.num_samples, to.chunk, to.seed)
        jobs.spend("prior", rows, time.monotonic() - begin)
        begin = time.monotonic()
        modes = None if found.near is None else search(to, batch, found.near)
        jobs.spend("search", rows, time.monotonic() - begin)
        jobs.see(prior.sees_half, modes is not None)
        jobs.num_rows = first + batch.size
        begin = time.monotonic()
        within = torch.arange(batch.size, device="cpu")
        part = self._judged(found, Left.of(batch, within, rows, prior, Near(found.near, modes)))
        jobs.spend("guide", rows, time.monotonic() - begin)
        return part

    def _next(self, left: Left) -> list[Part]:
        jobs, begin = self._jobs, time.monotonic()
        try:
            found = WAYS[self.name](jobs.to, left.batch, left.near)
        except (CannotRepairError, ValueError) as error:
            jobs.left_out[self.name] = str(error)
            self.left = [left]
            return []
        part = self._judged(found, left)
        jobs.spend(self.name, left.rows, time.monotonic() - begin)
        better = part.passes | (part.khat < left.khat)
        keep = better.nonzero()[:, 0]
        draws = {name: value[:, keep] for name, value in part.draws.items()}
        columns = (part.khat[keep], part.ess[keep], part.passes[keep])
        return [Part(self.name, part.rows[keep], draws, *columns)]

    def _target(self, left: Left) -> Target:
        assert left.near.gaussian is not None
        return Target.of(self._jobs.to, left.batch, left.near.gaussian)

    def _judged(self, found: Weighted, left: Left) -> Part:
        """The judged rows; those that do not pass are left."""
        to, index = self._jobs.to, left.within
        verdict = judged(found, self._jobs.narrow)
        khat, ess = verdict.khat[index], verdict.effective_sample_size[index]
        estimate = Known(verdict.log_evidence[index], verdict.stderr[index])
        is_far = torch.zeros(len(index), dtype=torch.bool, device="cpu")
        if left.near.modes is not None and found.points is not None:
            near = left.near.modes, found.points
            is_far = unreached(*near, partial(self._target, left)).cpu()[index]
        passes = verdict.passes[index] & ~left.known.misses(*estimate) & ~is_far
        values = found.values
        if not found.equal:
            picks = picks_of(verdict.smoothed, to, left.batch)
            values = {name: taken(value, picks) for name, value in values.items()}
        draws = {name: value.cpu()[:, index] for name, value in values.items()}
        bad = (~passes).nonzero()[:, 0]
        if len(bad):
            near = left.near if found.near is None else left.near._replace(gaussian=found.near)
            left = left._replace(
                khat=torch.minimum(khat, left.khat),
                known=left.known.or_higher(estimate, verdict.passes[index]),
                near=near,
                is_far=is_far,
                is_fine=verdict.passes[index],
            )
            self.left = [left.take(bad)]
        return Part(self.name, left.rows, draws, khat, ess, passes)


def data_until(job: Job) -> str:
    """The progress of a job, in words."""
    num = f"{job._jobs.start + job._jobs.num_rows} data"
    return num if job.name == "guide" else f"{num}, of which not all were repaired"
