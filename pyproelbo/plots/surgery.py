"""The parts of a data set's KL."""

from matplotlib.axes import Axes

from pyproelbo._surgery.result import Surgery
from pyproelbo.plots.axes import NATS, axes, number, tidy


def plot_surgery(surgery: Surgery, ax: Axes | None = None) -> Axes:
    """The parts of a data set's KL as bars, each starting where the previous one ends.

    The average KL is the sum of mutual information and marginal KL; the marginal KL is the sum of
    total correlation and dimension-wise KL, where known. A line marks log N, which mutual
    information cannot exceed. Whiskers are Monte Carlo standard errors. The title has the ELBO and
    the reconstruction, which is usually too large to be drawn beside a KL.

    Args:
        surgery: a result of :func:`pyproelbo.surgery`.
    """
    ax = axes(ax, (8, 3.4))
    information, correlation = surgery.mutual_information, surgery.total_correlation
    rows = [  # label, name, where the bar starts, colour
        ("average KL", "average_kl", 0.0, "0.6"),
        (
            f"mutual information\n(line: log N = {surgery.log_n:.2f})",
            "mutual_information",
            0.0,
            "C0",
        ),
        ("marginal KL", "marginal_kl", information, "C1"),
        ("total correlation", "total_correlation", information, "#ffbb78"),
        ("dimension-wise KL", "dimension_wise_kl", information + (correlation or 0.0), "#ffbb78"),
    ]
    rows = [row for row in rows if getattr(surgery, row[1]) is not None]
    for y, (_, name, start, color) in enumerate(rows):
        value, error = getattr(surgery, name), _error(surgery, name)
        ax.barh(y, value, left=start, color=color, height=0.7)
        if error > 0:
            ax.errorbar(start + value, y, xerr=error, color="0.2", linewidth=1.2, capsize=3)
        ax.text(1.03, y, number(value, error), transform=ax.get_yaxis_transform(), va="center")
    ends = [information, surgery.average_kl]
    ax.vlines(ends, 0.35, len(rows) - 1, color="0.8", linewidth=0.8, zorder=0)

    ax.vlines(surgery.log_n, 0.55, 1.45, color="0.2", linewidth=2)
    ax.set_yticks(range(len(rows)), [label for label, *_ in rows])
    ax.set(xlabel=NATS, ylim=(len(rows) - 0.4, -0.6))
    ax.set_xlim(right=1.05 * max(surgery.average_kl, surgery.log_n))
    ax.tick_params(axis="y", length=0)
    ax.set_title(_equation(surgery), loc="left", fontsize="medium")
    return tidy(ax)


def _equation(surgery: Surgery) -> str:
    terms = [("+", "factor"), ("\N{MINUS SIGN}", "average KL"), ("\N{MINUS SIGN}", "other KL")]
    names = ["factor", "average_kl", "other_kl"]
    parts = [f"reconstruction {_with_error(surgery, 'reconstruction')}"]
    for (sign, label), name in zip(terms, names, strict=True):
        if name == "average_kl" or getattr(surgery, name):
            parts.append(f"{sign} {label} {_with_error(surgery, name)}")
    return f"ELBO {_with_error(surgery, 'elbo')}\n= {' '.join(parts)}"


def _with_error(surgery: Surgery, name: str) -> str:
    return number(getattr(surgery, name), _error(surgery, name))


def _error(surgery: Surgery, name: str) -> float:
    return float(surgery.stderr.get(name, 0.0))
