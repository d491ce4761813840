"""The dims of a site's values and log-densities: its plates, then its event."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Size, Tensor

from pyproelbo._backend.pyro_private import is_deterministic
from pyproelbo._terms.traces import PARTICLES, Plate, Site
from pyproelbo.sequences.base import SequenceDistribution


class Layout(NamedTuple):
    """The dims of a tensor other than those of draws.

    Attributes:
        plates: from the left.
        event_shape: what follows them; empty for a log-density.
        loose: the dims of its batch, with their sizes, that belong to no plate, from the left. They
            follow the plates.
        is_sequence: whether the first dim of the event is time.
        loops: the plates of which it is one element, as within a loop over a plate.
    """

    plates: tuple[Plate, ...]
    event_shape: Size
    is_sequence: bool = False
    loops: tuple[str, ...] = ()
    loose: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_value(cls, site: Site) -> "Layout":
        """The layout of the value of a site."""
        value, plates = site["value"], _ordered(site["plates"])
        event_dim = min(site["fn"].event_dim, value.dim())
        if is_deterministic(site) and event_dim == value.dim():
            # all its dims are given as its event, including those of the plates around it
            nesting = -plates[0].dim if plates else 0
            inside = tuple(value.shape[:nesting]) == _batch_shape(plates, nesting)
            plates, event_dim = plates if inside else (), event_dim - nesting * inside
        num_batch = value.dim() - event_dim
        batch_shape, event_shape = value.shape[:num_batch], value.shape[num_batch:]
        is_sequence = isinstance(site["fn"], SequenceDistribution)
        dims = {plate.dim for plate in plates}
        loose = ((dim, batch_shape[dim]) for dim in range(-num_batch, 0) if dim not in dims)
        found = tuple((dim, size) for dim, size in loose if size > 1)
        return cls(plates, event_shape, is_sequence, _loops(site), found)

    @classmethod
    def of_log_prob(cls, log_prob: Tensor, sites: list[Site]) -> "Layout":
        """The layout of a log-density that sites share, with those of their plates that it has."""
        shape = log_prob.shape
        there = {
            plate
            for site in sites
            for plate in site["plates"]
            if log_prob.dim() >= -plate.dim and shape[plate.dim] == plate.size
        }
        first, *others = map(_loops, sites)
        shared = (loop for loop in first if all(loop in other for other in others))
        return cls(_ordered(there), Size(), False, tuple(shared))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one draw."""
        loose = (size for _, size in self.loose)
        return (*(plate.size for plate in self.plates), *loose, *self.event_shape)

    def by_draw(self, value: Tensor, num: int, nesting: int) -> Tensor:
        """The tensor of ``num`` draws that a program made at once, (num, *shape).

        ``nesting`` is the number of dims that the program's plates take.
        """
        batch_shape = self._batch_shape(nesting)
        value = value.expand((num, *batch_shape, *self.event_shape))
        end = 1 + len(batch_shape)
        at = [end + dim for dim, _ in self.loose]
        value = value.movedim(at, list(range(end - len(at), end)))
        return value.reshape((num, *self.shape))

    def as_drawn(self, values: Tensor, nesting: int) -> Tensor:
        """The inverse of :meth:`by_draw`: a tensor in a program's shape."""
        num = len(values)
        if num == 1:
            dims = (*(plate.dim for plate in self.plates), *(dim for dim, _ in self.loose))
            nesting = -min(dims, default=0)
        batch_shape = list(self._batch_shape(nesting))
        for dim, _ in self.loose:
            batch_shape[dim] = 1
        loose, end = [size for _, size in self.loose], 1 + len(batch_shape)
        values = values.reshape(num, *batch_shape, *loose, *self.event_shape)
        for i, (dim, size) in enumerate(self.loose):
            values = values.transpose(end + i, end + dim)
            batch_shape[dim] = size
        shape = (*batch_shape, *self.event_shape)
        return values.reshape((num, *shape) if num > 1 else shape)

    def _batch_shape(self, nesting: int) -> tuple[int, ...]:
        """The programs' batch shape, with ``nesting`` dims."""
        shape = list(_batch_shape(self.plates, nesting))
        for dim, size in self.loose:
            shape[dim] = size
        return tuple(shape)

    @property
    def numel(self) -> int:
        """The number of elements of one draw."""
        return math.prod(self.shape)


def _ordered(plates: Iterable[Plate]) -> tuple[Plate, ...]:
    found = (plate for plate in plates if plate.name != PARTICLES)
    return tuple(sorted(found, key=lambda plate: plate.dim))


def _batch_shape(plates: tuple[Plate, ...], nesting: int) -> tuple[int, ...]:
    shape = [1] * nesting
    for plate in plates:
        shape[plate.dim] = plate.size
    return tuple(shape)


def _loops(site: Site) -> tuple[str, ...]:
    return tuple(frame.name for frame in site["cond_indep_stack"] if not frame.vectorized)
