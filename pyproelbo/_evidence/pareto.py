"""The tails of importance weights: a generalised Pareto distribution, and its shape k."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._evidence.pareto_fit import grid_size, pareto_fit, pareto_quantiles

ALIKE = 0.8  # effective share of the draws, where weights hardly differ
GOOD, USABLE = 0.5, 0.7  # Vehtari et al. (2024), section 3.2.4
LEAST = 25  # draws, from which a tail is fitted
_CONSTANT = 1e-3  # nats: log-weights with a smaller spread are equal up to rounding
_LEAST_TAIL = 5  # draws above the threshold, to which a distribution is fitted
_NUMBERS = 2**18  # processed at once
_DRAWS = 32  # copied at once


def pareto_smooth(log_weights: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed importance weights, and the shape k of the fitted tail.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling": the largest
    weights, min(S / 5, 3 sqrt S) of them, are replaced by the quantiles of a generalised Pareto
    distribution fitted to them, truncated at the largest weight. The numbers agree with ArviZ's
    ``psislw``, which works row by row (where S / 5 or 3 sqrt S is no whole number, it is rounded up
    here and in ArviZ 0, and down in ArviZ 1).

    Args:
        log_weights: log p(x, z) - log q(z) at S draws, up to a constant: (S, ...).

    Returns:
        The logarithms of the smoothed weights, which sum to 1 over the draws, (S, ...); and k,
        (...): 0 where the largest weights are all equal, as for a discrete latent, and there is no
        tail; infinite where fewer than five lie above many equal ones, and no tail can be fitted.
        Where all weights are 0, they are NaN and k is infinite.

    Raises:
        ValueError: for fewer than 25 draws, from which no tail can be fitted, and for NaN or +inf.

    >>> log_weights = np.random.default_rng(0).exponential(size=(4000, 2)) * [0.2, 0.9]
    >>> pareto_smooth(log_weights)[1] < 0.5
    array([ True, False])
    """
    if isinstance(log_weights, Tensor):
        log_weights = log_weights.detach().cpu()
    w = np.asarray(log_weights)
    if w.ndim == 0 or len(w) < LEAST:
        raise ValueError(
            f"log_weights should have at least 25 draws, (S, ...), got {np.shape(log_weights)}"
        )
    S, *shape = w.shape
    found = smoothed_rows(w.reshape(S, -1))
    return np.moveaxis(found.log_weights.reshape(*shape, S), -1, 0), found.khat.reshape(shape)


class SmoothedRows(NamedTuple):
    """Smoothed weights of S draws for each of R rows.

    Attributes:
        log_weights: their logarithms, (R, S); they sum to 1.
        khat: k of the tail, (R,).
        log_sum: the logarithm of their sum before normalisation, (R,).
        effective_sample_size: of the row, (R,).
    """

    log_weights: np.ndarray
    khat: np.ndarray
    log_sum: np.ndarray
    effective_sample_size: np.ndarray


def smoothed_rows(log_weights: np.ndarray) -> SmoothedRows:
    """Smoothed weights of all rows, from log-weights (S, R); further memory is independent of R."""
    S, R = log_weights.shape
    x, numbers = _transposed(log_weights), np.empty((3, R))
    num = tail_size(S)
    size = _rows_at_once(num, S)
    for start in range(0, R, size):
        rows = slice(start, start + size)
        numbers[:, rows] = _smooth(x[rows], num)
    return SmoothedRows(x, *numbers)


def _transposed(log_weights: np.ndarray) -> np.ndarray:
    """A copy, (R, S), made of a few draws at a time, for which caches are large enough."""
    x = np.empty(log_weights.shape[::-1])
    for start in range(0, len(log_weights), _DRAWS):
        draws = slice(start, start + _DRAWS)
        x[:, draws] = log_weights[draws].T
    return x


