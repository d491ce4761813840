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
from pyproelbo._rows.support import check_covered, has_improper
from pyproelbo._rows.values import latent_values
from pyproelbo._terms.collect import plate_of_data, terms_of
from pyproelbo._terms.masked_latents import check_masks
from pyproelbo._terms.roles import is_drawn
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import PARTICLES, Plate, Program, Traces, run

Level = Literal["joint", "global", "local"]
ROWS = 2**16  # of draws of local latents, that are made at once


class Placed(Messenger):
    """Inside, sites are not drawn, but put where a function of their distribution says."""

    def __init__(self, places: Mapping[str, Callable[[TorchDistribution], Tensor]]) -> None:
        super().__init__()
        self._places = places

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._places and msg["value"] is None:
            msg["value"] = self._places[msg["name"]](msg["fn"])


def places(values: Mapping[str, Tensor], first: Traces, num: int) -> dict[str, partial[Tensor]]:
    """Where ``num`` draws (num, *shape) of sites are put, in a run of as many particles.

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
        of_globals: log p(w) - log q(w), with what of the data is of no single datum, (S,).
        of_locals: log p(x_n, z | w) - log q(z | x_n, w), (S, K, N).
        names: the labels of the latents whose values were asked for.
        values: of these, (S, K, 1, D) of global ones, (S, K, N, D) of local ones; None of none.
    """

    of_globals: Tensor
    of_locals: Tensor
    names: tuple[str, ...] = ()
    values: Tensor | None = None


class NoLevelsError(ValueError):
    """Latents are all global, all local, or of no level that is known."""


class LevelDraws:
    """Draws of a guide with global and local latents: w, and z_n given w, by their numbers.

    Attributes:
        plate: that of the local latents and of the data.
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
        sites.check_observed()
        check_masks(sites)
        check_covered(sites)
        terms = terms_of(first, "sampled")
        check_sampled(terms)
        check_scales(terms.scales, None)
        self.plate = _local_plate(sites, first, plate)
        drawn = {n: s for n, s in sites.guide.items() if is_drawn(s)}
        local = {n for n, s in drawn.items() if self._is_local(s)}
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
        """Those of draws of w of these numbers, and ``num_local`` draws of z for each.

        Args:
            values_of: the level whose latents' values are wanted, too.
        """
        w = self._draws_of_globals(draws, use)
        count = len(draws) * num_local
        of_globals, of_locals, found = [], [], []
        names: tuple[str, ...] = ()
        for part in self._parts(count):
            begin = draws.start * num_local
            numbers = range(begin + part.start, begin + part.stop)
            values = {n: v[torch.arange(part.start, part.stop) // num_local] for n, v in w.items()}
            traces = self._traces(values, numbers, use)
            terms = terms_of(traces, "sampled")
            of_globals.append(self._sum(terms, local=False).reshape(-1))
            of_locals.append(self._sum(terms, local=True))
            if values_of is not None:
                names, z = self._values(traces, values_of)
                found.append(z)
        shape = len(draws), num_local
        z = torch.cat(found).reshape(*shape, *found[0].shape[1:]) if found else None
        return LevelWeights(
            torch.cat(of_globals).reshape(shape)[:, 0],
            torch.cat(of_locals).reshape(*shape, self.plate.size),
            names,
            z,
        )

    def _values(self, traces: Traces, level: Level) -> tuple[tuple[str, ...], Tensor]:
        sites = traces.model_sites
        local = {n for n, s in sites.items() if self._is_local(s)}
        if level == "local":
            return latent_values(traces, self.plate, local)
        return latent_values(traces, None, sites.keys() - local)

    def chunks(self, num: int, chunk: int | None, num_local: int) -> Iterator[range]:
        """The numbers of ``num`` draws of w, as many together as are made at once."""
        chunk = max(1, ROWS // (self.plate.size * num_local)) if chunk is None else chunk
        return in_chunks(num, chunk, self.plate.size)

    def _parts(self, count: int) -> Iterator[range]:
        at_once = max(1, ROWS // self.plate.size) if self._runs.at_once else 1
        return in_chunks(count, at_once, self.plate.size)

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

    def _is_local(self, site: Site) -> bool:
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
