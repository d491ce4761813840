"""The nats of sequences by timestep."""

import numpy as np
from matplotlib.axes import Axes

from pyproelbo._terms.by_time import ByTime
from pyproelbo._terms.terms import Terms
from pyproelbo.plots.axes import axes, tidy


def plot_kl_by_time(by_time: Terms | ByTime, *, ax: Axes | None = None) -> Axes:
    """The KL of each sequence at each timestep, and below it the mean over sequences.

    A row of the upper part is a sequence, in the order of the data; padding is blank. The lower
    part shows the mean of the sequences that have the step, with a band from their 10 % to their 90
    % quantile. A single sequence is only a line. Several particles are averaged.

    Args:
        by_time: the :class:`~pyproelbo.Terms` of a :class:`~pyproelbo.SequentialELBO`, or their
            ``by_time``.
        ax: the place for both parts.

    Returns:
        The upper part; for a single sequence, the line's axes.

    Raises:
        ValueError: for the Terms of another objective, and where no step counts.
    """
    return _plot(by_time, "kl", "KL", ax)


def plot_reconstruction_by_time(by_time: Terms | ByTime, *, ax: Axes | None = None) -> Axes:
    """The reconstruction of each sequence at each timestep, and below it the mean over sequences.

    As :func:`plot_kl_by_time`. Steps with missing data are blank too, and the mean is over the data
    that are present.
    """
    return _plot(by_time, "reconstruction", "reconstruction", ax)


def _plot(by_time: Terms | ByTime, name: str, label: str, ax: Axes | None) -> Axes:
    by_time = getattr(by_time, "by_time", by_time)
    if not isinstance(by_time, ByTime):
        raise ValueError(
            "by_time should be the Terms of a SequentialELBO, or their by_time, got "
            + ("the Terms of another objective" if by_time is None else type(by_time).__name__)
        )
    values = by_time.to_xarray()[name].dropna("time", how="all")
    if not values.size:
        raise ValueError(f"there is no {label} to draw: no timestep counts")
    values = values.mean("particle") if "particle" in values.dims else values
    times = values.time.values
    rows = values.transpose(..., "time").values.reshape(-1, len(times))
    if len(rows) == 1:
        return _curve(times, rows, label, axes(ax, (7, 3)))
    ax = axes(ax, (7, 5))
    below, right = _divide(ax)
    _map(times, rows, label, ax, right)
    _curve(times, rows, label, below)
    return tidy(ax)


def _divide(ax: Axes) -> tuple[Axes, Axes]:
    """New axes below ``ax`` and to its right, all in its former place."""
    place = ax.get_subplotspec()
    if place is None:
        box = ax.get_position()
        sides = {"left": box.x0, "right": box.x1, "bottom": box.y0, "top": box.y1}
        place = ax.figure.add_gridspec(1, 1, **sides)[0]
    grid = place.subgridspec(
        2, 2, height_ratios=(3, 2), width_ratios=(40, 1), hspace=0.2, wspace=0.03
    )
    ax.set_subplotspec(grid[0, 0])
    return ax.figure.add_subplot(grid[1, 0], sharex=ax), ax.figure.add_subplot(grid[0, 1])


def _map(times: np.ndarray, rows: np.ndarray, label: str, ax: Axes, bar: Axes) -> None:
    """An image of rows (B, T); its colour scale spans the 1 % to 99 % quantiles."""
    start, end = times[0], times[-1] + 1
    picture = np.full((len(rows), end - start), np.nan)
    picture[:, times - start] = rows
    least, low, high, most = np.nanquantile(rows, (0, 0.01, 0.99, 1))
    low = min(low, 0.0) if least >= 0 else low
    image = ax.imshow(
        picture,
        extent=(start - 0.5, end - 0.5, len(rows) - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
        vmin=low,
        vmax=high,
    )
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
    bar.figure.colorbar(
        image,
        cax=bar,
        label=f"{label} (nats)",
        extend=extend.get((least < low, high < most), "neither"),
    )
    ax.tick_params(axis="x", labelbottom=False)
    ax.locator_params(axis="y", nbins=6, integer=True)
    ax.set_ylabel("sequence")


def _curve(times: np.ndarray, rows: np.ndarray, label: str, ax: Axes) -> Axes:
    """The mean of rows (B, T), in a band of most of them."""
    marker = "." if len(times) <= 50 else None
    ax.plot(times, np.nanmean(rows, axis=0), marker=marker, label="mean")
    if len(rows) > 1:
        low, high = np.nanquantile(rows, (0.1, 0.9), axis=0)
        band = {"alpha": 0.25, "linewidth": 0, "label": "10 % to 90 % of sequences"}
        ax.fill_between(times, low, high, color="C0", **band)
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
        ax.legend(frameon=False, ncols=2, **above).set_in_layout(False)
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="timestep", ylabel=f"{label} (nats)")
    return tidy(ax)
