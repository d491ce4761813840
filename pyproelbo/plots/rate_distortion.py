"""Several fits by the rate and distortion of their codes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyproelbo._surgery.result import Surgery
from pyproelbo.plots.axes import NATS, axes, tidy

Fit = Surgery | tuple[float, float]  # or rate and distortion


def plot_rate_distortion(fits: Mapping[Any, Fit], *, ax: Axes | None = None) -> Axes:
    """The distortion of fits (minus their reconstruction) against their rate (the average KL).

    Alemi et al. (2018), "Fixing a Broken ELBO". On a line of slope -1 all have the same ELBO; the
    grey line is that of the best, and the axis leaves out its part below zero and below all fits.
    Fits with a large beta lie on the left, those with a small one on the right; the better the
    model's families, the closer their curve is to the origin.

    Args:
        fits: by label, such as beta: a :class:`~pyproelbo.Surgery`, or a pair (rate, distortion) in
            nats per datum.

    Raises:
        ValueError: for no fits, and for numbers that are not finite.
    """
    points = np.array([_point(fit) for fit in fits.values()], float).reshape(-1, 2)
    if len(points) == 0 or not np.isfinite(points).all():
        raise ValueError(f"fits should be at least one, with finite numbers, got {points.tolist()}")
    ax = axes(ax)
    rate, distortion = points[points[:, 0].argsort()].T
    ax.plot(rate, distortion, color="C0", marker="o", markersize=5, linewidth=1.2)
    for (x, y), label in zip(points, fits, strict=True):
        ax.annotate(str(label), (x, y), xytext=(5, 4), textcoords="offset points", fontsize="small")
    best = points.sum(1).min()
    low, high = rate.min(), rate.max()
    pad = 0.05 * max(high - low, 1e-3)
    ends = np.array([low - pad, high + pad])
    label = f"ELBO = {-best:.2f}".replace("-", "\N{MINUS SIGN}")
    ax.plot(ends, best - ends, color="0.6", linewidth=1, zorder=0, label=label)
    floor = max(ax.get_ylim()[0], min(0.0, distortion.min()))  # the line may extend far below
    ax.set_ylim(bottom=floor, auto=None)  # the axis still adapts if more is drawn
    ax.set(xlabel=f"rate: average KL, {NATS}", ylabel=f"distortion: -E[log p(x | z)], {NATS}")
    ax.legend(frameon=False)
    return tidy(ax)


def _point(fit: Fit) -> tuple[float, float]:
    if isinstance(fit, Surgery):
        return fit.average_kl, -fit.reconstruction
    rate, distortion = fit
    return float(rate), float(distortion)
