r"""Mixtures of Normals in one dimension, interpolated: in time that grows with N + M, not N M.

A mixture is smooth at the scale of its components. They are sorted into octaves of their scale s.
Those of an octave are evaluated at the nodes of a grid of spacing h, rho h <= s < 2 rho h, out to c
scales from each mean, and added up there. Between the nodes their sum f is the polynomial through
the p nodes around. The grid has nodes near components alone.

**The bound.** The remainder of Lagrange's interpolation is at most R h^p max |f^(p)|, where
R = max_t |prod_j (t - j)| / p! between the two central nodes. Derivatives of a Normal are Hermite
functions, |He_p(u)| <= K sqrt(p!) exp(u^2 / 4) by Cramer's inequality, with u = (z - mu) / s and
N(z; mu, s^2) = w exp(-u^2 / 2), w = 1 / (s sqrt(2 pi)). With that of Cauchy and Schwarz,

    |f^(p)| <= (rho h)^-p K sqrt(p!) sum_n w_n exp(-u_n^2 / 4)
            <= (rho h)^-p K sqrt(p!) sqrt(W f),   W = sum_n w_n,

so that the error is at most C sqrt(W max f), C = R K sqrt(p!) / rho^p, with the maximum over the
stretch of the p nodes, and there f is at most exp(1 / (8 rho^2)) times the sum of those at the next
two nodes. What is cut off beyond c scales is at most W exp(-c^2 / 2). The errors of all octaves,
and those of rounding, are added up at each point and compared with the density found. Where they do
not prove its logarithm to 2e-6 nats, as in far tails, the point goes to the exact kernel.

Greengard and Strain (1991), "The fast Gauss transform"; Silverman (1982), "Kernel density
estimation using the fast Fourier transform", for sums on a grid; Abramowitz and Stegun (1964),
22.14.17, for Cramer's inequality.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._distributions.mixture_kernel import check_mixture, log_aggregate_marginals

_ORDER = 16  # p, even
_NODES = 6  # rho
_WINDOW = 9.0  # c
_TOLERANCE = 2e-6  # nats
_HALF = math.ceil(2 * _NODES * _WINDOW) + 1  # nodes on either side of that next to a mean
_REACH = _HALF + _ORDER // 2  # nodes from there to where the polynomials are 0
_GAP = 2 * (_HALF + _ORDER)  # the most nodes between two means: of more, the middle is left out

_REMAINDER = (  # C
    math.prod(j - 0.5 for j in range(1, _ORDER // 2 + 1)) ** 2
    / math.sqrt(math.factorial(_ORDER))
    * 1.0865
    / _NODES**_ORDER
)
_BETWEEN = 2 * math.exp(1 / (8 * _NODES**2))
_CUT = math.exp(-(_WINDOW**2) / 2)
_LEBESGUE = 2.0  # above the largest sum of the absolute values of the p weights of a point
_ROUNDING = 1e-11  # relative: that of exponents, and of sums of 1e5 terms at worst

_ELEMENTS = 2**17  # of temporary tensors: they fit the caches
_LONGEST = 2**18  # nodes of a stretch of a grid
_PER_MEAN = 30  # of these, as many as the sums around a mean count for

# what things cost, where a pair of a point and a component costs the exact kernel 1
_BY_COMPONENT, _BY_POINT, _BY_OCTAVE = 300, 80, 500_000
_WASTE = 0.03  # of the exact kernel's time, that may be lost where it is needed after all


def interpolated_marginals(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""log (1/N) sum_n N(z_d; loc_nd, scale_nd^2) for each dimension d separately, in nats.

    As :func:`log_aggregate_marginals`, without gradients, and in time of order D (N + M) where that
    is shorter. Interpolated values are computed in float64 and have errors below 2e-6 nats, before
    they are rounded to the dtype of ``z``. The exact kernel computes all others: for few data, on a
    GPU, at points whose error is not known to be as small, and for dimensions in which means or
    scales are not finite.

    Args:
        z: points, shape (..., D), float32 or float64.
        loc: means, shape (N, D).
        scale: standard deviations, shape (N, D).

    Returns:
        Log densities, shape (..., D).

    Raises:
        ValueError: as :func:`log_aggregate_marginals`.
    """
    check_mixture(z, loc, scale)
    loc, scale, points = loc.detach(), scale.detach(), z.detach().reshape(-1, loc.shape[1])
    (num, d), exact = loc.shape, float(len(loc) * len(points))
    least, most = _cost(num, len(points), 1), exact * min(0.5, _WASTE * d)
    if z.device.type != "cpu" or least > most:
        return log_aggregate_marginals(points, loc, scale).reshape(z.shape)
    result = torch.empty_like(points)
    wasted, left = 0.0, list[int]()
    for k in range(d):
        if wasted + least > _WASTE * d * exact:
            left += range(k, d)
            break
        x, m, s = (v[:, k].double().contiguous() for v in (points, loc, scale))
        octaves = _octaves(m, s)
        cost = _cost(num, len(points), len(octaves))
        if not octaves or cost > exact / 2 or wasted + cost > _WASTE * d * exact:
            left.append(k)
            continue
        density, is_sure = _density(x, m, s, octaves)
        result[:, k] = density.log() - math.log(num)
        rest = (~is_sure).nonzero()[:, 0]
        if len(rest):
            one = slice(k, k + 1)
            of_rest = log_aggregate_marginals(points[rest, one], loc[:, one], scale[:, one])
            result[rest, k] = of_rest[:, 0]
        wasted += max(0.0, cost - exact * (1 - len(rest) / len(points)))
    if left:
        result[:, left] = log_aggregate_marginals(points[:, left], loc[:, left], scale[:, left])
    return result.reshape(z.shape)


