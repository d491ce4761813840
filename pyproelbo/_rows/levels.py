"""A program's latents by level: global ones w, and local ones z_n of each datum."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyproelbo._backend.sites import Site
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.noise import RowNoise
from pyproelbo._rows.plate import by_row, check_sampled, check_scales, data_plate
from pyproelbo._rows.runs import Runs, Use, in_chunks
from pyproelbo._rows.support import check_weighable, has_improper
from pyproelbo._rows.values import latent_values
from pyproelbo._terms.collect import plate_of_data, terms_of
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import PARTICLES, Plate, Program, Traces, run

Level = Literal["joint", "global", "local"]
ROWS = 2**16  # of draws of local latents, made at once


class Placed(Messenger):
    """Within it, sites are not drawn, but set by a function of their distribution."""

    def __init__(self, places: Mapping[str, Callable[[TorchDistribution], Tensor]]) -> None:
        super().__init__()
        self._places = places

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._places and msg["value"] is None:
            msg["value"] = self._places[msg["name"]](msg["fn"])


def places(values: Mapping[str, Tensor], first: Traces, num: int) -> dict[str, partial[Tensor]]:
    """The values for ``num`` draws (num, *shape) of sites, in a run of as many particles.

    Args:
        first: a run of one draw.
    """

    def place(name: str, _: TorchDistribution) -> Tensor:
        value, site = values[name], first.guide_sites[name]
        if num == 1:
            return value[0]
        missing = first.plate_nesting - len(site["fn"].batch_shape)
        return value.reshape(num, *(1,) * missing, *value.shape[1:])

    return {name: partial(place, name) for name in values}


class LevelWeights(NamedTuple):
    """Log-weights by level, in nats, at S draws of w and at K draws of z for each of them.

    Attributes:
        of_globals: log p(w) - log q(w), with the log-likelihood of observations that belong to no
            single datum, (S,).
        of_locals: log p(x_n, z | w) - log q(z | x_n, w), (S, K, N).
        names: the labels of the latents whose values were asked for.
        values: of these, (S, K, 1, D) for global ones, (S, K, N, D) for local ones; None if none.
    """

    of_globals: Tensor
    of_locals: Tensor
    names: tuple[str, ...] = ()
    values: Tensor | None = None


class LevelRun(NamedTuple):
    """A run of draws of z given draws of w.

    Attributes:
        numbers: the indices of the draws of z; K in a row are for one w.
        traces: of the run.
        of_globals, of_locals: as :class:`LevelWeights`, of each draw of z: (num,) and (num, N).
    """

    numbers: range
    traces: Traces
    of_globals: Tensor
    of_locals: Tensor


class NoLevelsError(ValueError):
    """Latents are all global, all local, or of an unknown level."""


class LevelDraws:
    """Draws of a guide with global and local latents: w, and z_n given w, by index.

    Attributes:
        plate: the plate of the local latents and of the data.
        is_improper: whether a prior is.

    Raises:
        ValueError: where there is no level of one kind or the other; and as
            :class:`~pyproelbo._rows.draws.RowDraws`.
    """

    def __init__(
        self, model: Program, guide: Program, batch: Batch, plate: str | None, seed: int
    ) -> None:
        self._programs, self._args, self._kwargs = (model, guide), batch.args, batch.kwargs
        self._runs, self._seed = Runs(model, guide, batch, seed), seed
        first = self._runs.first
        sites = Sites.of(first)
        check_weighable(sites)
        terms = terms_of(first, "sampled")
        check_sampled(terms)
        check_scales(terms.scales, None)
        self.plate = _local_plate(sites, first, plate)
        self._drawn = drawn = {n: s for n, s in sites.guide.items() if is_drawn(s)}
        local = {n for n, s in drawn.items() if self.is_local(s)}
        self._globals = {n: s for n, s in drawn.items() if n not in local}
        if not local or not self._globals:
            lacks, has = ("local", "global") if not local else ("global", "local")
            raise NoLevelsError(
                f"by level the guide should draw global latents, and local ones in the plate "
                f"{self.plate.name!r}, but it draws no {lacks} one: {sorted(drawn)}. Take "
                f"level='joint', or leave level= out"
                + (", for a joint draw of all latents has no levels" if has == "global" else "")
            )
        self.is_improper = has_improper(sites)

    def weights(
        self, draws: range, num_local: int, use: Use, values_of: Level | None = None
    ) -> LevelWeights:
        """The log-weights of draws of w with these indices, and ``num_local`` draws of z for each.

        Args:
            values_of: the level whose latents' values are wanted too.
        """
        of_globals, of_locals, found = [], [], []
        names: tuple[str, ...] = ()
        for part in self.runs(draws, num_local, use):
            of_globals.append(part.of_globals)
            of_locals.append(part.of_locals)
            if values_of is not None:
                names, z = self.values(part.traces, values_of)
                found.append(z)
        shape = len(draws), num_local
        z = torch.cat(found).reshape(*shape, *found[0].shape[1:]) if found else None
        return LevelWeights(
            torch.cat(of_globals).reshape(shape)[:, 0],
            torch.cat(of_locals).reshape(*shape, self.plate.size),
            names,
            z,
        )

    def runs(self, draws: range, num_local: int, use: Use) -> Iterator[LevelRun]:
        """Draws of w with these indices, each ``num_local`` times, with draws of z given it.

        A run has all draws of z for each of its w, or some for a single w.
        """
        return self.runs_at(self._draws_of_globals(draws, use), draws, num_local, use)

    def runs_at(
        self, globals_: Mapping[str, Tensor], draws: range, num_local: int, use: Use
    ) -> Iterator[LevelRun]:
        """The same at values of w, (S, *shape) by the guide's sites."""
        begin = draws.start * num_local
        for part in self._parts(len(draws), num_local):
            index = torch.arange(part.start, part.stop) // num_local
            values = {n: value[index.to(value.device)] for n, value in globals_.items()}
            numbers = range(begin + part.start, begin + part.stop)
            traces = self._traces(values, numbers, use)
            terms = terms_of(traces, "sampled")
            of_globals = self._sum(terms, local=False).reshape(-1)
            yield LevelRun(numbers, traces, of_globals, self._sum(terms, local=True))

    @property
    def first(self) -> Traces:
        """A run of one draw, which has no index."""
        return self._runs.first

    @property
    def names(self) -> tuple[set[str], set[str]]:
        """The global and the local sites that the guide draws."""
        return set(self._globals), set(self._drawn.keys() - self._globals.keys())

    def run(self, num: int) -> Traces:
        """One run of ``num`` draws, which surrounding handlers make."""
        return self._runs.run(num)

    def in_runs(self, num: int) -> Iterator[range]:
        """The numbers of ``num`` draws of all latents, as many together as are made at once."""
        return self._parts(num, 1)

    def drawn(self, traces: Traces) -> dict[str, Tensor]:
        """What the guide draws in a run, by site: (num, *shape of one draw)."""
        sites = traces.guide_sites
        shapes = {name: site["value"].shape for name, site in self._drawn.items()}
        return {name: sites[name]["value"].reshape(-1, *shape) for name, shape in shapes.items()}

    def local_axes(self) -> dict[str, int]:
        """Which dim, from the right, of what the guide draws is the plate's, by local site."""
        local = self._drawn.keys() - self._globals.keys()
        return {n: self.plate.dim - self._drawn[n]["fn"].event_dim for n in local}

    def values(self, traces: Traces, level: Level) -> tuple[tuple[str, ...], Tensor]:
        """The model's latents of a level in a run: their labels, and (num, 1 or N, D)."""
        sites = traces.model_sites
        local = {n for n, s in sites.items() if self.is_local(s)}
        if level == "local":
            return latent_values(traces, self.plate, local)
        return latent_values(traces, None, sites.keys() - local)

    def chunks(self, num: int, chunk: int | None, num_local: int) -> Iterator[range]:
        """The indices of ``num`` draws of w, grouped as they are made at once."""
        chunk = max(1, ROWS // (self.plate.size * num_local)) if chunk is None else chunk
        return in_chunks(num, chunk, self.plate.size)

    def _parts(self, num: int, num_local: int) -> Iterator[range]:
        at_once = max(1, ROWS // self.plate.size) if self._runs.at_once else 1
        if at_once >= num_local:
            return in_chunks(num * num_local, at_once // num_local * num_local, 1)
        each = list(in_chunks(num_local, at_once, 1))
        starts = range(0, num * num_local, num_local)
        return (range(s + part.start, s + part.stop) for s in starts for part in each)

    def _draws_of_globals(self, draws: range, use: Use) -> dict[str, Tensor]:
        """(S, *shape) by site."""
        runs = self._runs.traces(self.plate.name, draws, use, 0)
        found = {}
        for name, site in self._globals.items():
            values = [traces.guide_sites[name]["value"] for traces in runs]
            found[name] = torch.cat([v.reshape(-1, *site["value"].shape) for v in values])
        return found

    def _traces(self, globals_: Mapping[str, Tensor], numbers: range, use: Use) -> Traces:
        """One run, with these values of w, and z drawn by number."""
        model, guide = self._programs
        num, first = len(numbers), self._runs.first
        held = Placed(places(globals_, first, num))(guide)
        with RowNoise(self.plate.name, 0, numbers, self._seed, use, 1):
            return run(
                model,
                held,
                self._args,
                self._kwargs,
                num_particles=num,
                max_plate_nesting=first.plate_nesting,
            )[0]

    def _sum(self, terms: Terms, local: bool) -> Tensor:
        """log p - log q of the local terms, (num, N), or of the global ones, (num, 1)."""
        plate = self.plate if local else None
        total: Tensor | float = 0.0
        for sign, part in (
            (1, terms.log_likelihood),
            (1, terms.factors),
            (1, terms.log_prior),
            (-1, terms.log_q),
        ):
            values = [v for name, v in part.items() if self._in_plate(terms, name) == local]
            total = total + sign * by_row(values, terms.num_particles, plate).double()
        assert isinstance(total, Tensor)
        size = self.plate.size if local else 1
        return total.expand(terms.num_particles, size).cpu()

    def _in_plate(self, terms: Terms, name: str) -> bool:
        names = [name] if name in terms.plates else name.split("+")
        return all(self.plate.name in {p.name for p in terms.plates[n]} for n in names)

    def is_local(self, site: Site) -> bool:
        """Whether a site is in the plate of the data."""
        return self.plate.name in {plate.name for plate in site["plates"]}


def _local_plate(sites: Sites, first: Traces, name: str | None) -> Plate:
    """The plate that has the data and some of the latents."""
    observed = {n: s["plates"] for n, s in sites.data.items()}
    if name is not None:
        return data_plate(observed, name)
    found = plate_of_data(sites, first.num_rows)
    shared = frozenset.intersection(*observed.values()) if observed else frozenset()
    names = {plate.name for plate in shared if plate.name != PARTICLES}
    if found is None or found.name not in names:
        raise NoLevelsError(
            "by level latents of single data should be in a plate together with these, but "
            + ("there is no plate" if found is None else f"plate {found.name!r} has no data")
            + ": take level='joint', or leave level= out"
        )
    return found
