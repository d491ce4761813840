"""Ranks of true latents among the guide's draws, against the uniform distribution."""

import numpy as np
from matplotlib.axes import Axes

from pyproelbo._diagnostics.calibration import Calibration
from pyproelbo.plots.axes import axes, tidy

_LIMIT = 1.63  # of sqrt(N) times the largest difference: 99% of uniform samples stay within


def plot_calibration(result: Calibration, *, ax: Axes | None = None) -> Axes:
    """How far the ranks' distribution function lies above that of the uniform distribution.

    A line for each dimension, in grey where it stays within the band that holds 99% of lines of
    a guide that is right. A posterior that is too narrow rises, then falls below 0; one that is too
    low lies below 0 throughout.

    Args:
        result: what ``pe.calibration`` returns.
    """
    ax = axes(ax)
    N = len(result.ranks)
    x = np.linspace(0.0, 1.0, 201)
    band = _LIMIT / N**0.5
    ax.axhspan(-band, band, color="0.92", label="99% where q is right")
    ax.axhline(0.0, color="0.6", linewidth=0.8)
    color = 0
    for name, u in zip(result.dims, result.ranks.mT.numpy(), strict=True):
        difference = np.searchsorted(np.sort(u), x, side="right") / N - x
        outside = np.abs(difference).max() > band
        (line,) = ax.plot(x, difference, color="0.5", linewidth=0.8)
        if outside:
            line.set(color=f"C{color % 10}", linewidth=1.4, label=name)
        color += outside
    ax.set(xlabel="rank of the true value among the draws", ylabel="ECDF - uniform", xlim=(0, 1))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return tidy(ax)
