"""The latents of each datum as a point of real space, with its densities."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform

from pyproelbo._backend.pyro_private import SOFT
from pyproelbo._rows.draws import RowDraws
from pyproelbo._rows.levels import Placed
from pyproelbo._rows.plate import by_row, scale_of
from pyproelbo._rows.runs import Use
from pyproelbo._rows.values import drawn_by_row, labels_of
from pyproelbo._terms.roles import is_delta
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import Plate, Site, Traces

_ANNEALING = "annealing moves latents by gradients: use method='importance'"


class NotContinuousError(ValueError):
    """A latent is discrete, summed out, or has an unknown support: it cannot be moved."""


class Densities(NamedTuple):
    """Log-densities of S points for each of B data, (S, B) each, in nats.

    Attributes:
        log_q: log q(z | x).
        log_joint: log p(x, z).
        log_jacobian: log |dz / du|, including what the guide computes from its draws, as in
            AutoGuides.
    """

    log_q: Tensor
    log_joint: Tensor
    log_jacobian: Tensor

    @property
    def log_target(self) -> Tensor:
        """log p(x, z) as a density of u."""
        return self.log_joint + self.log_jacobian


class Place(NamedTuple):
    """The place of a latent in a program that draws it once.

    Attributes:
        shape: of its coordinates.
        axis: their data dim, counted from the right; None where all data are one row.
        batch_dims: how many of their dims belong to plates.
        value: a sample.
    """

    shape: torch.Size
    axis: int | None
    batch_dims: int
    value: Tensor

    @classmethod
    def of(cls, name: str, site: Site, plate: Plate | None, why: str) -> "Place":
        """The place of a site.

        Args:
            plate: the plate over the data, which contains the site; None where all data are one
                row.

        Raises:
            NotContinuousError: for a support without a known transform.
        """
        fn, value = site["fn"], site["value"]
        try:
            u = bijection(fn.support).inv(value)
        except NotImplementedError as error:
            raise NotContinuousError(
                f"latent {name!r} has the support {fn.support}, for which no transform to the "
                f"whole real line is known, but {why}"
            ) from error
        batch_dims = len(fn.batch_shape)
        axis = None if plate is None else plate.dim - (u.dim() - batch_dims)
        return cls(u.shape, axis, batch_dims, value)


class Packing(NamedTuple):
    """Sites side by side, as points (S, B, K) of B rows.

    Attributes:
        places: of the sites, by name.
        rows: B.
        nesting: the number of dims of the programs' plates.
    """

    places: Mapping[str, Place]
    rows: int
    nesting: int

    @property
    def size(self) -> int:
        """K."""
        return sum(place.shape.numel() for place in self.places.values()) // self.rows

    def packed(self, runs: Iterable[Traces]) -> Tensor:
        """The points of runs."""
        columns, all_runs = [], list(runs)
        for name, (shape, axis, *_) in self.places.items():
            sites = [traces.guide_sites[name] for traces in all_runs]
            parts = [bijection(site["fn"].support).inv(site["value"]) for site in sites]
            u = torch.cat([x.reshape(-1, *shape) for x in parts])
            u = u if axis is None else u.movedim(axis, 1)
            columns.append(u.reshape(len(u), self.rows, -1))
        return torch.cat(columns, -1)

    def unpacked(self, u: Tensor) -> dict[str, Tensor]:
        """The sites as in a run of S particles, on the whole real line."""
        num, B, _ = u.shape
        parts = u.split([place.shape.numel() // B for place in self.places.values()], -1)
        values = {}
        for (name, (shape, axis, batch_dims, _)), part in zip(
            self.places.items(), parts, strict=True
        ):
            value = part
            if axis is not None:
                rest = list(shape)
                del rest[axis]
                value = part.reshape(num, B, *rest).movedim(1, axis)
            particles = (num, *(1,) * (self.nesting - batch_dims)) if num > 1 else ()
            values[name] = value.reshape((*particles, *shape))
        return values


class Coordinates:
    """All that a guide draws for a batch as u, (S, B, K): S points for each of B rows.

    A site with a constrained support is z = T(u), with T by ``biject_to`` from its support given
    the sites before it. What the guide computes from these follows, such as the latents of
    AutoGuides, which are functions of an auxiliary draw.

    Args:
        draws: of the guide for the batch.
        chunk: the largest number of points whose densities are computed at once.
        why: why latents should be continuous, and what to do where they are not.

    Raises:
        ValueError: for a latent that is discrete, summed out, a Delta, or not in the model.
    """

    def __init__(self, draws: RowDraws, chunk: int | None, why: str = _ANNEALING) -> None:
        self._draws, self._plate = draws, draws.plate
        (traces,) = draws.traces(range(1))
        self._chunk = len(next(draws.ranges(2**31, chunk))) if draws.at_once else 1
        sites = Sites.of(traces)
        guide, self._latents = moved(sites, why), set(sites.latents)
        places = {n: Place.of(n, site, self._plate, why) for n, site in guide.items()}
        self._packing = Packing(places, draws.num_rows, traces.plate_nesting)
        self._sites = places

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the K coordinates, by the guide's sites."""
        found: list[str] = []
        for name, (shape, axis, *_) in self._sites.items():
            rest = list(shape)
            if axis is not None:
                del rest[axis]
            found += labels_of(name, rest)
        return tuple(found)

    def draw(self, draws: range, use: Use) -> Tensor:
        """Draws of the guide, (S, B, K)."""
        parts = [draws[i : i + self._chunk] for i in range(0, len(draws), self._chunk)]
        return torch.cat([self.packed(self._draws.traces(part, use)) for part in parts])

    def rows(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of the batch, from latents given for all data.

        Raises:
            ValueError: for a latent that is missing, or has another shape.
        """
        return {name: self._rows(latents, name) for name in self._sites}

    def of(self, values: Mapping[str, Tensor], num: int) -> Tensor:
        """Given latents of the batch, each ``num`` times: (num, B, K)."""

        def given(name: str, fn: TorchDistribution) -> Tensor:
            return values[name].expand(fn.shape())

        with Placed({name: partial(given, name) for name in self._sites}):
            return self.packed([self._draws.run(num)])

    def densities(self, u: Tensor) -> Densities:
        """The log-densities of points u, (S, B, K), with gradients by u."""
        parts = map(self._densities, u.split(self._chunk))
        return Densities(*map(torch.cat, zip(*parts, strict=True)))

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The values of the sites at points u: (S, B, ...)."""
        parts = [self._values(part) for part in u.split(self._chunk)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _values(self, u: Tensor) -> dict[str, Tensor]:
        coordinates = self._packing.unpacked(u)

        def transformed(name: str, fn: TorchDistribution) -> Tensor:
            return bijection(fn.support)(coordinates[name])

        with Placed({name: partial(transformed, name) for name in coordinates}):
            return drawn_by_row(self._draws.run(len(u)), self._draws.first, self._plate)

    def _densities(self, u: Tensor) -> Densities:
        """The densities of points that the programs evaluate at once."""
        num, scale = len(u), scale_of(self._plate)
        coordinates, jacobians = self._packing.unpacked(u), []

        def transformed(name: str, fn: TorchDistribution) -> Tensor:
            transform, x = bijection(fn.support), coordinates[name]
            z = transform(x)
            jacobians.append(jacobian_of(fn, x, z))
            return z

        with Placed({name: partial(transformed, name) for name in coordinates}):
            traces = self._draws.run(num)
            sites = Sites.of(traces)
        joint = [s for part in (sites.data, sites.factors, sites.latents) for s in part.values()]
        # the log-density of an AutoGuide's Delta is minus the log-Jacobian of what it computes
        deltas = (site["log_prob"] for site in sites.guide.values() if is_delta(site))
        return Densities(
            by_row((site["log_prob"] for site in sites.guide.values()), num, self._plate),
            by_row((site["log_prob"] for site in joint), num, self._plate),
            by_row(jacobians, num, self._plate) * scale - by_row(deltas, num, self._plate),
        )

    def packed(self, runs: list[Traces]) -> Tensor:
        """The points of runs, (S, B, K)."""
        return self._packing.packed(runs)

    def _rows(self, latents: Mapping[str, Tensor], name: str) -> Tensor:
        value = self._sites[name].value
        if name not in self._latents:
            raise ValueError(
                f"the guide draws {name!r}, which is not a latent of the model, as AutoGuides do, "
                "and cannot be set to the given latents: anneal from the prior, by "
                "Annealed(start='prior')"
            )
        if name not in latents:
            raise ValueError(
                f"latents should have a value of {name!r}, which the model draws for each datum"
            )
        given, rows = latents[name], self._draws.rows
        if self._plate is None:
            if given.shape == value.shape:
                return given.to(value)
            raise ValueError(
                f"latents[{name!r}] should have shape {tuple(value.shape)}, got "
                f"{tuple(given.shape)}"
            )
        axis = self._plate.dim - (value.dim() - self._sites[name].batch_dims)
        if given.dim() == value.dim() and given.shape[axis] >= rows.stop:
            part = given.narrow(axis, rows.start, self._plate.size)
            if part.shape == value.shape:
                return part.to(value)
        shape: list[int | str] = list(value.shape)
        shape[axis] = "N"
        raise ValueError(
            f"latents[{name!r}] should have shape ({', '.join(map(str, shape))}), as the model "
            f"draws them for the N data, got {tuple(given.shape)}"
        )


def bijection(support: Any) -> Any:
    """The transform from real space to a support; for a mixture, to that of its parts.

    Raises:
        NotImplementedError: where none is known.
    """
    try:
        return biject_to(support)
    except NotImplementedError:
        if not hasattr(support, "base_constraint"):
            raise
    of_part = bijection(support.base_constraint)
    if isinstance(support, constraints.independent):  # type: ignore[arg-type]
        return IndependentTransform(of_part, support.reinterpreted_batch_ndims)
    return of_part


def jacobian_of(fn: TorchDistribution, x: Tensor, z: Tensor) -> Tensor:
    """log |dz / dx| of z = T(x), with T from the support, in a distribution's batch shape."""
    jacobian: Any = bijection(fn.support).log_abs_det_jacobian(x, z)
    return jacobian.reshape(*jacobian.shape[: len(fn.batch_shape)], -1).sum(-1)


def moved(sites: Sites, why: str) -> dict[str, Site]:
    """The guide's random sites, all of which can be moved by gradients."""
    for name in sites.enumerated:
        raise NotContinuousError(f"the model sums out its latent {name!r}, but {why}")
    drawn = {name: site for name, site in sites.guide.items() if not is_delta(site)}
    for name, site in drawn.items():
        if hasattr(site["value"], SOFT):
            raise NotContinuousError(
                f"latent {name!r} is drawn straight through a rounding, but {why}"
            )
        if site["fn"].support.is_discrete:  # type: ignore[union-attr]
            raise NotContinuousError(f"latent {name!r} is discrete, but {why}")
    return drawn
