"""Generalised Pareto distributions of excesses over a threshold: fits to many samples at once."""

import numpy as np


def pareto_fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shape k and the scale sigma of each of R samples, (R,); NaN where there is no fit.

    Zhang & Stephens (2009), "A new and efficient estimation method for the generalized Pareto
    distribution": the density has parameters k and sigma = -k / b, and b is its mean over a grid of
    m values, weighted by their profile likelihoods. k is shrunk towards 1/2, as by ten more draws
    (Vehtari, Simpson, Gelman, Yao & Gabry 2024, appendix G).

    Args:
        x: n draws of each, (R, n), positive and in rising order. Memory: (R, m, n) numbers
            (:func:`grid_size`).
    """
    n = x.shape[-1]
    m = grid_size(n)
    grid = 1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))
    quartile = x[:, int(n / 4 + 0.5) - 1]
    with np.errstate(all="ignore"):
        b = grid / (3 * quartile[:, None]) + 1 / x[:, -1:]
        profile = n * _profile(b, x)
        profile = np.where(np.isnan(profile), -np.inf, profile)
        weights = np.exp(profile - profile.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        weights = np.where(weights < 10 * np.finfo(float).eps, 0.0, weights)
        b = (b * weights).sum(-1) / weights.sum(-1)
        k = _shapes(b[:, None], x)[:, 0]
        return (n * k + 5) / (n + 10), -k / b


def grid_size(n: int) -> int:
    """The number of values of b tried for n draws: m."""
    return 30 + int(n**0.5)


def _profile(b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The log-likelihood per draw for each b, (R, m), at the best k."""
    k = _shapes(b, x)
    return np.log(-b / k) - k - 1


def _shapes(b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The best k for each b, (R, m)."""
    terms = -b[..., None] * x[:, None]
    return np.log1p(terms, out=terms).mean(-1)


def pareto_quantiles(k: np.ndarray, sigma: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Where the distribution functions of (R,) distributions are p (n,), as (R, n)."""
    t, k = -np.log1p(-p), k[:, None]
    is_zero = np.abs(k) < np.finfo(float).eps
    with np.errstate(all="ignore"):
        return sigma[:, None] * np.where(is_zero, t, np.expm1(k * t) / k)