def _rows_at_once(num: int, num_samples: int) -> int:
    """The number of rows at once, which bounds memory for any number of rows."""
    return max(1, _NUMBERS // max(num_samples, num * grid_size(num)))


def _smooth(x: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooth the ``num`` largest of log-weights (R, S) in place; return what is known of them."""
    shift = _shift(x.max(-1))
    x -= shift[:, None]
    at = np.argpartition(x, -num - 1, -1)[:, -num - 1 :]
    tails = np.take_along_axis(x, at, -1)
    order = tails.argsort(-1)
    at, tails = (np.take_along_axis(of, order, -1) for of in (at, tails))
    tails, khat = _smoothed_tails(tails)
    np.put_along_axis(x, at, tails, -1)
    largest = tails[:, -1]
    with np.errstate(invalid="ignore"):  # where all weights are 0
        weights = np.exp(x - largest[:, None])
        total = weights.sum(-1)
        log_sum = largest + np.log(total)
        x -= log_sum[:, None]
    log_sum = np.where(largest == -np.inf, -np.inf, log_sum + shift)
    return khat, log_sum, total**2 / np.square(weights, out=weights).sum(-1)


def _shift(largest: np.ndarray) -> np.ndarray:
    """The largest log-weights (R,), 0 where all weights are 0."""
    if np.isnan(largest).any() or (largest == np.inf).any():
        raise ValueError("log_weights should not be NaN or +inf: look for NaN in data and programs")
    return np.where(largest == -np.inf, 0.0, largest)


def _smoothed_tails(tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest log-weights smoothed, (R, num + 1), and k, (R,).

    Args:
        tails: the largest log-weights minus the largest, preceded by the threshold of the tail, in
            rising order.
    """
    threshold = np.maximum(tails[:, 0], np.log(np.finfo(float).tiny))
    constant = tails[:, 0] > -_CONSTANT
    sizes = np.where(constant, 0, (tails > threshold[:, None]).sum(-1))
    found, khat = tails.copy(), np.where(constant, 0.0, np.inf)
    for n in np.unique(sizes[sizes >= _LEAST_TAIL]):  # one size, unless weights are equal
        rows = np.flatnonzero(sizes == n)
        tail, least = tails[rows, -n:], np.exp(threshold[rows, None])
        k, sigma = pareto_fit(np.exp(tail) - least)
        quantiles = pareto_quantiles(k, sigma, (np.arange(n) + 0.5) / n)
        is_fit = np.isfinite(k) & (sigma > 0)
        khat[rows] = np.where(is_fit, k, np.inf)
        with np.errstate(invalid="ignore"):
            smoothed = np.minimum(np.log(quantiles + least), 0.0)
        found[rows, -n:] = np.where(is_fit[:, None], smoothed, tail)
    return found, khat


def tail_size(num_samples: int) -> int:
    """The number of largest weights to which the tail is fitted: min(S / 5, 3 sqrt S)."""
    return math.ceil(min(num_samples / 5, 3 * num_samples**0.5))


def tail_khat(largest: Tensor) -> Tensor:
    """k-hat from the largest log-weights of the draws, (B,) on the CPU.

    Args:
        largest: the log-weights of the tail and the next one, (tail_size + 1, B), the largest
            first, which determine k-hat.
    """
    tails = largest.flip(0).mT.cpu().double().numpy()
    tails = tails - _shift(tails[:, -1])[:, None]
    num = tails.shape[-1] - 1
    size = _rows_at_once(num, num)
    found = [_smoothed_tails(tails[i : i + size])[1] for i in range(0, len(tails), size)]
    return torch.from_numpy(np.concatenate(found))


def threshold_of(num_samples: int) -> float:
    """The largest acceptable k-hat of ``num_samples`` draws: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(num_samples), USABLE)


def bands(khat: Any, threshold: float) -> dict[str, Any]:
    """Masks of values of k-hat, by name: good, usable, and bad.

    Args:
        threshold: as of :func:`threshold_of`, below :data:`GOOD` for fewer than 100 draws: then
            none are good that are not usable.
    """
    good = khat < min(GOOD, threshold)
    return {"good": good, "usable": ~good & (khat < threshold), "bad": ~(khat < threshold)}


def usable(khat: Tensor, effective_sample_size: Tensor, num_samples: int) -> Tensor:
    """Whether weights can be used (see :attr:`~pyproelbo.Psis.is_usable`)."""
    alike = effective_sample_size > ALIKE * num_samples
    return (khat < threshold_of(num_samples)) | alike
