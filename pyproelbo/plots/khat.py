"""The reliability of each datum's importance weights."""

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from pyproelbo._diagnostics.loo import Loo
from pyproelbo._evidence.pareto import GOOD, USABLE, bands
from pyproelbo._evidence.psis import Psis
from pyproelbo.plots.axes import array, axes, tidy

_COLORS = {"good": "C0", "usable": "C1", "bad": "C3"}


def plot_khat(psis: Psis | Loo | ArrayLike | Tensor, *, ax: Axes | None = None) -> Axes:
    """Pareto k-hat of each datum, or of the data set, with lines at 0.5 and the threshold.

    Args:
        psis: a :class:`~pyproelbo.Psis` or :class:`~pyproelbo.Loo`, or values of k-hat, (N,), whose
            threshold is 0.7.

    Raises:
        ValueError: for another shape, or no values.
    """
    k = array(psis.khat).ravel() if isinstance(psis, Psis | Loo) else array(psis)
    if k.ndim != 1 or len(k) == 0:
        raise ValueError(f"khat should have shape (N,) with at least one datum, got {k.shape}")
    ax = axes(ax)
    threshold = psis.threshold if isinstance(psis, Psis | Loo) else USABLE
    for name, of in bands(k, threshold).items():
        mask = of & ~np.isnan(k)  # of masked data
        ax.scatter(
            np.flatnonzero(mask),
            k[mask],
            s=10,
            color=_COLORS[name],
            alpha=min(0.9, 20 / len(k) ** 0.5),
            linewidths=0,
            rasterized=True,
            label=f"{name} ({mask.sum():,})",
        )
    for level, style in ((min(GOOD, threshold), "dashed"), (threshold, "solid")):
        ax.axhline(level, color="0.3", linewidth=1, linestyle=style)
    per = psis.per if isinstance(psis, Psis) else "datum"
    ax.set(xlabel=per, ylabel=r"Pareto $\hat{k}$")
    if per == "data set":
        ax.set_xticks([])
    legend = ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    return tidy(ax)
