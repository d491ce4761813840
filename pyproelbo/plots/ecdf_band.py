"""A simultaneous band for the distribution functions of uniform samples."""

import numpy as np
import scipy
from numpy.typing import NDArray

Points = NDArray[np.float64]


def ecdf_band(num: int, x: Points, probability: float) -> tuple[Points, Points]:
    """Simultaneous limits on how many of ``num`` uniform numbers are at most x, for all x.

    At each x they are quantiles of Binomial(num, x), at a common level that gives the whole band
    its probability (Säilynoja, Bürkner & Vehtari 2022, section 2).

    Args:
        x: (P,), rising, from 0 to 1.
        probability: of staying within everywhere; at least this, as closely as whole numbers allow.

    Returns:
        The lower and the upper limits, (P,) each.
    """

    def excess(log_level: float) -> float:
        limits = _quantiles(num, x, np.exp(log_level))
        return _probability(num, x, *limits) - probability

    least = (1 - probability) / (2 * len(x))  # at which the band certainly exceeds it
    found = scipy.optimize.root_scalar(
        excess, bracket=(np.log(least), 0.0), method="bisect", xtol=1e-3
    )
    return _quantiles(num, x, np.exp(found.root - 1e-3))  # before the last step


def _quantiles(num: int, x: Points, level: float) -> tuple[Points, Points]:
    low, high = (scipy.stats.binom.ppf(p, num, x) for p in (level / 2, 1 - level / 2))
    return np.clip(low, 0, num), np.clip(high, 0, num)


def _probability(num: int, x: Points, low: Points, high: Points) -> float:
    """The probability that counts of uniform numbers at most x are within limits at all x.

    They form a Poisson process conditional on ``num`` events by 1, and that has independent
    increments (Moscovich & Nadler 2017, "Fast calculation of boundary crossing probabilities for
    Poisson processes").
    """
    within = np.ones(1)  # the probability of each number from ``low`` on
    for i in range(1, len(x)):
        increments = np.arange(high[i] - low[i - 1] + 1)
        after = scipy.signal.fftconvolve(
            within, scipy.stats.poisson.pmf(increments, num * (x[i] - x[i - 1]))
        )
        within = after[int(low[i] - low[i - 1]) :][: int(high[i] - low[i]) + 1]
    return float(within[0] / scipy.stats.poisson.pmf(num, num))
