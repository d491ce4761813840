"""Labelled estimates with their errors, beside the values that they should have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from pyproelbo.plots.axes import axes, tidy

_MOST = 40  # labels


class Reference(NamedTuple):
    """The values that estimates should have.

    Attributes:
        at: the value itself.
        low, high: a band around it, within which deviations do not matter; None for no band.
    """

    at: float
    low: float | None = None
    high: float | None = None


def dots(
    labels: Sequence[str],
    values: np.ndarray,
    errors: np.ndarray | None,
    *,
    xlabel: str,
    reference: Reference | None = None,
    is_log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """A row for each label: the value with two standard errors on each side.

    Of many labels, those farthest from the reference are shown.

    Args:
        values: (K,); or (N, K), shown by the median and the middle 90%.
        errors: (K,), standard errors; None where unknown.
    """
    if values.ndim == 2 and len(values) > 1:
        low, middle, high = np.nanquantile(values, [0.05, 0.5, 0.95], axis=0)
        below, above = middle - low, high - middle
        xlabel += ", median and middle 90% of the data"
    else:
        middle = values.reshape(-1)
        below = above = 2 * np.nan_to_num(0 * middle if errors is None else errors.reshape(-1))
    at = 0.0 if reference is None else reference.at
    far = np.abs(np.log(middle / at) if is_log and at > 0 else middle - at)
    ax, shown = _labelled(labels, far, xlabel, ax)
    if reference is not None:
        ax.axvline(reference.at, color="0.3", linewidth=1, linestyle="dashed")
        if reference.low is not None and reference.high is not None:
            ax.axvspan(reference.low, reference.high, color="0.92", zorder=0)
    if is_log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        below = np.minimum(below, 0.9 * middle)
    spread = np.stack([below, above])[:, shown]
    places = np.arange(len(shown))
    ax.errorbar(middle[shown], places, xerr=spread, fmt="o", markersize=4, linewidth=1.2)
    return ax


def strips(
    labels: Sequence[str], values: np.ndarray, *, xlabel: str, ax: Axes | None = None
) -> Axes:
    """A row for each label, with a dot for each of its values, (N, K)."""
    ax, shown = _labelled(labels, np.nan_to_num(np.abs(values)).max(0), xlabel, ax)
    ax.axvline(0.0, color="0.3", linewidth=1, linestyle="dashed")
    for place, k in enumerate(shown):
        ax.scatter(values[:, k], np.full(len(values), place), s=9, alpha=0.5, linewidths=0)
    return ax


def _labelled(
    labels: Sequence[str], distances: np.ndarray, xlabel: str, ax: Axes | None
) -> tuple[Axes, np.ndarray]:
    """Axes with a row for each label, and which labels these are: the most distant ones."""
    shown = np.sort(np.argsort(-np.nan_to_num(distances))[:_MOST])
    ax = axes(ax, (6.4, 1.2 + 0.22 * len(shown)))
    ax.set_yticks(np.arange(len(shown)), [str(labels[k]) for k in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set(xlabel=xlabel)
    return tidy(ax), shown
