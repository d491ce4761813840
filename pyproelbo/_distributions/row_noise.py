"""Draws that each belong to one row of the data, whatever the row's batch.

A rule defines how a class of distributions makes a draw from independent numbers, which
:class:`Noise` provides for each draw and each row from their indices only. Distributions without a
rule or an inverse distribution function draw row by row.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import scipy
import torch
from pyro.distributions import Delta, ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    TransformedDistribution,
    constraints,
)

from pyproelbo._backend import rng
from pyproelbo._backend.pyro_private import SOFT
from pyproelbo._backend.torch_private import gradient_of_gamma
from pyproelbo._distributions.family import is_made_of_parameters
from pyproelbo._distributions.owners import DENSITY, DRAWING, keeps, owner
from pyproelbo._distributions.sobol import Points, words

_OF_ROWS = 2**12  # numbers that rows of one draw have together, at least one row; then
_OF_DRAWS = 2**14  # draws of them, at least one
_ROWS, _DRAWS = 256, 64  # at most

Kind = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # of random numbers


Places = int | tuple[int, ...]


class Noise(NamedTuple):
    """Random numbers for some draws of some rows of one site.

    They are independent, or the coordinates of scrambled Sobol points.

    Attributes:
        key: of all of them, whole numbers: a seed, and what distinguishes its uses.
        draws: the indices of the draws.
        start: the index of the first row; or those of all, where they do not follow each other.
        draw_dim: the batch dim of the draws, counted from the right; None for one.
        row_dim: likewise of the rows; None where there are none, and a draw is for all data.
        part: of the site, which has its own stream of numbers.
        points: the Sobol points that the draws are made of; None for independent numbers.
    """

    key: tuple[int, ...]
    draws: range
    start: Places
    draw_dim: int | None
    row_dim: int | None
    part: tuple[int, ...]
    points: Points | None = None

    @classmethod
    def of_site(
        cls,
        name: str,
        key: tuple[int, ...],
        draws: range,
        start: Places,
        draw_dim: int | None,
        row_dim: int | None,
        points: Points | None = None,
    ) -> "Noise":
        """The noise of a sample site."""
        return cls(key, draws, start, draw_dim, row_dim, (zlib.crc32(name.encode()),), points)

    def within(self, part: int, event_dims: int = 0) -> "Noise":
        """For a part of a distribution that has so many event dims more in its batch."""
        return self.below(event_dims)._replace(part=(*self.part, part))

    def below(self, event_dims: int) -> "Noise":
        """For what a distribution wraps, where it has so many event dims more in its batch."""
        draw, row = (None if d is None else d - event_dims for d in (self.draw_dim, self.row_dim))
        return self._replace(draw_dim=draw, row_dim=row)

    def normal(self, like: Tensor, shape: torch.Size, event_dims: int = 0) -> Tensor:
        """Standard normal numbers of a shape, the batch's dims before ``event_dims`` others."""
        kinds = np.random.Generator.standard_normal, scipy.special.ndtri
        return self._numbers(like, shape, event_dims, *kinds)

    def uniform(self, like: Tensor, shape: torch.Size, event_dims: int = 0) -> Tensor:
        """Numbers from 0 to 1, below 1."""
        value = self._numbers(like, shape, event_dims, np.random.Generator.random, np.asarray)
        return value.clamp(max=1 - torch.finfo(value.dtype).eps / 2)  # to which it may be rounded

    def _numbers(
        self,
        like: Tensor,
        shape: torch.Size,
        event_dims: int,
        kind: Kind,
        of_uniform: Callable[[np.ndarray], np.ndarray],
    ) -> Tensor:
        """Numbers of a kind; from points by its inverse distribution function."""
        axes = [
            None if d is None else len(shape) + d - event_dims
            for d in (self.draw_dim, self.row_dim)
        ]
        rest = tuple(size for axis, size in enumerate(shape) if axis not in axes)
        rows = None if axes[1] is None else shape[axes[1]]
        if self.points is None:
            numbers = self._blocks(rows, rest, kind)
        else:
            numbers = of_uniform(self._of_points(self.points, rows, rest))
        found = torch.from_numpy(numbers).to(like)
        moved = found[0] if axes[0] is None else found
        ends = [axis for axis in axes if axis is not None]
        return moved.movedim(list(range(len(ends))), ends)

    def _blocks(self, rows: int | None, rest: tuple[int, ...], kind: Kind) -> np.ndarray:
        """Numbers for all draws: (S, rows, *rest), or (S, *rest) where there are no rows.

        A block of some draws of some rows has one generator. Its size depends on ``rest`` alone.
        """
        num = max(1, math.prod(rest))
        size = 1 if rows is None else max(1, min(_ROWS, _OF_ROWS // num))
        several = max(1, min(_DRAWS, _OF_DRAWS // (size * num)))
        shape = (several, *(() if rows is None else (size,)), *rest)

        def block(i: int, j: int) -> np.ndarray:
            return kind(np.random.default_rng((*self.key, i, *self.part, j)), shape)

        of_draws = range(self.draws.start // several, (self.draws.stop - 1) // several + 1)
        if rows is None:
            of_rows: Sequence[int] = range(1)
        elif isinstance(self.start, int):
            of_rows = range(self.start // size, (self.start + rows - 1) // size + 1)
        else:
            of_rows = sorted({row // size for row in self.start})
        first = self.draws.start - of_draws.start * several
        found = np.concatenate(
            [np.concatenate([block(i, j) for j in of_rows], 1) for i in of_draws]
            if rows is not None
            else [block(i, 0) for i in of_draws]
        )[first:][: len(self.draws)]
        if rows is None:
            return found
        if isinstance(self.start, int):
            start = self.start - of_rows[0] * size
            return found[:, start : start + rows]
        at = {j: i * size for i, j in enumerate(of_rows)}
        return found[:, [at[row // size] + row % size for row in self.start]]

    def _of_points(self, points: Points, rows: int | None, rest: tuple[int, ...]) -> np.ndarray:
        """Uniform ones of all draws, (S, rows, *rest), or (S, *rest) where there are no rows."""
        of_draws = np.arange(self.draws.start, self.draws.stop)
        replicates = range(self.draws.start // points.num, (self.draws.stop - 1) // points.num + 1)
        scrambles = self._replace(draws=replicates)._blocks(rows, (*rest, points.bits + 1), words)
        at = points.at(of_draws % points.num, self.part, math.prod(rest))
        at = at.reshape(len(of_draws), *(() if rows is None else (1,)), *rest)
        return points.scrambled(at, scrambles, of_draws // points.num - replicates.start)

    def rows(self, num: int) -> Sequence[int]:
        """The indices of the rows, which are so many."""
        return range(self.start, self.start + num) if isinstance(self.start, int) else self.start

    def seed(self, draw: int, row: int) -> int:
        """Of torch's generators, for one row of one draw."""
        return rng.seed_of(*self.key, draw, *self.part, row)


D = TypeVar("D", bound=Distribution)
Rule = Callable[[D, Noise], Tensor]
_RULES: list[tuple[type[Distribution], Callable[..., Tensor]]] = []


def draws_by_row(cls: type[D]) -> Callable[[Rule[D]], Rule[D]]:
    """Register how distributions of a class draw, if they use that class's own methods.

    ::

        @draws_by_row(Normal)
        def _normal(d, noise):
            return d.loc + d.scale * noise.normal(d.loc, d.batch_shape)
    """

    def register(rule: Rule[D]) -> Rule[D]:
        _RULES.append((cls, rule))
        return rule

    return register


def draw(d: Distribution, noise: Noise) -> Tensor:
    """A value of ``d``, of its batch and event shape."""
    for cls, rule in reversed(_RULES):  # a class may be that of a later rule, more closely
        if keeps(d, cls, DRAWING):
            return rule(d, noise)
    return _by_inverse(d, noise) if _has_inverse(d) else _one_by_one(d, noise)


def _shape(d: Distribution) -> torch.Size:
    return d.batch_shape + d.event_shape


@draws_by_row(MaskedDistribution)
def _masked(d: MaskedDistribution, noise: Noise) -> Tensor:
    return draw(d.base_dist, noise)


@draws_by_row(Independent)
def _independent(d: Independent, noise: Noise) -> Tensor:
    return draw(d.base_dist, noise.below(d.reinterpreted_batch_ndims))


@draws_by_row(Delta)
def _delta(d: Delta, noise: Noise) -> Tensor:
    return d.v.expand(_shape(d))


@draws_by_row(TransformedDistribution)
def _transformed(d: TransformedDistribution, noise: Noise) -> Tensor:
    extra = len(_shape(d)) - len(d.event_shape) - len(d.base_dist.batch_shape)
    value = draw(d.base_dist, noise.within(0, -extra))
    for transform in d.transforms:
        value = transform(value)
    return value  # type: ignore[return-value]


@draws_by_row(MixtureSameFamily)
def _mixture(d: MixtureSameFamily, noise: Noise) -> Tensor:
    component = draw(d.mixture_distribution, noise.within(0))
    values = draw(d.component_distribution, noise.within(1, 1))
    at = component.reshape(*component.shape, 1, *(1,) * len(d.event_shape))
    dim = component.dim()
    return values.gather(dim, at.expand(*d.batch_shape, 1, *d.event_shape)).squeeze(dim)


@draws_by_row(Normal)
def _normal(d: Normal, noise: Noise) -> Tensor:
    return d.loc + d.scale * noise.normal(d.loc, _shape(d))


@draws_by_row(MultivariateNormal)
def _multivariate_normal(d: MultivariateNormal, noise: Noise) -> Tensor:
    z = noise.normal(d.loc, _shape(d), 1)
    return d.loc + (d.scale_tril @ z.unsqueeze(-1)).squeeze(-1)


@draws_by_row(LowRankMultivariateNormal)
def _low_rank_normal(d: LowRankMultivariateNormal, noise: Noise) -> Tensor:
    W, scale = d.cov_factor, d.cov_diag.sqrt()
    low = noise.within(0).normal(d.loc, d.batch_shape + W.shape[-1:], 1)
    z = noise.within(1).normal(d.loc, _shape(d), 1)
    return d.loc + (W @ low.unsqueeze(-1)).squeeze(-1) + scale * z


@draws_by_row(Bernoulli)
def _bernoulli(d: Bernoulli, noise: Noise) -> Tensor:
    return (noise.uniform(d.probs, _shape(d)) < d.probs).to(d.probs)


@draws_by_row(Categorical)
def _categorical(d: Categorical, noise: Noise) -> Tensor:
    level = d.probs.cumsum(-1)
    u = noise.uniform(level, _shape(d)) * level[..., -1]
    return (u.unsqueeze(-1) >= level[..., :-1]).sum(-1)


@draws_by_row(OneHotCategorical)
def _one_hot(d: OneHotCategorical, noise: Noise) -> Tensor:
    values = draw(Categorical(d.probs, validate_args=False), noise)
    return torch.nn.functional.one_hot(values, _shape(d)[-1]).to(d.probs)


@draws_by_row(Gamma)
def _gamma(d: Gamma, noise: Noise) -> Tensor:
    return _positive(_log_gamma(d.concentration, noise, 0).exp()) / d.rate


@draws_by_row(Beta)
def _beta(d: Beta, noise: Noise) -> Tensor:
    a, b = (
        _log_gamma(concentration, noise.within(i), 0)
        for i, concentration in enumerate((d.concentration1, d.concentration0))
    )
    eps = torch.finfo(a.dtype).eps
    return (a - b).sigmoid().clamp(torch.finfo(a.dtype).tiny, 1 - eps / 2)


@draws_by_row(Dirichlet)
def _dirichlet(d: Dirichlet, noise: Noise) -> Tensor:
    return _positive(_log_gamma(d.concentration, noise, 1).softmax(-1))


@draws_by_row(StudentT)
def _student(d: StudentT, noise: Noise) -> Tensor:
    chi2 = 2 * _positive(_log_gamma(d.df / 2, noise.within(0), 0).exp())
    return d.loc + d.scale * noise.within(1).normal(d.loc, _shape(d)) * (d.df / chi2).sqrt()


@draws_by_row(Poisson)
def _poisson(d: Poisson, noise: Noise) -> Tensor:
    return _by_quantile(scipy.stats.poisson.ppf, noise, d.rate)


@draws_by_row(Binomial)
def _binomial(d: Binomial, noise: Noise) -> Tensor:
    return _by_quantile(scipy.stats.binom.ppf, noise, d.total_count, d.probs)


def _positive(value: Tensor) -> Tensor:
    """What has become 0 by rounding is the least number above it, as in torch."""
    return value.clamp(min=torch.finfo(value.dtype).tiny)


def _log_gamma(concentration: Tensor, noise: Noise, event_dims: int) -> Tensor:
    """The logarithm of a draw of Gamma(a, 1), differentiable in a.

    That of one of Gamma(a + 1, 1), by the inverse distribution function, and of u^(1/a), whose
    product it is: so nothing underflows where a is small.
    """
    a = concentration
    u, v = (noise.within(2 + i).uniform(a, a.shape, event_dims).double() for i in range(2))
    larger = a.detach().double().cpu() + 1
    g = torch.as_tensor(
        scipy.special.gammaincinv(larger.numpy(), u.clamp(min=1e-300).cpu().numpy())
    )
    g = gradient_of_gamma(a + 1, _positive(g.to(a)))
    return g.log() + (v.clamp(min=1e-300).log() / a).to(a)


def _by_quantile(quantile: Callable[..., np.ndarray], noise: Noise, *parameters: Tensor) -> Tensor:
    """Draws of a distribution on whole numbers, by its quantile function."""
    like = parameters[-1]
    u = noise.uniform(like, like.shape).double().cpu().numpy()
    values = quantile(u, *(x.detach().double().cpu().numpy() for x in parameters))
    return torch.as_tensor(np.maximum(values, 0.0)).to(like)


def _has_inverse(d: Distribution) -> bool:
    inverse = owner(type(d), "icdf")
    if d.event_shape or inverse is Distribution:
        return False
    return all(keeps(d, inverse, (name,)) for name in (*DRAWING, *DENSITY))


def _by_inverse(d: Distribution, noise: Noise) -> Tensor:
    like = next(getattr(d, name) for name in d.arg_constraints)
    u = noise.uniform(like, d.batch_shape)
    eps = torch.finfo(u.dtype).eps
    return d.icdf(u.clamp(eps / 2, 1 - eps))


def _one_by_one(d: Distribution, noise: Noise) -> Tensor:
    """Each row of each draw separately; where these are not available, all at once."""
    num = len(d.batch_shape)
    axes = [None if dim is None else num + dim for dim in (noise.draw_dim, noise.row_dim)]
    rows = noise.rows(1 if axes[1] is None else d.batch_shape[axes[1]])
    with rng.put_aside():
        try:
            of_draws = _parts(d, axes[0])
            parts = [_parts(part, axes[1]) for part in of_draws]
        except NotImplementedError:
            rng.begin(noise.seed(noise.draws.start, rows[0]))
            return _drawn(d)
        values = []
        for draw, of_rows in zip(noise.draws, parts, strict=True):
            of_draw = []
            for row, part in zip(rows, of_rows, strict=True):
                rng.begin(noise.seed(draw, row))
                of_draw.append(_drawn(part))
            values.append(_joined(of_draw, axes[1]))
    return _joined(values, axes[0])


def _drawn(d: Distribution) -> Tensor:
    draw_one: Callable[[], Tensor] = d if callable(d) else d.sample  # as Pyro draws
    return draw_one()


def _joined(values: list[Tensor], dim: int | None) -> Tensor:
    """Draws beside each other; of straight-through ones also what their density is of."""
    if dim is None or len(values) == 1:
        return values[0]
    joined = torch.cat(values, dim)
    if all(hasattr(value, SOFT) for value in values):
        setattr(joined, SOFT, torch.cat([getattr(value, SOFT) for value in values], dim))
    return joined


def _parts(d: Distribution, dim: int | None) -> list[Distribution]:
    """``d`` by the elements of one dim of its batch.

    Raises:
        NotImplementedError: where it is not made from the parameters that ``arg_constraints``
            lists.
    """
    if dim is None or d.batch_shape[dim] == 1:
        return [d]
    if isinstance(d, ExpandedDistribution):
        return _parts_of_expanded(d, dim)
    if not is_made_of_parameters(d):
        raise NotImplementedError(type(d).__name__)
    parameters = {}
    for name in [n for n in d.arg_constraints if n in vars(d)] or d.arg_constraints:
        value, constraint = getattr(d, name), d.arg_constraints[name]
        if constraint is constraints.dependent or not isinstance(value, Tensor):
            raise NotImplementedError(type(d).__name__)
        event = value.shape[value.dim() - constraint.event_dim :]
        parameters[name] = value.expand(d.batch_shape + event)
    make: Callable[..., Distribution] = type(d)
    try:
        return [
            make(**{n: x.narrow(dim, i, 1) for n, x in parameters.items()}, validate_args=False)
            for i in range(d.batch_shape[dim])
        ]
    except (TypeError, ValueError) as error:  # of Pyro and others, made in ways of their own
        raise NotImplementedError(type(d).__name__) from error


def _parts_of_expanded(d: ExpandedDistribution, dim: int) -> list[Distribution]:
    """The parts of what a plate has expanded, for classes without their own ``expand``."""
    num, base = d.batch_shape[dim], d.base_dist
    at = dim - (len(d.batch_shape) - len(base.batch_shape))
    is_whole = at >= 0 and base.batch_shape[at] == num
    shape = torch.Size(1 if i == dim else size for i, size in enumerate(d.batch_shape))
    bases = _parts(base, at) if is_whole else [base] * num
    return [ExpandedDistribution(part, shape) for part in bases]
