"""Draws of which each belongs to one row of the data, whatever batch the row comes in."""

import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
    constraints,
)

from pyproelbo._distributions.family import is_made_of_parameters
from pyproelbo._distributions.owners import DENSITY, DRAWING, keeps, owner

SOFT = "_unquantize"  # where Pyro's straight-through draws keep what they were before rounding
_BLOCK = 256  # rows whose noise is drawn together


class RowNoise(Messenger):
    """Within this context the sites of one plate draw by row: from the seed, the site's name,
    the number of the draw and the number of the row in the data, and from nothing else.

    So the draws do not depend on how the rows are batched, on the device, or on torch's random
    state, which stays as it is. Noise is vectorised for normal distributions, for those with an
    inverse distribution function, categorical ones, and mixtures and transforms of these; others
    draw row by row, as do classes that override how they draw. A distribution of which single
    rows cannot be had (it has parameters that ``arg_constraints`` does not tell) draws for its
    whole batch.

    Args:
        plate: the name of the plate over the rows.
        start: the number of the first row at hand.
        draw: the number of the draw.
        seed: a whole number, not negative.
    """

    def __init__(self, plate: str, start: int, draw: int, seed: int) -> None:
        super().__init__()
        self.plate, self.start, self.key = plate, start, (seed, draw)

    def _pyro_sample(self, msg: Any) -> None:
        if (
            msg["is_observed"]
            or msg["value"] is not None
            or type(msg["fn"]).__name__ == "_Subsample"
        ):
            return
        dims = [frame.dim for frame in msg["cond_indep_stack"] if frame.name == self.plate]
        if dims:
            key = (*self.key, zlib.crc32(msg["name"].encode()))
            msg["value"] = _draw(msg["fn"], _Rows(key, self.start, dims[0]))


class _Rows:
    """The noise of the rows at hand; each draw of one site has a key of its own."""

    def __init__(self, key: tuple[int, ...], start: int, dim: int) -> None:
        self.key, self.start, self.dim = key, start, dim

    def within(self, part: int, event_dims: int = 0) -> "_Rows":
        """For a part of a distribution that has so many event dims more in its batch."""
        return _Rows((*self.key, part), self.start, self.dim - event_dims)

    def noise(self, like: Tensor, shape: torch.Size, event_dims: int, kind: str) -> Tensor:
        """Independent numbers of a shape, the batch's dims before ``event_dims`` others."""
        dim = len(shape) + self.dim - event_dims
        rows, rest = shape[dim], (*shape[:dim], *shape[dim + 1 :])
        first, last = self.start // _BLOCK, (self.start + rows - 1) // _BLOCK
        blocks = [_block(self.key, i, rest, kind) for i in range(first, last + 1)]
        values = np.concatenate(blocks)[self.start - first * _BLOCK :][:rows]
        return torch.from_numpy(values).to(like).movedim(0, dim)


@lru_cache(maxsize=64)
def _block(key: tuple[int, ...], block: int, shape: tuple[int, ...], kind: str) -> np.ndarray:
    return getattr(np.random.default_rng((*key, block)), kind)((_BLOCK, *shape))


