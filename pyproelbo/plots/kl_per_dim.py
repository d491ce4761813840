"""The information in each latent dimension."""

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from pyproelbo._surgery.result import Surgery
from pyproelbo.plots.axes import NATS, axes, tidy

_ACTIVE, _INACTIVE, _MARGINAL = "C0", "0.75", "C1"


def plot_kl_per_dim(
    kl: Surgery | ArrayLike,
    *,
    active: ArrayLike | None = None,
    threshold: float = 0.01,
    ax: Axes | None = None,
) -> Axes:
    """The KL of each latent dimension as bars, the largest first.

    For a :class:`~pyproelbo.Surgery`, a narrow bar beside each shows how much of that KL is
    marginal KL, the distance of all codes together from the prior, with its Monte Carlo standard
    error; the rest distinguishes the data.

    Args:
        kl: (K,), the KL of each dimension averaged over data, in nats; or a ``Surgery``, which also
            gives the active units and the names of the dimensions.
        active: (K,) booleans, whether each dimension is in use; by default the surgery's, or those
            with a KL above ``threshold``.

    Raises:
        ValueError: for another shape, and for a surgery without a KL for each dimension.
    """
    marginal, error, names = None, None, None
    if isinstance(kl, Surgery):
        if kl.kl_per_dim is None:
            raise ValueError(
                "this surgery has no kl_per_dim: q(z | x) has no known marginals (a flow, say), "
                "or the prior's dimensions are not independent. plot_surgery shows the available "
                "parts"
            )
        active = kl.active_units if active is None else active
        error = kl.stderr.get("marginal_kl_per_dim")
        kl, marginal, names = kl.kl_per_dim, kl.marginal_kl_per_dim, kl.dims
    kl = np.asarray(kl, dtype=float)
    if kl.ndim != 1:
        raise ValueError(f"kl should have shape (K,), one for each dimension, got {kl.shape}")
    in_use = kl > threshold if active is None else np.asarray(active, dtype=bool)
    if in_use.shape != kl.shape:
        raise ValueError(f"active should have shape {kl.shape}, as kl has, got {in_use.shape}")
    order = np.argsort(-kl, kind="stable")

    ax = axes(ax)
    for chosen, color, label in ((True, _ACTIVE, "active"), (False, _INACTIVE, "inactive")):
        at = np.flatnonzero(in_use[order] == chosen)
        if at.size:
            name = f"{label} ({at.size} of {kl.size})"
            ax.bar(at, kl[order][at], color=color, label=name, width=0.8)
    if marginal is not None:
        ax.bar(
            range(kl.size),
            np.asarray(marginal, dtype=float)[order],
            yerr=None if error is None else np.asarray(error, dtype=float)[order],
            color=_MARGINAL,
            ecolor="0.2",
            label="of which marginal KL",
            width=0.35,
        )
    # keeps the noise of a collapse small
    top = max(1.05 * np.nanmax(kl, initial=0.0), 5 * threshold) or 1.0
    ax.set(xlabel="rank of the latent dimension", ylabel=f"KL ({NATS})", ylim=(0, top))
    if kl.size <= 40:  # this many names fit
        ax.set_xticks(range(kl.size), [names[d] if names else str(d) for d in order])
        ax.set_xlabel("latent dimension, sorted")
        crowded = kl.size > (12 if names else 20)
        ax.tick_params(
            axis="x", labelsize=8 if crowded else None, rotation=90 if names and crowded else 0
        )
    ax.legend(frameon=False)
    return tidy(ax)