def _cost(num: int, points: int, octaves: int) -> float:
    return _BY_COMPONENT * num + _BY_POINT * (octaves + 1) * points + _BY_OCTAVE * octaves


def _octaves(loc: Tensor, scale: Tensor) -> list[int]:
    """The exponents k of the grids' spacings h = 2^k; none where there can be no grid."""
    if not (loc.isfinite().all() and (scale > 1e-100).all() and (scale < 1e100).all()):
        return []
    k = _exponents(scale)
    if (loc.abs() >= torch.ldexp(torch.full_like(loc, 2.0**50), k)).any():
        return []
    return k.unique().tolist()


def _exponents(scale: Tensor) -> Tensor:
    return torch.frexp(scale / _NODES).exponent - 1


def _density(z: Tensor, loc: Tensor, scale: Tensor, octaves: list[int]) -> tuple[Tensor, Tensor]:
    """The sum of the components at points (M,), and whether its logarithm is proved."""
    z, order = z.sort()
    loc, by_loc = loc.sort()
    scale = scale[by_loc]
    exponents = _exponents(scale)
    density, error = torch.zeros_like(z), torch.full_like(z, torch.inf)
    first = int((z == -torch.inf).sum())  # NaN is last
    finite = slice(first, first + int(z.isfinite().sum()))
    error[finite] = 0.0
    for k in octaves:
        unit = 2.0**-k  # by which nothing is rounded
        of = exponents == k
        m, s = loc[of] * unit, scale[of] * unit
        x, f, e = z[finite] * unit, density[finite], error[finite]
        for stretch in _stretches(m, s):
            for part in _split(*stretch.reached(x), _ELEMENTS // _ORDER):
                value, bound = stretch.at(x[part])
                f[part].add_(value, alpha=unit)
                e[part].add_(bound, alpha=unit)
        total = unit * float(_peaks(s).sum())
        e += total * (_LEBESGUE * _CUT + _REMAINDER * math.sqrt(_BETWEEN * _CUT))
    is_sure = error <= _TOLERANCE * (density - error)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return density[back], is_sure[back]


def _peaks(scale: Tensor) -> Tensor:
    """The densities of Normals at their means."""
    return scale.reciprocal() / math.sqrt(2 * math.pi)


def _split(start: int, stop: int, size: int) -> Iterator[slice]:
    for left in range(start, stop, size):
        yield slice(left, min(left + size, stop))


class _Stretch(NamedTuple):
    """The sum of some components at the nodes of a grid, which are integers.

    Attributes:
        nodes: ascending, the nodes next to the components' means.
        places: where these are in ``values``.
        gaps: how far it is from each to the next.
        values: at consecutive nodes; of a gap above ``_GAP`` some in the middle, 0, are left out.
        total: W.
    """

    nodes: Tensor
    places: Tensor
    gaps: Tensor
    values: Tensor
    total: float

    def reached(self, z: Tensor) -> tuple[int, int]:
        """Between which of ascending points the polynomials may not be 0."""
        ends = self.nodes[[0, -1]].double() + z.new_tensor([-_REACH, _REACH])
        start, stop = torch.searchsorted(z, ends).tolist()
        return start, stop

    def at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The polynomials at points, and the largest error of these."""
        node = z.floor()
        t = z - node - 0.5
        node = node.long()
        i = torch.searchsorted(self.nodes, node, right=True).sub_(1).clamp_(min=0)
        ahead, gap = node - self.nodes[i], self.gaps[i]
        left_out = (gap - _GAP).clamp_(min=0)
        ahead = torch.maximum(ahead.clamp(max=_GAP // 2), ahead - left_out)
        first = self.places[i] + ahead - (_ORDER // 2 - 1)
        around = self.values.unfold(0, _ORDER, 1)[first]
        top = around.amax(1)
        bound = top.mul(_BETWEEN * self.total).sqrt_().mul_(_REMAINDER).add_(top, alpha=_ROUNDING)
        weights = torch.linalg.vander(t, N=_ORDER) @ _lagrange()
        return around.mul_(weights).sum(1), bound


def _stretches(loc: Tensor, scale: Tensor) -> Iterator[_Stretch]:
    """Those of components with ascending means, in units of h."""
    nearest = loc.round()
    nodes, which, counts = nearest.long().unique_consecutive(
        return_inverse=True, return_counts=True
    )
    gaps = nodes.diff(append=nodes[-1:])
    places = gaps.clamp(max=_GAP).cumsum(0).roll(1)
    places[0] = 0
    number = torch.arange(len(nodes), device=loc.device)
    is_last = ((places + _PER_MEAN * number) // _LONGEST).diff() != 0
    ends = [*(is_last.nonzero()[:, 0] + 1).tolist(), len(nodes)]
    stops = counts.cumsum(0)[torch.tensor(ends, device=loc.device) - 1].tolist()
    offsets = torch.arange(-_HALF, _HALF + 1, device=loc.device)
    start, begin = 0, 0
    for end, stop in zip(ends, stops, strict=True):
        of, rows = slice(start, end), slice(begin, stop)
        at = places[of] - places[start] + _HALF + _ORDER
        sums = _around(loc[rows] - nearest[rows], scale[rows], which[rows] - start, end - start)
        values = loc.new_zeros(int(at[-1]) + _HALF + 2 * _ORDER)
        for part in _split(0, len(sums), _ELEMENTS // len(offsets)):
            values.scatter_add_(0, (at[part, None] + offsets).view(-1), sums[part].view(-1))
        yield _Stretch(nodes[of], at, gaps[of], values, float(_peaks(scale[rows]).sum()))
        start, begin = end, stop


def _around(loc: Tensor, scale: Tensor, which: Tensor, num: int) -> Tensor:
    """Sums at the nodes -_HALF, ..., _HALF of the components of each of ``num`` groups."""
    offsets = torch.arange(-_HALF, _HALF + 1, dtype=loc.dtype, device=loc.device)
    sums = loc.new_zeros(num, len(offsets))
    # log w - u^2 / 2 as a product: it does not cancel, for loc is between -1/2 and 1/2
    powers = torch.stack([offsets.square(), offsets, torch.ones_like(offsets)])
    w = scale.square().reciprocal()
    factors = torch.stack([-0.5 * w, w * loc, _peaks(scale).log() - 0.5 * w * loc.square()], 1)
    for part in _split(0, len(loc), _ELEMENTS // len(offsets)):
        sums.index_add_(0, which[part], torch.mm(factors[part], powers).exp_())
    return sums


@cache
def _lagrange() -> Tensor:
    """The weights of the nodes at t, which is from -1/2 to 1/2: coefficients (power, node)."""
    nodes = [Fraction(2 * j - _ORDER + 1, 2) for j in range(_ORDER)]
    columns = []
    for node in nodes:
        c = [Fraction(1)]
        for other in nodes:
            if other != node:
                times_t, times_other = [Fraction(0), *c], [*(other * x for x in c), Fraction(0)]
                c = [(a - b) / (node - other) for a, b in zip(times_t, times_other, strict=True)]
        columns.append([float(x) for x in c])
    return torch.tensor(columns, dtype=torch.float64, device="cpu").mT.contiguous()
