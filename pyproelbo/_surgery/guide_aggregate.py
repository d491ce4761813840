"""The aggregate posterior of a guide on a whole data set, at draws of the guide."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyproelbo._backend.pyro_private import sites_of
from pyproelbo._backend.sites import Site
from pyproelbo._distributions.densities import log_density
from pyproelbo._distributions.interpolated_marginals import interpolated_marginals
from pyproelbo._distributions.mixture_kernel import RunningLogSumExp, log_aggregate_posterior
from pyproelbo._rows.batches import Batch
from pyproelbo._rows.executors import computed
from pyproelbo._rows.latent_rows import LatentRows, NotBroadcastError
from pyproelbo._surgery.draws import DataDraws
from pyproelbo._surgery.local_latents import LocalLatents
from pyproelbo._terms.traces import Program

_PAIRS = 2**13  # of a draw and a datum, for which a guide runs in one call
_ELEMENTS = 2**20  # of draws, at which densities are evaluated at once
_SLAB = 2048  # draws, and data, in one call of the Gaussian kernel
_PARTS = 64  # of the data, for workers, that send back a number for each draw

# of draws, their places among all: log q of the latents jointly and of those that are given, (m, n,
# 1 or 2), for n of the data, or one sum over them, and of each dimension, (m, n, K)
Blocks = Iterator[tuple[slice, Tensor, Tensor | None]]


class DataPart(NamedTuple):
    """Some of the data whose posteriors the aggregate averages.

    Attributes:
        stop: the index after the last of them.
        blocks: their densities at all draws.
    """

    stop: int
    blocks: Blocks


class Sums:
    """sum_n q(z | x_n) over the first data, at draws of the guide, jointly and by dimension.

    Given other latents u, the sums for q(z, u) and q(u).

    Args:
        which: the latents.
        draws: of the guide.

    Attributes:
        num_data: the number of data in the sums.
        device: of the sums.
    """

    def __init__(self, which: LocalLatents, draws: Sequence[DataDraws]) -> None:
        num, like = sum(len(part.rows) for part in draws), draws[0].terms["log_q"]
        self.num_data, self.device = 0, like.device
        self._joint = RunningLogSumExp((num, 2 if which.given else 1), like)
        self._by_dim = None
        if which.has_marginals and not which.is_gaussian:
            self._by_dim = RunningLogSumExp((num, len(which.dims)), like)

    def after(self, part: DataPart) -> "Sums":
        """The sums with the data of a part added; these are unchanged."""
        sums = copy.copy(self)
        sums._joint, sums._by_dim = copy.deepcopy((self._joint, self._by_dim))
        with pyro.validation_enabled(False):  # z may be outside the support of some q(z | x_n)
            for rows, log_q, by_dim in part.blocks:
                sums._joint.update(rows, log_q)
                if sums._by_dim is not None and by_dim is not None:
                    sums._by_dim.update(rows, by_dim)
        sums.num_data = part.stop
        return sums

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        """The logarithms of the sums, (M, 1 or 2) and (M, K) or None."""
        return self._joint.value, None if self._by_dim is None else self._by_dim.value

    def log_mean(self) -> tuple[Tensor, Tensor | None]:
        """log q(z) = log (1/N) sum_n q(z | x_n) at all draws, jointly and by dimension.

        Given other latents u it is log q(z | u) = log q(z, u) - log q(u).

        Returns:
            (M,), and (M, K) or None where the dimensions' posteriors are not known or are normal;
            draw after draw.
        """
        return log_mean(*self.values, self.num_data)


def log_mean(
    log_sums: Tensor, by_dim: Tensor | None, num_data: int
) -> tuple[Tensor, Tensor | None]:
    """As :meth:`Sums.log_mean`, from the logarithms of the sums."""
    log_n = math.log(num_data)
    joint, *of_given = (log_sums - log_n).unbind(1)
    joint = joint - of_given[0] if of_given else joint
    return joint, None if by_dim is None else by_dim - log_n


def data_parts(
    guide: Program,
    batches: Iterable[Batch],
    which: LocalLatents,
    draws: Sequence[DataDraws],
    at: Sequence[DataDraws],
    rows: range,
) -> Iterator[DataPart]:
    """Some of the data with draws, part by part.

    Where the posteriors are normal, with independent dimensions, their means and scales are enough.
    Otherwise the guide runs on the data once more, batch by batch. Memory never grows to draws
    times data.

    Args:
        draws: of all data.
        at: the draws at which to evaluate the densities.
        rows: the data whose densities are evaluated.
    """
    if which.is_gaussian:
        yield from map(_of_normals(draws, at), _slabs(rows, _SLAB))
    else:
        yield from map(_of_guide(guide, which, at, rows), _within(batches, rows))


def sums_by_workers(
    guide: Program,
    batches: Iterable[Batch],
    which: LocalLatents,
    draws: Sequence[DataDraws],
    at: Sequence[DataDraws],
    rows: range,
    executor: Executor,
) -> Iterator[DataPart]:
    """As :func:`data_parts`, with one sum over each part, which a worker has computed."""
    sums = Sums(which, at)
    if which.is_gaussian:
        part_of, items = _of_normals(draws, at), _slabs(rows, max(_SLAB, len(rows) // _PARTS))
    else:
        part_of, items = _of_guide(guide, which, at, rows), _within(batches, rows)

    def of(item: Any) -> tuple[int, tuple[Tensor, Tensor | None]]:
        part = part_of(item)
        return part.stop, sums.after(part).values

    for _, (stop, values) in computed(of, items, executor):
        joint, by_dim = (v if v is None else v.to(sums.device)[:, None] for v in values)
        assert joint is not None
        yield DataPart(stop, iter([(slice(None), joint, by_dim)]))


def _slabs(rows: range, size: int) -> Iterator[slice]:
    starts = range(rows.start, rows.stop, size)
    return (slice(start, min(start + size, rows.stop)) for start in starts)


def _within(batches: Iterable[Batch], rows: range) -> Iterator[Batch]:
    """The batches that have some of the rows."""
    before = takewhile(lambda batch: batch.start < rows.stop, batches)
    return (batch for batch in before if batch.start + batch.size > rows.start)


def _of_normals(draws: Sequence[DataDraws], at: Sequence[DataDraws]) -> Callable[[slice], DataPart]:
    z, loc, scale = _draws_of(at), *_normals(draws)
    return lambda rows: DataPart(rows.stop, _gaussian(z, loc[rows], scale[rows]))


def _of_guide(
    guide: Program, which: LocalLatents, at: Sequence[DataDraws], rows: range
) -> Callable[[Batch], DataPart]:
    values = {n: torch.cat([part.values[n] for part in at]) for n in at[0].values}
    given = list(values)[len(which.keys) :]

    def of(batch: Batch) -> DataPart:
        blocks = _stacked(_blocks(guide, batch, which, values), given)
        stop = min(batch.start + batch.size, rows.stop)
        of = slice(max(rows.start - batch.start, 0), stop - batch.start)
        return DataPart(stop, _columns(blocks, of))

    return of


def _columns(blocks: Blocks, of: slice) -> Blocks:
    """The densities for some of the data."""
    for rows, log_q, by_dim in blocks:
        yield rows, log_q[:, of], None if by_dim is None else by_dim[:, of]


def normal_marginals(
    draws: Sequence[DataDraws],
    device: torch.device | None = None,
    executor: Executor | None = None,
) -> Tensor:
    """log q(z) of each dimension of normal posteriors, at all draws, draw after draw: (M, K).

    Args:
        draws: of the data whose posteriors form the aggregate.
        device: where it is computed; by default the device of the draws.
        executor: whose workers compute it, dimension by dimension; None for this process.
    """
    normals = tuple(value.to(device) for value in (_draws_of(draws), *_normals(draws)))
    if executor is None:
        return _marginals(normals)
    by_dim = (tuple(x[:, k : k + 1] for x in normals) for k in range(normals[0].shape[1]))
    return torch.cat([part.to(normals[0]) for _, part in computed(_marginals, by_dim, executor)], 1)


def _marginals(normals: tuple[Tensor, ...]) -> Tensor:
    with pyro.validation_enabled(False):  # what is not finite is found in the terms
        return interpolated_marginals(*normals)


def _draws_of(draws: Sequence[DataDraws]) -> Tensor:
    return _not_half(torch.cat([part.by_dim["z"] for part in draws]))


def _normals(draws: Sequence[DataDraws]) -> tuple[Tensor, Tensor]:
    """The means and scales of the data's posteriors."""
    loc, scale = (_not_half(draws[0].by_dim[name]) for name in ("loc", "scale"))
    return loc, scale


