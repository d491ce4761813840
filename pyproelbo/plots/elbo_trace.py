"""The ELBO in training."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from pyproelbo.plots.axes import NATS, axes, tidy


def plot_elbo_trace(
    steps: ArrayLike,
    traces: Mapping[str, ArrayLike],
    *,
    ylabel: str = "ELBO",
    ax: Axes | None = None,
) -> Axes:
    """Curves over training steps, for example the ELBO of training and of held-out data.

    The first values in training are far below the rest. To keep these readable, the axis leaves out
    what is further below than the range of the last nine tenths of the steps.

    Args:
        steps: (T,), the step of each value.
        traces: values (T,) in nats per datum, by their names in the legend; NaN is a gap.
        ylabel: the name of the values.
    """
    ax = axes(ax)
    steps = np.asarray(steps)
    curves = {name: np.asarray(values, dtype=float) for name, values in traces.items()}
    for name, values in curves.items():
        marker = "o" if np.isfinite(values).sum() < 2 else None
        ax.plot(steps, values, label=name, linewidth=1.5, marker=marker)
    late = [v[len(v) // 10 :] for v in curves.values()]
    shown = np.concatenate([v[np.isfinite(v)] for v in late]) if late else np.array([])
    if shown.size and np.ptp(shown) > 0:
        margin = 0.05 * np.ptp(shown)
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
    ax.set(xlabel="training step", ylabel=f"{ylabel} ({NATS})")
    if len(curves) > 1:
        ax.legend(frameon=False)
    return tidy(ax)
