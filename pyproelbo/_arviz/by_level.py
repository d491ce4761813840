"""Posterior draws of a program with global and local latents, by weights of each level."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyproelbo._arviz.corrected import resampled, warn_of_narrow, warn_of_tails
from pyproelbo._evidence.by_level import NESTED
from pyproelbo._evidence.level_picks import Drawn, Picked, with_next
from pyproelbo._evidence.pareto import LEAST, pareto_smooth
from pyproelbo._rows.levels import LevelDraws
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.runs import Use

_GLOBALS = "global latents of the model"


class LevelPosterior(NamedTuple):
    """Draws from the posterior of w and z, by the guide's sites.

    Attributes:
        values: by site, (S, *shape).
        khat: k-hat of the weights of w.
    """

    values: Mapping[str, Tensor]
    khat: float

    def at(self, draws: range) -> dict[str, Tensor]:
        """The values of some draws."""
        return {name: value[draws.start : draws.stop] for name, value in self.values.items()}


def by_level(draws: LevelDraws, num_samples: int, seed: int, progress: bool) -> LevelPosterior:
    """``num_samples`` draws from the posterior.

    Each draw of w has 20 draws of every z_n. One of these is chosen for each n, with probability
    proportional to its weight p(x_n, z | w) / q(z | x_n, w); then draws of w, each with its z, are
    resampled by their smoothed weights p(w) p^(x | w) / q(w), where p^(x | w) is the product over n
    of the means of those weights. (w, z) are thus draws from the posterior, for any number of draws
    of z (Andrieu, Doucet & Holenstein 2010, "Particle Markov chain Monte Carlo methods", here with
    importance sampling), and the weights of w remain usable for large N.

    Raises:
        ValueError: for fewer than 25 draws.
    """

    def of_next(before: list[Picked] | None, part: range) -> list[Picked]:
        return [*(before or []), *_picked(draws, part, seed)]

    def joined(parts: list[Picked], _: bool) -> LevelPosterior:
        log_weight = torch.cat([part.log_weight for part in parts]).unsqueeze(1)
        names = parts[0].values
        values = {name: torch.cat([part.values[name] for part in parts]) for name in names}
        smoothed, khat = pareto_smooth(log_weight)
        warn_of_narrow([values.pop(_GLOBALS)], smoothed[:, 0])
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


def _picked(draws: LevelDraws, part: range, seed: int) -> list[Picked]:
    """Some draws of w, each with one of its draws of z, chosen by weight."""
    axes, found = draws.local_axes(), list[Picked]()
    for run in draws.runs(part, NESTED, Use.POSTERIOR):
        globals_ = draws.values(run.traces, "global")[1][:, 0]
        values = {**draws.drawn(run.traces), _GLOBALS: globals_}
        drawn = Drawn(run.numbers, run.of_globals, run.of_locals, values)
        found = with_next(found, drawn, axes, NESTED, seed)
    return found