def _draw(d: Any, rows: _Rows) -> Tensor:
    """A value of ``d``, of its batch and event shape."""
    shape = d.batch_shape + d.event_shape
    if isinstance(d, MaskedDistribution):
        return _draw(d.base_dist, rows)
    if keeps(d, Independent, DRAWING):
        return _draw(d.base_dist, rows.within(0, d.reinterpreted_batch_ndims))
    if isinstance(d, Delta):
        return d.v.expand(shape)
    if keeps(d, TransformedDistribution, DRAWING):
        extra = len(shape) - len(d.event_shape) - len(d.base_dist.batch_shape)
        value: Any = _draw(d.base_dist, rows.within(0, -extra))
        for transform in d.transforms:
            value = transform(value)
        return value
    if keeps(d, MixtureSameFamily, DRAWING):
        component = _draw(d.mixture_distribution, rows.within(0))
        values = _draw(d.component_distribution, rows.within(1, 1))
        at = component.reshape(*component.shape, 1, *(1,) * len(d.event_shape))
        dim = component.dim()
        return values.gather(dim, at.expand(*d.batch_shape, 1, *d.event_shape)).squeeze(dim)
    if keeps(d, Normal, DRAWING):
        return d.loc + d.scale * rows.noise(d.loc, shape, 0, "standard_normal")
    if keeps(d, MultivariateNormal, DRAWING):
        noise = rows.noise(d.loc, shape, 1, "standard_normal")
        return d.loc + (d._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    if keeps(d, LowRankMultivariateNormal, DRAWING):
        W, scale = d._unbroadcasted_cov_factor, d._unbroadcasted_cov_diag.sqrt()
        rank = d.batch_shape + W.shape[-1:]
        low = rows.within(0).noise(d.loc, rank, 1, "standard_normal")
        noise = rows.within(1).noise(d.loc, shape, 1, "standard_normal")
        return d.loc + (W @ low.unsqueeze(-1)).squeeze(-1) + scale * noise
    if keeps(d, Bernoulli, DRAWING):
        return (rows.noise(d.probs, shape, 0, "random") < d.probs).to(d.probs)
    if keeps(d, Categorical, DRAWING):
        level = d.probs.cumsum(-1)
        noise = rows.noise(level, shape, 0, "random") * level[..., -1]
        return (noise.unsqueeze(-1) >= level[..., :-1]).sum(-1)
    if keeps(d, OneHotCategorical, DRAWING):
        values = _draw(d._categorical, rows)
        return torch.nn.functional.one_hot(values, shape[-1]).to(d.probs)
    return _by_inverse(d, rows) if _has_inverse(d) else _one_by_one(d, rows)


def _has_inverse(d: Distribution) -> bool:
    inverse = owner(type(d), "icdf")
    if d.event_shape or inverse is Distribution:
        return False
    return all(keeps(d, inverse, (name,)) for name in (*DRAWING, *DENSITY))


def _by_inverse(d: Any, rows: _Rows) -> Tensor:
    like = next(getattr(d, name) for name in d.arg_constraints)
    noise = rows.noise(like, d.batch_shape, 0, "random")
    eps = torch.finfo(noise.dtype).eps
    return d.icdf(noise.clamp(eps / 2, 1 - eps))


def _one_by_one(d: Any, rows: _Rows) -> Tensor:
    dim = len(d.batch_shape) + rows.dim
    size = d.batch_shape[dim]
    numbers = range(rows.start, rows.start + size)
    with torch.random.fork_rng():
        try:
            parts = [_row(d, dim, i) for i in range(size)]
        except NotImplementedError:
            parts, numbers = [d], range(rows.start, rows.start + 1)
        values = []
        for part, number in zip(parts, numbers, strict=True):
            state = np.random.SeedSequence((*rows.key, number)).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(state >> np.uint64(1)))
            values.append(part() if callable(part) else part.sample())  # as Pyro draws
    return values[0] if len(values) == 1 else _joined(values, dim)


def _joined(values: list[Tensor], dim: int) -> Tensor:
    """Draws beside each other; of straight-through ones also what their density is of."""
    joined = torch.cat(values, dim)
    if all(hasattr(value, SOFT) for value in values):
        setattr(joined, SOFT, torch.cat([getattr(value, SOFT) for value in values], dim))
    return joined


def _row(d: Any, dim: int, i: int) -> Distribution:
    """``d`` with one row along a dim of its batch."""
    if not is_made_of_parameters(d):
        raise NotImplementedError(type(d).__name__)
    parameters = {}
    for name in [n for n in d.arg_constraints if n in vars(d)] or d.arg_constraints:
        value, constraint = getattr(d, name), d.arg_constraints[name]
        if constraint is constraints.dependent or not isinstance(value, Tensor):
            raise NotImplementedError(type(d).__name__)
        event = value.shape[value.dim() - constraint.event_dim :]
        parameters[name] = value.expand(d.batch_shape + event).narrow(dim, i, 1)
    try:
        return type(d)(**parameters, validate_args=False)
    except (TypeError, ValueError) as error:  # of Pyro and others, made in ways of their own
        raise NotImplementedError(type(d).__name__) from error
