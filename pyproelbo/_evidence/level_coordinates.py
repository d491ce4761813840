"""The global latents of a program, and those of each datum, as points of real space."""

from functools import partial
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyproelbo._evidence.coordinates import Packing, Place, bijection, jacobian_of, moved
from pyproelbo._rows.levels import LevelDraws, Placed
from pyproelbo._rows.plate import by_row
from pyproelbo._rows.values import latent_names, row_axis
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import Site, Traces

_WHY = "by level a posterior is repaired by gradients: take level='joint'"


class LevelPoints(NamedTuple):
    """P draws of all latents.

    Attributes:
        globals_: w, (P, J).
        locals_: z, (P, N, K).
    """

    globals_: Tensor
    locals_: Tensor

    def take(self, index: Tensor) -> "LevelPoints":
        """Some of the draws."""
        return LevelPoints(*(part[index.to(part.device)] for part in self))


class LevelDensities(NamedTuple):
    """log p(x, w, z) as a density of P points, in nats.

    Attributes:
        globals_: the part that belongs to no single datum, (P,).
        locals_: log p(x_n, z_n | w), (P, N).
    """

    globals_: Tensor
    locals_: Tensor


class LevelCoordinates:
    """All draws of a guide, as points; by level, as :class:`Coordinates` is by row.

    Args:
        levels: draws of the guide.

    Raises:
        NotContinuousError: for a latent that is discrete, summed out, a Delta, or not in the model.
    """

    def __init__(self, levels: LevelDraws) -> None:
        self._levels, first = levels, levels.first
        guide = moved(Sites.of(first), _WHY)
        places = {
            n: Place.of(n, s, levels.plate if levels.is_local(s) else None, _WHY)
            for n, s in guide.items()
        }
        kinds = levels.names
        packings = [
            Packing({n: p for n, p in places.items() if n in names}, rows, first.plate_nesting)
            for names, rows in zip(kinds, (1, levels.plate.size), strict=True)
        ]
        self._globals, self._locals = packings

    @property
    def sizes(self) -> tuple[int, int]:
        """J and K."""
        return self._globals.size, self._locals.size

    def points(self, traces: Traces) -> LevelPoints:
        """The points of a run."""
        return LevelPoints(self._globals.packed([traces])[:, 0], self._locals.packed([traces]))

    def globals_at(self, u: Tensor) -> dict[str, Tensor]:
        """The guide's sites at points w (S, J): (S, *shape)."""
        z = u.new_zeros(len(u), self._levels.plate.size, self._locals.size)
        runs = [self._run(LevelPoints(u, z).take(_index(part)))[0] for part in self._parts(u)]
        parts = [self._levels.drawn(traces) for traces in runs]
        return {name: torch.cat([part[name] for part in parts]) for name in self._globals.places}

    def values(self, points: LevelPoints) -> dict[str, Tensor]:
        """The model's latents, and the guide's other draws, by site.

        Local ones (S, N, ...), global ones (S, 1, ...).
        """
        parts = [
            self._drawn(self._run(points.take(_index(part)))[0])
            for part in self._parts(points.globals_)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def densities(self, points: LevelPoints) -> LevelDensities:
        """With gradients with respect to the points."""
        parts = [
            self._densities(points.take(_index(part))) for part in self._parts(points.globals_)
        ]
        return LevelDensities(*map(torch.cat, zip(*parts, strict=True)))

    def _parts(self, u: Tensor) -> list[range]:
        return list(self._levels.in_runs(len(u)))

    def _drawn(self, traces: Traces) -> dict[str, Tensor]:
        first, found = self._levels.first, dict[str, Tensor]()
        drawn = [name for names in self._levels.names for name in names]
        for name in dict.fromkeys([*latent_names(traces), *drawn]):
            part = "model_sites" if name in traces.model_sites else "guide_sites"
            one: Site = getattr(first, part)[name]
            value = getattr(traces, part)[name]["value"].detach().reshape(-1, *one["value"].shape)
            axis = row_axis(one, self._levels.plate) if self._levels.is_local(one) else None
            found[name] = value.unsqueeze(1) if axis is None else value.movedim(axis, 1)
        return found

    def _run(self, points: LevelPoints) -> tuple[Traces, list[tuple[bool, Tensor]]]:
        """A run at points, and log |dz / du| of each site, with whether it is local."""
        at = self._globals.unpacked(points.globals_.unsqueeze(1))
        at |= self._locals.unpacked(points.locals_)
        jacobians: list[tuple[bool, Tensor]] = []

        def transformed(name: str, fn: TorchDistribution) -> Tensor:
            z = bijection(fn.support)(at[name])
            jacobians.append((name in self._locals.places, jacobian_of(fn, at[name], z)))
            return z

        with Placed({name: partial(transformed, name) for name in at}):
            return self._levels.run(len(points.globals_)), jacobians

    def _densities(self, points: LevelPoints) -> LevelDensities:
        num, plate = len(points.globals_), self._levels.plate
        traces, jacobians = self._run(points)
        sites = Sites.of(traces)
        joint = [s for part in (sites.data, sites.factors, sites.latents) for s in part.values()]
        # the log-density of an AutoGuide's Delta is minus the log-Jacobian of what it computes
        deltas = [site for site in sites.guide.values() if is_delta(site)]
        by_level = []
        for local in (False, True):
            values = [s["log_prob"] for s in joint if self._levels.is_local(s) == local]
            values += [-s["log_prob"] for s in deltas if self._levels.is_local(s) == local]
            values += [value for is_local, value in jacobians if is_local == local]
            by_level.append(by_row(values, num, plate if local else None))
        of_globals, of_locals = by_level
        return LevelDensities(of_globals.expand(num, 1)[:, 0], of_locals.expand(num, plate.size))


def _index(part: range) -> Tensor:
    return torch.arange(part.start, part.stop, device="cpu")
