"""Ranks of true latents among the guide's draws, compared with the uniform distribution."""

import numpy as np
from matplotlib.axes import Axes

from pyproelbo._diagnostics.calibration import Calibration
from pyproelbo.plots.axes import axes, tidy
from pyproelbo.plots.ecdf_band import ecdf_band

_PROBABILITY = 0.95
_POINTS = 100  # between which lines are straight


def plot_calibration(result: Calibration, *, ax: Axes | None = None) -> Axes:
    """The ranks' distribution function minus that of the uniform distribution.

    A line for each quantity, in grey where it stays within the band. The band is simultaneous: with
    a correct guide all lines lie within it everywhere with a probability of at least 95%
    (Säilynoja, Bürkner & Vehtari 2022, "Graphical test for discrete uniformity and its applications
    in goodness-of-fit evaluation and multiple sample comparison"; with a level of 5% / K for each
    of K lines).

    For a single dimension, the line of a posterior that is too narrow rises, then falls below 0;
    that of one that is too low lies below 0 throughout. The line of "distance to a reference point"
    is the expected coverage of regions of q minus their probability (TARP).

    Args:
        result: the result of ``pe.calibration``.
    """
    ax = axes(ax)
    N, K = result.ranks.shape
    x = np.linspace(0.0, 1.0, _POINTS + 1)
    low, high = (limit / N - x for limit in ecdf_band(N, x, 1 - (1 - _PROBABILITY) / K))
    ax.fill_between(
        x, low, high, color="0.92", linewidth=0, label=f"{_PROBABILITY:.0%} where q is right"
    )
    ax.axhline(0.0, color="0.6", linewidth=0.8)
    color = 0
    for name, u in zip(result.dims, result.ranks.mT.numpy(), strict=True):
        difference = np.searchsorted(np.sort(u), x, side="right") / N - x
        outside = bool(((difference < low - 1e-9) | (difference > high + 1e-9)).any())
        (line,) = ax.plot(x, difference, color="0.5", linewidth=0.8)
        if outside:
            style = ("-", "--", ":", "-.")[color // 10 % 4]
            line.set(color=f"C{color % 10}", linestyle=style, linewidth=1.4, label=name)
        color += outside
    rows = {"datum": "data", "simulation": "simulations"}[result.per]
    ax.set(
        xlabel=f"rank of the true value among the draws ({N:,} {rows})",
        ylabel="ECDF - uniform",
        xlim=(0, 1),
    )
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return tidy(ax)
