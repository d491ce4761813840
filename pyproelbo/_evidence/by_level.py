"""Importance weights by level: for global latents, and for each datum's latents given them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.pareto import LEAST
from pyproelbo._evidence.weights import Evidence
from pyproelbo._messages.arguments import check_counts
from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.levels import LevelDraws, LevelWeights
from pyproelbo._rows.passes import bar, by_part
from pyproelbo._rows.report_data import rows_of
from pyproelbo._rows.runs import Use
from pyproelbo._terms.log_weights import log_mean_exp
from pyproelbo._terms.traces import Program

Part = TypeVar("Part")
Result = TypeVar("Result")

LEVELS = ("joint", "global", "local")
NESTED = 20  # draws of the latents of the other level


def check_level(level: str | None, num_nested: int) -> None:
    """Raise a ValueError for an unknown level, and for numbers that are not positive."""
    if level is not None and level not in LEVELS:
        raise ValueError(f"level should be one of {list(LEVELS)}, or None, got {level!r}")
    check_counts(num_nested=num_nested)


@contextmanager
def level_draws(
    model: Program,
    guide: Program,
    data: ReportData,
    arguments: Arguments | None,
    plate: str | None,
    seed: int,
) -> Iterator[LevelDraws]:
    """Draws of all data by level, within a report on them."""
    (whole,) = rows_of(model, guide, data, sys.maxsize, arguments, is_joint=True).batches
    with evaluating(model, guide, seed=seed):
        yield LevelDraws(model, guide, whole, plate, seed)


class Integrated(NamedTuple):
    """Draws of global latents w, with the local ones integrated out.

    Attributes:
        log_weight: log p(w) p^(x | w) / q(w) in nats, (S, 1).
        names: the labels of the latents whose values were asked for.
        values: of these, (S, 1, D); None if there are none.
    """

    log_weight: Tensor
    names: tuple[str, ...] = ()
    values: Tensor | None = None


def over_globals(
    draws: LevelDraws,
    num_samples: int,
    num_nested: int,
    chunk: int | None,
    result: Callable[[Integrated], Result],
    name: str,
    progress: bool,
    with_values: bool = False,
) -> Result:
    """``result`` of S draws of global latents; after Ctrl-C, of those that are finished.

    The local latents are integrated out: log p^(x | w) = sum_n log (1/K) sum_k p(x_n, z_nk | w) /
    q(z_nk | x_n, w). As p^(x | w) has the mean p(x | w), the mean weight is p(x), for any K
    (Andrieu & Roberts 2009, "The pseudo-marginal approach").
    """

    def of_next(before: list[Integrated] | None, part: range) -> list[Integrated]:
        found = draws.weights(part, num_nested, Use.GLOBALS, "global" if with_values else None)
        values = None if found.values is None else found.values[:, 0]
        return [*(before or []), Integrated(integrated(found).unsqueeze(1), found.names, values)]

    def joined(parts: list[Integrated], _: bool) -> Result:
        values = [part.values for part in parts if part.values is not None]
        log_weight = torch.cat([part.log_weight for part in parts])
        whole = torch.cat(values) if values else None
        return result(Integrated(log_weight, parts[0].names, whole))

    parts = bar(list(draws.chunks(num_samples, chunk, num_nested)), f"{name} (global)", progress)
    return by_part(
        parts,
        of_next,
        joined,
        name,
        lambda part: f"{part.stop} draws of the global latents",
        lambda parts: sum(len(part.log_weight) for part in parts) >= LEAST,
    )


def over_locals(
    draws: LevelDraws,
    num_samples: int,
    num_nested: int,
    of: Callable[[LevelWeights], Part],
    result: Callable[[list[Part]], Result],
    name: str,
    progress: bool,
    with_values: bool = False,
) -> Result:
    """``result`` of ``of`` at S draws of local latents, for each draw of global ones."""

    def of_next(before: list[Part] | None, s: int) -> list[Part]:
        values_of = "local" if with_values else None
        part = of(draws.weights(range(s, s + 1), num_samples, Use.LOCALS, values_of))
        return [*(before or []), part]

    return by_part(
        bar(range(num_nested), f"{name} (local)", progress),
        of_next,
        lambda parts, _: result(parts),
        name,
        lambda s: f"{s + 1} draws of the global latents",
    )


def integrated(weights: LevelWeights) -> Tensor:
    """log p(w) p^(x | w) / q(w), with the local latents integrated out by their draws, (S,)."""
    return weights.of_globals + log_mean_exp(weights.of_locals.movedim(1, 0)).sum(-1)


def local_evidence(parts: list[Evidence]) -> Evidence:
    """log p(x_n | w) of each datum, the mean over draws of w."""

    def mean(get: Callable[[Evidence], Tensor | None]) -> Tensor:
        values = [get(part) for part in parts]
        return torch.stack([value for value in values if value is not None]).mean(0)

    def error(get: Callable[[Evidence], Tensor], within: Callable[[Evidence], Tensor]) -> Tensor:
        """The error of the mean, by the spread over draws of w, which includes their own errors."""
        if len(parts) == 1:
            return within(parts[0])
        return torch.stack([get(part) for part in parts]).std(0) / len(parts) ** 0.5

    return replace(
        parts[0],
        log_evidence=mean(lambda e: e.log_evidence),
        elbo=mean(lambda e: e.elbo),
        stderr=error(lambda e: e.log_evidence, lambda e: e.stderr),
        elbo_stderr=error(lambda e: e.elbo, lambda e: e.elbo_stderr),
        effective_sample_size=mean(lambda e: e.effective_sample_size),
        largest_weight=mean(lambda e: e.largest_weight),
        khat=mean(lambda e: e.khat) if parts[0].khat is not None else None,
    )


def mean_over(parts: list[np.ndarray]) -> Tensor:
    """The mean of values of each datum over draws of w, (N,)."""
    return torch.as_tensor(np.mean(parts, 0), device="cpu")
