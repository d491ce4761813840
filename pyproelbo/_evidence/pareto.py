"""The tails of importance weights: a generalised Pareto distribution, and its shape k."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

ALIKE = 0.8  # of the draws, that count where weights hardly differ
GOOD, USABLE = 0.5, 0.7  # Vehtari et al. (2024), section 3.2.4
LEAST = 25  # draws, of which a tail is fitted
_CONSTANT = 1e-3  # nats: log-weights that spread less are all the same, but for rounding
_NUMBERS = 2**22  # log-weights that are filled up at once


def pareto_smooth(log_weights: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed importance weights, and the shape k of the tail that was fitted.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling". ArviZ does
    it, whose versions differ in the sign of what they take.

    Args:
        log_weights: log p(x, z) - log q(z) at S draws, up to a constant: (S, ...).

    Returns:
        The logarithms of the smoothed weights, which sum to 1 over the draws, (S, ...); and k,
        (...): 0 where the largest weights are all the same, as for a discrete latent, and there
        is no tail; infinite where the largest are less than five, above many of one size, and
        none can be fitted. Where all weights are 0, NaN, and k is infinite.

    Raises:
        ValueError: for fewer than 25 draws, of which no tail can be fitted, and for NaN or +inf.

    >>> log_weights = np.random.default_rng(0).exponential(size=(4000, 2)) * [0.2, 0.9]
    >>> pareto_smooth(log_weights)[1] < 0.5
    array([ True, False])
    """
    if isinstance(log_weights, Tensor):
        log_weights = log_weights.detach().cpu()
    w = np.moveaxis(np.asarray(log_weights, float), 0, -1)
    if w.ndim == 0 or w.shape[-1] < 25:
        raise ValueError(
            f"log_weights should have at least 25 draws, (S, ...), got {np.shape(log_weights)}"
        )
    if np.isnan(w).any() or (w == np.inf).any():
        raise ValueError("log_weights should not be NaN or +inf: look for NaN in data and programs")
    none = (w == -np.inf).all(-1)
    w = np.where(none[..., None], 0.0, w)
    w = w - w.max(-1, keepdims=True)
    S = w.shape[-1]
    below = S - 1 - tail_size(S)  # the tail's draws are those above
    constant = np.partition(w, below, -1)[..., below] > -_CONSTANT
    smoothed, k = _psislw(np.where(constant[..., None], _varied(w.shape), w))
    smoothed = np.where(constant[..., None], w, smoothed)
    smoothed = smoothed - np.logaddexp.reduce(smoothed, -1, keepdims=True)
    smoothed = np.where(none[..., None], np.nan, smoothed)
    return np.moveaxis(smoothed, -1, 0), np.select([none, constant], [np.inf, 0.0], k)


def _psislw(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By ArviZ, of draws in the last dim."""
    try:
        from arviz_stats.base import array_stats  # type: ignore[import-not-found]
    except ImportError:  # ArviZ before 1.0
        from arviz import psislw

        return psislw(log_weights)  # type: ignore[return-value]
    return array_stats.psislw(-log_weights)


def _varied(shape: tuple[int, ...]) -> np.ndarray:
    """In place of weights that have no tail to be fitted."""
    return np.broadcast_to(-np.linspace(0.0, 1.0, shape[-1]), shape)


def tail_size(num_samples: int) -> int:
    """How many of the largest weights the tail is fitted to: min(S / 5, 3 sqrt S)."""
    return math.ceil(min(num_samples / 5, 3 * num_samples**0.5))


def tail_khat(largest: Tensor, num_samples: int) -> Tensor:
    """k-hat of S draws, of which the largest log-weights are known, (B,) on the CPU.

    Args:
        largest: the log-weights of the tail and the next one, (tail_size + 1, B), the largest
            first: all that k-hat depends on.
    """
    found = []
    for part in largest.cpu().split(max(1, _NUMBERS // num_samples), 1):
        rest = (part[-1:] - 1).expand(num_samples - len(part), -1)
        found.append(torch.as_tensor(pareto_smooth(torch.cat([part, rest]))[1]))
    return torch.cat(found)


def threshold_of(num_samples: int) -> float:
    """Above it, k-hat of so many draws is too large: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(num_samples), USABLE)


def usable(khat: Tensor, effective_sample_size: Tensor, num_samples: int) -> Tensor:
    """Whether weights can be used (see :attr:`~pyproelbo.Psis.is_usable`)."""
    alike = effective_sample_size > ALIKE * num_samples
    return (khat < threshold_of(num_samples)) | alike
