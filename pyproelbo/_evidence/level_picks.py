"""One of several draws of each datum's latents, by weight, for each draw of the global ones."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._distributions.row_noise import Noise
from pyproelbo._rows.runs import Use


class Picked(NamedTuple):
    """W draws of w, with one of K draws of z for each.

    Attributes:
        of_globals: log p(w) - log q(w), (W,).
        total: the logarithm of the sum of the weights of the draws of z, (W, N).
        score: of the chosen z, (W, N).
        values: by name, (W, ...).
        num_local: K.
    """

    of_globals: Tensor
    total: Tensor
    score: Tensor
    values: dict[str, Tensor]
    num_local: int

    @property
    def log_weight(self) -> Tensor:
        """log p(w) p^(x | w) / q(w), (W,)."""
        return self.of_globals + (self.total - math.log(self.num_local)).sum(-1)


class Drawn(NamedTuple):
    """Draws of z given draws of w, from one run.

    Attributes:
        numbers: the indices of the draws of z; K in a row are for one w.
        of_globals, of_locals: log-weights of each draw of z: (num,) and (num, N).
        values: by name, (num, ...).
    """

    numbers: range
    of_globals: Tensor
    of_locals: Tensor
    values: Mapping[str, Tensor]


def with_next(
    found: list[Picked], drawn: Drawn, axes: Mapping[str, int], num_local: int, seed: int
) -> list[Picked]:
    """The picks so far, with those of another run.

    Args:
        axes: for values that differ between data, their data dim, counted from the right.
    """
    picked = _of(drawn, axes, num_local, seed)
    if drawn.numbers.start % num_local:  # some draws of z belong to the same w as those before
        return [*found[:-1], _better(found[-1], picked, axes)]
    return [*found, picked]


def _of(drawn: Drawn, axes: Mapping[str, int], num_local: int, seed: int) -> Picked:
    each = min(num_local, len(drawn.numbers))
    log_weight = drawn.of_locals.unflatten(0, (-1, each))
    noise = Noise.of_site("picks", (seed, Use.PICKS), drawn.numbers, 0, -2, -1)
    uniform = noise.uniform(drawn.of_locals, drawn.of_locals.shape).unflatten(0, (-1, each))
    score, index = (log_weight - (-uniform.log()).log()).max(1)  # Gumbel's: by its weight
    taken = {}
    for name, value in drawn.values.items():
        value = value.unflatten(0, (-1, each))
        taken[name] = (
            _at(value, index.to(value.device), axes[name]) if name in axes else value[:, 0]
        )
    of_globals = drawn.of_globals.unflatten(0, (-1, each))[:, 0]
    return Picked(of_globals, log_weight.logsumexp(1), score, taken, num_local)


def _at(values: Tensor, index: Tensor, axis: int) -> Tensor:
    """From values (W, K, *shape), those with indices (W, N), with N at an axis from the right."""
    rows = values.movedim(axis, 2)
    index = index.reshape(len(index), 1, -1, *(1,) * (rows.dim() - 3))
    return rows.gather(1, index.expand(-1, -1, -1, *rows.shape[3:])).squeeze(1).movedim(1, axis)


def _better(one: Picked, other: Picked, axes: Mapping[str, int]) -> Picked:
    """Both together, for the same w."""
    is_other, values = other.score > one.score, dict(one.values)
    for name, axis in axes.items():
        old, new = (part.values[name].movedim(axis, 1) for part in (one, other))
        where = is_other.to(old.device).reshape(*is_other.shape, *(1,) * (old.dim() - 2))
        values[name] = torch.where(where, new, old).movedim(1, axis)
    total = torch.logaddexp(one.total, other.total)
    score = torch.maximum(one.score, other.score)
    return one._replace(total=total, score=score, values=values)
