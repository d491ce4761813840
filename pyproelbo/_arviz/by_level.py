"""Draws of the posterior of a program with global and local latents: by weights of each level."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._arviz.corrected import resampled, warn_of_narrow, warn_of_tails
from pyproelbo._distributions.row_noise import Noise
from pyproelbo._evidence.by_level import NESTED
from pyproelbo._evidence.pareto import LEAST, pareto_smooth
from pyproelbo._rows.levels import LevelDraws, LevelRun
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.runs import Use


class LevelPosterior(NamedTuple):
    """Draws of the posterior of w and z, as the guide's sites have them.

    Attributes:
        values: by site, (S, *shape).
        khat: of the weights of w.
    """

    values: Mapping[str, Tensor]
    khat: float

    def at(self, draws: range) -> dict[str, Tensor]:
        """Those of some draws."""
        return {name: value[draws.start : draws.stop] for name, value in self.values.items()}


class _Picked(NamedTuple):
    """Draws of w, W of them, with one of some draws of z for each.

    Attributes:
        of_globals: log p(w) - log q(w), (W,).
        total: the logarithm of the sum of the weights of the draws of z, (W, N).
        score: that of the z that is taken, (W, N).
        values: of what the guide draws, by site, (W, *shape).
        globals_: the model's global latents, (W, D).
    """

    of_globals: Tensor
    total: Tensor
    score: Tensor
    values: dict[str, Tensor]
    globals_: Tensor

    @property
    def log_weight(self) -> Tensor:
        """log p(w) p^(x | w) / q(w), (W,)."""
        return self.of_globals + (self.total - math.log(NESTED)).sum(-1)


def by_level(draws: LevelDraws, num_samples: int, seed: int, progress: bool) -> LevelPosterior:
    """As many draws of the posterior.

    Each draw of w has 20 draws of every z_n. One of these is taken for each n, with a probability
    that is its weight p(x_n, z | w) / q(z | x_n, w); then draws of w, each with its z, are
    resampled by their smoothed weights p(w) p^(x | w) / q(w), where p^(x | w) is the product over
    n of the means of those. So (w, z) are of the posterior, for any number of draws of z (Andrieu,
    Doucet & Holenstein 2010, "Particle Markov chain Monte Carlo methods", of importance sampling
    instead), and N data do not ruin the weights of w.

    Raises:
        ValueError: for fewer than 25 draws.
    """

    def of_next(before: list[_Picked] | None, part: range) -> list[_Picked]:
        return [*(before or []), *_picked(draws, part, seed)]

    def joined(parts: list[_Picked], _: bool) -> LevelPosterior:
        log_weight = torch.cat([part.log_weight for part in parts]).unsqueeze(1)
        names = parts[0].values
        values = {name: torch.cat([part.values[name] for part in parts]) for name in names}
        smoothed, khat = pareto_smooth(log_weight)
        warn_of_narrow([torch.cat([part.globals_ for part in parts])], smoothed[:, 0])
        warn_of_tails(smoothed, khat)
        picks = resampled(smoothed, num_samples, seed)[:, 0]
        return LevelPosterior({n: v[picks.to(v.device)] for n, v in values.items()}, khat.item())

    return by_part(
        bar(list(draws.chunks(num_samples, None, NESTED)), "corrected draws", progress),
        of_next,
        joined,
        "from_svi",
        lambda part: f"{part.stop} draws of the global latents",
        lambda parts: sum(len(part.of_globals) for part in parts) >= LEAST,
    )


def _picked(draws: LevelDraws, part: range, seed: int) -> list[_Picked]:
    """Some draws of w, and of the draws of z for each one by its weight."""
    axes, found = draws.local_axes(), list[_Picked]()
    for run in draws.runs(part, NESTED, Use.POSTERIOR):
        picked = _of_run(run, draws, axes, seed)
        if run.numbers.start % NESTED:  # some draws of z for the same w as those before
            picked = _better(found.pop(), picked, axes)
        found.append(picked)
    return found


def _of_run(run: LevelRun, draws: LevelDraws, axes: Mapping[str, int], seed: int) -> _Picked:
    each = min(NESTED, len(run.numbers))
    log_weight = run.of_locals.unflatten(0, (-1, each))
    noise = Noise.of_site("picks", (seed, Use.PICKS), run.numbers, 0, -2, -1)
    uniform = noise.uniform(run.of_locals, run.of_locals.shape).unflatten(0, (-1, each))
    score, index = (log_weight - (-uniform.log()).log()).max(1)  # Gumbel's: by its weight
    taken = {}
    for name, value in draws.drawn(run.traces).items():
        value = value.unflatten(0, (-1, each))
        taken[name] = (
            _at(value, index.to(value.device), axes[name]) if name in axes else value[:, 0]
        )
    of_globals = run.of_globals.unflatten(0, (-1, each))[:, 0]
    globals_ = draws.values(run.traces, "global")[1][::each, 0]
    return _Picked(of_globals, log_weight.logsumexp(1), score, taken, globals_)


def _at(values: Tensor, index: Tensor, axis: int) -> Tensor:
    """Of values (W, K, *shape) those of numbers (W, N), with N at an axis from the right."""
    rows = values.movedim(axis, 2)
    index = index.reshape(len(index), 1, -1, *(1,) * (rows.dim() - 3))
    return rows.gather(1, index.expand(-1, -1, -1, *rows.shape[3:])).squeeze(1).movedim(1, axis)


def _better(one: _Picked, other: _Picked, axes: Mapping[str, int]) -> _Picked:
    """Both together, which are of the same w."""
    is_other, values = other.score > one.score, dict(one.values)
    for name, axis in axes.items():
        old, new = (part.values[name].movedim(axis, 1) for part in (one, other))
        where = is_other.to(old.device).reshape(*is_other.shape, *(1,) * (old.dim() - 2))
        values[name] = torch.where(where, new, old).movedim(1, axis)
    total = torch.logaddexp(one.total, other.total)
    score = torch.maximum(one.score, other.score)
    return one._replace(total=total, score=score, values=values)
