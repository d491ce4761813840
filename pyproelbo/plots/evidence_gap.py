"""The gap between ELBO and evidence, and its parts."""

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyproelbo._evidence.gaps import InferenceGap
from pyproelbo._results.per import nats
from pyproelbo.plots.axes import axes, number, tidy


def plot_evidence_gap(gap: InferenceGap, *, ax: Axes | None = None) -> Axes:
    """The ELBO, the amortisation gap and the approximation gap, end to end up to log p(x).

    For a guide that was fitted to one data set, the optimisation gap replaces the amortisation gap.

    Args:
        gap: the result of ``pe.inference_gap``; its means over the data are drawn.
    """
    ax = axes(ax, (7.0, 2.4))
    elbo, best, top = (float(x.mean()) for x in (gap.elbo, gap.best_elbo, gap.log_evidence))
    first = "amortisation gap" if gap.per == "datum" else "optimisation gap"
    parts = [(first, elbo, best, "C1"), ("approximation gap", best, top, "C3")]
    for name, left, right, color in parts:
        label = f"{name}: {number(right - left, gap.error(name.split()[0]))}"
        ax.barh(0, right - left, left=left, height=0.5, color=color, label=label)
    for x, name in ((elbo, "ELBO"), (top, r"$\log p(x)$")):
        ax.vlines(x, -0.32, 0.32, color="0.15", linewidth=1.2)
        ax.annotate(
            name, (x, 0.32), ha="center", va="bottom", xytext=(0, 2), textcoords="offset points"
        )
    width = max(abs(top - elbo), 1e-6)
    ax.set_xlim(min(elbo, best, top) - 0.12 * width, max(elbo, best, top) + 0.12 * width)
    ax.set_ylim(-0.45, 0.55)
    ax.set(xlabel=nats(gap.per), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.spines["left"].set_visible(False)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2)
    return tidy(ax)