def _gaussian(z: Tensor, loc: Tensor, scale: Tensor) -> Blocks:
    for start in range(0, len(z), _SLAB):
        rows = slice(start, start + _SLAB)
        joint = log_aggregate_posterior(z[rows], loc, scale) + math.log(len(loc))
        yield rows, joint[:, None, None], None


def _stacked(blocks: "SiteBlocks", given: Sequence[str]) -> Blocks:
    for rows, block, by_dim in blocks:
        of = [list(block), list(given)] if given else [list(block)]
        parts = [torch.stack([block[name] for name in names]).sum(0) for names in of]
        yield rows, torch.stack(parts, -1), by_dim


def _not_half(value: Tensor) -> Tensor:
    """In single precision at least, as the kernel requires."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


# of draws: log q of each site, (m, B), and of each dimension, (m, B, K)
SiteBlocks = Iterator[tuple[slice, dict[str, Tensor], Tensor | None]]


def _blocks(
    guide: Program, batch: Batch, which: LocalLatents, values: Mapping[str, Tensor]
) -> SiteBlocks:
    if which.is_mean_field:
        try:
            yield from _independent(guide, batch, which, values)
            return
        except NotBroadcastError:  # at the first block, as at any
            if which.has_marginals:
                raise
    yield from _by_pairs(guide, batch, which, values)


def _independent(
    guide: Program, batch: Batch, which: LocalLatents, values: Mapping[str, Tensor]
) -> SiteBlocks:
    """For sites that do not depend on each other: one run has everything to evaluate."""
    sites = _sites(guide, batch)
    latents = {name: _latent(sites, name, which) for name in values}
    size = batch.size * sum(value[0].numel() for value in values.values())
    for rows, part in _slices(values, _ELEMENTS // size):
        log_q = {name: latents[name].log_q_at(z) for name, z in part.items()}
        by_dim = None
        if which.has_marginals:
            by_dim = torch.cat([latents[name].log_q_by_dim_at(z) for name, z in part.items()], 2)
        yield rows, log_q, by_dim


def _by_pairs(
    guide: Program, batch: Batch, which: LocalLatents, values: Mapping[str, Tensor]
) -> SiteBlocks:
    """For all others: the guide runs on every pair of a draw and a datum."""
    sites = _sites(guide, batch)
    latents = {name: _latent(sites, name, which) for name in values}
    frames = sites[next(iter(values))]["cond_indep_stack"]
    frame = next(frame for frame in frames if frame.dim == which.dim)
    one_by_one, at_once = partial(_one_by_one, guide, batch, which, latents), _PAIRS
    side_by_side = partial(_side_by_side, guide, batch, which, latents)
    if _agree(side_by_side, one_by_one, values):
        evaluate = side_by_side
    else:
        evaluate = one_by_one
        if frame.full_size is not None and frame.full_size != frame.size:
            at_once = min(_PAIRS, frame.full_size)
    for rows, part in _slices(values, at_once // batch.size):
        yield rows, evaluate(part), None


LogQ = dict[str, Tensor]  # by site, (m, B)


def _side_by_side(
    guide: Program,
    batch: Batch,
    which: LocalLatents,
    latents: Mapping[str, LatentRows],
    values: Mapping[str, Tensor],
) -> LogQ:
    """One run, with the draws along a dim at the left of all plates.

    What the guide computes from the data alone it computes once.
    """
    nesting = max(latent.axis - which.dim for latent in latents.values())
    given = {}
    for name, z in values.items():
        shape, axis = latents[name].value.shape, latents[name].axis
        missing = (1,) * (nesting - axis + which.dim)
        z = z.unsqueeze(axis + 1).expand(len(z), *shape)
        given[name] = z.reshape(len(z), *missing, *shape)
    sites = _sites(poutine.condition(guide, data=given), batch)
    log_q = {name: log_density(sites[name]["fn"], z) for name, z in given.items()}
    return {
        name: value.movedim(which.dim, 1).reshape(len(value), batch.size, -1).sum(2)
        for name, value in log_q.items()
    }


def _one_by_one(
    guide: Program,
    batch: Batch,
    which: LocalLatents,
    latents: Mapping[str, LatentRows],
    values: Mapping[str, Tensor],
) -> LogQ:
    """One run, on the data repeated for each draw: for a guide that takes one z per row."""
    num = len(next(iter(values.values())))
    given = {
        name: z.repeat_interleave(batch.size, 0).movedim(0, latents[name].axis)
        for name, z in values.items()
    }
    sites = _sites(poutine.condition(guide, data=given), batch.repeat(num))
    log_q = {name: _latent(sites, name, which).log_q for name in given}
    return {name: value.reshape(num, batch.size) for name, value in log_q.items()}


def _agree(
    one: Callable[[LogQ], LogQ], other: Callable[[LogQ], LogQ], values: Mapping[str, Tensor]
) -> bool:
    """Whether ``one`` gives for the first two draws together what ``other`` gives for each."""
    try:
        found = one({name: value[:2] for name, value in values.items()})
    except (RuntimeError, LookupError, ValueError):
        return False
    each = [other({name: value[i : i + 1] for name, value in values.items()}) for i in range(2)]
    return all(
        torch.allclose(log_q, torch.cat([part[name] for part in each]), rtol=1e-4, atol=1e-4)
        for name, log_q in found.items()
    )


def _slices(values: Mapping[str, Tensor], size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    for start in range(0, len(next(iter(values.values()))), max(1, size)):
        rows = slice(start, start + max(1, size))
        yield rows, {name: value[rows] for name, value in values.items()}


def _latent(sites: Mapping[str, Site], name: str, which: LocalLatents) -> LatentRows:
    return LatentRows(sites[name]["value"], sites[name]["fn"], None, which.dim)


def _sites(guide: Program, batch: Batch) -> dict[str, Site]:
    return sites_of(poutine.trace(guide).get_trace(*batch.args, **batch.kwargs))
