"""Importance weights by level: of global latents, and of those of each datum given them."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyproelbo._evidence.weights import Evidence, Weights, summary
from pyproelbo._messages.arguments import check_counts
from pyproelbo._rows.levels import LevelDraws, LevelWeights
from pyproelbo._rows.passes import bar
from pyproelbo._rows.runs import Use
from pyproelbo._terms.log_weights import log_mean_exp

LEVELS = ("joint", "global", "local")


def check_level(level: str | None, num_nested: int) -> None:
    """Raise a ValueError for another level, and for numbers that are not positive."""
    if level is not None and level not in LEVELS:
        raise ValueError(f"level should be one of {list(LEVELS)}, or None, got {level!r}")
    check_counts(num_nested=num_nested)


def global_weights(
    draws: LevelDraws, num_samples: int, num_nested: int, chunk: int | None, progress: bool
) -> Tensor:
    """log p(w) p^(x | w) / q(w) at S draws of w, (S, 1), in nats.

    The local latents are integrated out: log p^(x | w) = sum_n log (1/K) sum_k p(x_n, z_nk | w) /
    q(z_nk | x_n, w). As p^(x | w) has the mean p(x | w), the weights have that of log p(x), for
    any K (Andrieu & Roberts 2009, "The pseudo-marginal approach").
    """
    parts = list(draws.chunks(num_samples, chunk, num_nested))
    found = []
    for part in bar(parts, "global latents", progress):
        found.append(integrated(draws.weights(part, num_nested, Use.GLOBALS)))
    return torch.cat(found).unsqueeze(1)


def integrated(weights: LevelWeights) -> Tensor:
    """log p(w) p^(x | w) / q(w), with the local latents integrated out by their draws, (S,)."""
    return weights.of_globals + log_mean_exp(weights.of_locals.movedim(1, 0)).sum(-1)


def local_weights(
    draws: LevelDraws, num_samples: int, num_nested: int, progress: bool
) -> Iterable[Tensor]:
    """log p(x_n, z | w) / q(z | x_n, w) at S draws of z, (S, N), for each of some draws of w."""
    for s in bar(range(num_nested), "local latents", progress):
        yield draws.weights(range(s, s + 1), num_samples, Use.LOCALS).of_locals[0]


def local_evidence(weights: Iterable[Tensor]) -> Evidence:
    """log p(x_n | w) of each datum, mean over draws of w."""
    parts = [summary([Weights(w, w)]) for w in weights]

    def mean(get: Callable[[Evidence], Tensor | None]) -> Tensor:
        values = [get(part) for part in parts]
        return torch.stack([value for value in values if value is not None]).mean(0)

    def error(get: Callable[[Evidence], Tensor], within: Callable[[Evidence], Tensor]) -> Tensor:
        """Of the mean: by the spread over draws of w, which has their own errors in it."""
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
    )


def mean_over(parts: list[np.ndarray]) -> Tensor:
    """The mean of values of each datum over draws of w, (N,)."""
    return torch.as_tensor(np.mean(parts, 0))
