"""Posterior draws from draws of q, resampled by their smoothed weights."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from pyproelbo._arviz.variables import Columns, Variable
from pyproelbo._evidence.moments import NARROW
from pyproelbo._evidence.pareto import LEAST, pareto_smooth, threshold_of, usable
from pyproelbo._evidence.resampling import systematic, taken
from pyproelbo._messages.warn import warn

DENSITIES = ("log_likelihood", "log_prior", "log_q")


class CorrectionWarning(UserWarning):
    """Draws were corrected by unreliable weights; the message has their k-hat."""


class Correction:
    """Replaces draws from q by draws from the posterior, in all groups of the posterior.

    Each draw is one of q's, chosen with probability proportional to its smoothed weight p(x, z) /
    q(z | x) (sampling importance resampling; Vehtari et al. 2024 for the smoothing). Where
    everything is in one plate, its rows have separate posteriors, and each row chooses its draws by
    its own weights, which remain usable for many rows. Otherwise the weights are those of all data
    together.

    Args:
        seed: of the resampling.

    Attributes:
        is_done: whether it has been called.
        khat: the largest k-hat of the weights; NaN before.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.is_done, self.khat = seed, False, math.nan

    def __call__(self, columns: Mapping[str, Columns]) -> None:
        """Correct the groups "posterior", "sample_stats" and the log-densities, in place.

        Raises:
            ValueError: for fewer than 25 draws.
        """
        self.khat, self.is_done = _correct(columns, self.seed), True


def _correct(columns: Mapping[str, Columns], seed: int) -> float:
    num = columns["sample_stats"].num_filled
    check_enough(num)
    plate = common_plate(columns)
    if plate is None:
        log_w = columns["sample_stats"].values["log_weight"][:num].unsqueeze(1)
    else:
        log_w = _by_row(columns, plate, num)
    smoothed, khat = pareto_smooth(log_w)
    if plate is None:
        warn_of_narrow(columns["posterior"].values.values(), smoothed[:, 0])
    picks = resampled(smoothed, num, seed)
    for group in ("posterior", *DENSITIES):
        columns[group].change(lambda v, x: _taken(v, x, plate, picks))
    stats = columns["sample_stats"]
    if plate is None:
        stats.change(lambda _, x: x[picks[:, 0]])
    else:
        lp = _by_row(columns, plate, num, ("log_likelihood", "log_prior")).sum(1)
        log_q = _by_row(columns, plate, num, ("log_q",)).sum(1)
        sums = {"lp": lp, "log_q": log_q, "log_weight": lp - log_q}
        stats.change(lambda v, x: sums.get(v.name, x))
    warn_of_tails(smoothed, khat)
    return float(khat.max())


def check_enough(num_samples: int) -> None:
    """Raise a ValueError for too few draws."""
    if num_samples < LEAST:
        raise ValueError(
            f"corrected=True needs at least {LEAST} draws, from which a tail is fitted, got "
            f"{num_samples}: raise num_samples"
        )


def warn_of_tails(smoothed: np.ndarray, khat: np.ndarray) -> None:
    """Warn where smoothed log-weights (S, N) cannot be used."""
    num = len(smoothed)
    threshold = threshold_of(num)
    sizes = 1 / np.exp(2 * smoothed).sum(0)
    bad = ~usable(torch.from_numpy(khat), torch.from_numpy(sizes), num).numpy()
    if bad.any():
        of = f" for {bad.mean():.1%} of the rows" if len(khat) > 1 else ""
        warn(
            f"draws are corrected by weights whose k-hat is {khat[bad].max():.2f}, above "
            f"{threshold:.2f}{of}: these draws are not from the posterior, of which q misses "
            "important parts. Train the guide longer, or take a richer family",
            CorrectionWarning,
        )


def warn_of_narrow(draws: Iterable[Tensor], smoothed: np.ndarray) -> None:
    """Warn where weighting widens draws (S, ...) by much."""
    weights = torch.from_numpy(np.exp(smoothed))
    if any(_is_narrow(values, weights) for values in draws if values.is_floating_point()):
        warn(
            f"q is so narrow, less than 1 / {NARROW} of the sd of its weighted draws, that these "
            "do not reach where the posterior is: the corrected draws are too narrow as well. "
            "Train the guide longer, or take a richer family",
            CorrectionWarning,
        )


def _is_narrow(values: Tensor, weights: Tensor) -> bool:
    x = values[: len(weights)].reshape(len(weights), -1).double()
    x, w = x - x.mean(0), weights.to(x.device)
    of_weighted = (w @ x.square() - (w @ x).square()).clamp(min=0)
    return bool((of_weighted > NARROW**2 * x.square().mean(0)).any())


def common_plate(columns: Mapping[str, Columns]) -> str | None:
    """The outermost plate that all log-densities and latents are in; None where there is none."""
    layouts = [v.layout for group in DENSITIES for v in columns[group].variables]
    shared = [{plate.name for plate in layout.plates} for layout in layouts]
    names = set.intersection(*shared) if shared else set()
    outer = [plate.name for plate in layouts[0].plates if plate.name in names] if layouts else []
    return outer[0] if outer else None


def _by_row(
    columns: Mapping[str, Columns], plate: str, num: int, groups: tuple[str, ...] = DENSITIES
) -> Tensor:
    """log p - log q of each row, (S, N), summed over groups."""
    total: Tensor | float = 0.0
    for group in groups:
        sign = -1 if group == "log_q" and len(groups) > 1 else 1
        for variable in columns[group].variables:
            value = columns[group].values[variable.name][:num]
            rows = value.movedim(_axis(variable, plate), 1)
            total = total + sign * rows.reshape(num, rows.shape[1], -1).nansum(-1)
    assert isinstance(total, Tensor)
    return total


def _axis(variable: Variable, plate: str) -> int:
    """The dim of a plate in draws (S, *plates, ...)."""
    return 1 + [p.name for p in variable.layout.plates].index(plate)


def _taken(variable: Variable, values: Tensor, plate: str | None, picks: Tensor) -> Tensor:
    if plate is None:
        return values[picks[:, 0]]
    if plate not in [p.name for p in variable.layout.plates]:  # a function of all rows, not of one
        return torch.full_like(values, torch.nan) if values.is_floating_point() else values
    axis = _axis(variable, plate)
    return taken(values.movedim(axis, 1), picks).movedim(1, axis)


def resampled(smoothed: np.ndarray, num: int, seed: int) -> Tensor:
    """The indices of ``num`` draws by smoothed log-weights (S, N): (num, N).

    They are resampled systematically, then put in random order, separately for each n.
    """
    random = np.random.default_rng(seed)
    picks = systematic(np.exp(smoothed), random.random(smoothed.shape[1]), num)
    return torch.from_numpy(np.stack([random.permutation(p) for p in picks], 1))
